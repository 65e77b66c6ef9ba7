"""The part of tr(G) that a linear output layer has, in closed form: no columns, no signs, no noise.

Where the outputs of term m are f_m = W h_m + b, with W and b used nowhere else, their blocks have

    tr(G_W) = (1/M) sum_m ||h_m||^2 tr(A_m),   tr(G_b) = (1/M) sum_m tr(A_m).

A convolution is such a layer too: h_m is the patch that it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.norms import gradients
from hesstrace_cli.curvature.per_example.rules.layout import Norms, in_full, output_shape
from hesstrace_cli.curvature.per_example.rules.operands import (
    CONVOLUTIONS,
    kernel_of,
    operands,
    with_weights,
)
from hesstrace_cli.curvature.per_example.uses import Use
from hesstrace_cli.tasks import Task

# What moves numbers and changes none:
_MOVES = frozenset({
    "Alias", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T", "Transpose",
    "UnsafeView", "Unsqueeze", "View",
})  # fmt: skip


def output_layer(outputs: Tensor, uses: Sequence[Use], params: Params, task: Task) -> Norms:
    """Find the linear layer that gives the outputs, by its node in their graph.

    Args:
        outputs: f, shape (N, ...), with their graph.
        uses: Of `find_uses`.
        params: The parameters by name.
        task: Says which outputs make up a term.

    Returns:
        ||h_m||^2 of each of the N T terms, counted or not, by the weight's name, 1 by the bias's;
        nothing where there is no such layer.
    """
    uses = [use for use in uses if not use.users and len(use.nodes) == 1]
    if outputs.dim() == 2:  # one term a row, so that nothing needs to be found out
        own = next((u for u in uses if u.nodes[0] is _without_cast(outputs.grad_fn)), None)
        if own is not None and operation(own.nodes[0]) in ("Addmm", "Mm"):
            return _of_rows(own, outputs)
    terms = task.term_numbers(outputs) + 1  # 0 is of none
    if terms.numel() == 0 or int(terms.max()) > 1 / torch.finfo(outputs.dtype).eps:
        return {}
    found: Norms = {}
    last = list(_last_uses(outputs, uses))
    for use, (g,) in zip(last, gradients(outputs, last, terms.to(outputs.dtype)), strict=True):
        rows = _rows(use, g).long()
        place = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        row_of = place.new_zeros(int(terms.max()) + 1)
        row_of[rows.flatten()] = place.flatten()
        if not bool(((row_of[rows] == place) | (rows == 0)).all()):  # a term has several rows
            continue
        for role, name in use.names.items():
            if operation(use.nodes[0]) == "Add":
                if params[name].numel() == rows.shape[1]:  # an entry for each number of a row
                    found[name] = torch.ones_like(row_of[1:], dtype=outputs.dtype)
            elif role == "bias":
                found[name] = torch.ones_like(row_of[1:], dtype=outputs.dtype)
            elif (squares := _squares(use.nodes[0])) is not None:
                found[name] = squares[row_of[1:]]
    return found


def _without_cast(node: Any) -> Any:
    return node.next_functions[0][0] if node is not None and operation(node) == "ToCopy" else node


def _of_rows(use: Use, outputs: Tensor) -> Norms:
    squares = {
        "weight": _squares(use.nodes[0]), "bias": torch.ones_like(outputs[:, 0].detach())
    }  # fmt: skip
    return {name: s for role, name in use.names.items() if (s := squares[role]) is not None}


def _last_uses(outputs: Tensor, uses: Sequence[Use]) -> Iterator[Use]:
    """Those between which and the outputs numbers are only moved: a layer, and a bias added."""
    by_node = {use.nodes[0]: use for use in uses}
    node: Any = outputs.grad_fn
    while (node := with_weights(node)) is not None:
        use = by_node.get(node)
        if operation(node) in _MOVES:
            node = node.next_functions[0][0]
            continue
        if use is None or _groups(node) != 1:
            return
        if operation(node) in ("Addmm", "Mm", "Add", *CONVOLUTIONS):
            yield use
        node = without_bias(node)


def _groups(node: Any) -> int:
    return kernel_of(node).groups if operation(node) in CONVOLUTIONS else 1


def without_bias(node: Any) -> Any:
    """What a parameter is added to, if it is all that is added."""
    if operation(node) != "Add" or node._saved_alpha != 1:
        return None
    others = [n for n, _ in node.next_functions if n is not None and not hasattr(n, "variable")]
    same = len(others) == 1 and output_shape(others[0]) == output_shape(node)
    return others[0] if same else None


def _rows(use: Use, g: Tensor) -> Tensor:
    """A row for each h, of the numbers that it gives."""
    if operation(use.nodes[0]) in CONVOLUTIONS:
        return g.movedim(1, -1).flatten(0, -2)
    return use.rows([g])[0].flatten(1)


def _squares(node: Any) -> Tensor | None:
    """||h||^2 of each row; None where they are not saved."""
    kind = operation(node)
    if kind not in CONVOLUTIONS:
        X = node._saved_mat1 if kind == "Addmm" else node._saved_self
        return None if X is None else in_full(X).square().sum(1)
    X, W = operands(node)
    if X is None:
        return None
    kernel = dataclasses.replace(kernel_of(node), groups=1)
    patches = kernel.forward(X.square().sum(1, keepdim=True), torch.ones_like(W[:1, :1]))
    return patches.flatten()
