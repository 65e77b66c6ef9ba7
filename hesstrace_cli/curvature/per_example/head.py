"""A linear layer over many words that gives a model's outputs (N, T, V), taken apart from the rest.

With inputs h_m of its M = N T terms and outputs f_m = W h_m + b, all that the layers below see of a
cotangent u = B e is W^T u, shape (N, T, d). It is made of some examples at a time, and made again
where it is differentiated: beside the outputs no tensor over all examples' words is held.

Tied to embeddings, W has the closed form's part of the trace by itself, and that of the words
besides:   E || sum_m u_m h_m^T ||^2 = sum_m ||h_m||^2 tr(A_m).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.output_layer import without_bias
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    Scales,
    in_full,
    is_recorded,
    output_shape,
)
from hesstrace_cli.curvature.per_example.uses import Use
from hesstrace_cli.tasks import Task

PART = 1 << 22
"""Numbers over words that are worked on at a time (16 MiB in float32)."""

# What moves numbers and leaves none out:
_MOVES = frozenset({
    "Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "Transpose", "UnsafeView", "Unsqueeze",
    "View",
})  # fmt: skip


def parts_of(outputs: Tensor) -> int:
    """How many examples are worked on at a time."""
    return max(1, PART // max(1, outputs[:1].numel()))


@dataclass(frozen=True)
class Head:
    """The layer that gives the outputs.

    Attributes:
        outputs: f, (N, T, V).
        node: Its operation.
        order: The row of each term among its inputs, (N T,).
        names: Its own parameters by role, those that nothing else takes.
        tied: What has its weight together with embeddings; None where it has its own.
        task: Gives A and B.
    """

    outputs: Tensor
    node: Any
    order: Tensor
    names: dict[str, str]
    tied: Use | None
    task: Task

    @property
    def hidden(self) -> Tensor:
        """The rows h, (R, d), with their graph."""
        X: Tensor = self.node._saved_mat1 if operation(self.node) == "Addmm" else (
            self.node._saved_self
        )  # fmt: skip
        return X

    @property
    def weight(self) -> Tensor:
        """W as the operation takes it, (d, V), with its graph."""
        mat2: Tensor = self.node._saved_mat2
        return mat2

    @property
    def examples(self) -> Tensor:
        """The example of each row."""
        T = self.outputs.shape[1]
        return torch.argsort(self.order) // T

    def by_term(self, rows: Tensor) -> Tensor:
        """From (R, ...) to (N, T, ...)."""
        return rows[self.order].unflatten(0, self.outputs.shape[:2])

    @property
    def tied_name(self) -> str:
        """The name of the tied weight."""
        assert self.tied is not None
        return self.tied.names["weight"]

    def squares(self) -> Norms:
        """||h||^2 of each of the N T terms by the weight's name, 1 by the bias's; of own ones."""
        found: Norms = {}
        if "weight" in self.names:
            found[self.names["weight"]] = in_full(self.hidden).square().sum(1)[self.order]
        if "bias" in self.names:
            found[self.names["bias"]] = torch.ones_like(self.outputs[..., 0]).flatten()
        return found

    def closed(self, traces: Tensor) -> Norms:
        """The closed form's part of each example, (N,) by name.

        Args:
            traces: tr(A) of the terms, (N, T).
        """
        squares = self.squares()
        if self.tied is not None:
            squares[self.tied_name] = in_full(self.hidden).square().sum(1)[self.order]
        return {n: (s.view_as(traces) * traces).sum(1) for n, s in squares.items()}

    def traces(self, targets: Tensor, *, hold: bool = False) -> Tensor:
        """tr(A) of the terms, (N, T), with its graph unless A is held."""
        outputs = self.outputs.detach() if hold else self.outputs

        def of(f: Tensor, _: Any, y: Tensor) -> Tensor:
            return self.task.curvature_traces(f, y)

        return in_parts(of, outputs, None, targets)

    def pulled(
        self, targets: Tensor, signs: Callable[[slice], Tensor], layout: Layout | None, *,
        hold: bool = False,
    ) -> tuple[Tensor, list[Use], Tensor]:  # fmt: skip
        """The cotangent of the rows h, (R, d), what is left to take of a tied weight, and tr(A).

        With tr(A) beside it the outputs get one gradient of all of them.

        Args:
            targets: y.
            signs: Gives e of some examples, asked for in their order, again if differentiated.
            layout: Of the embeddings' words, where what is left is wanted.
            hold: Whether A counts as constant.
        """
        outputs = self.outputs.detach() if hold else self.outputs
        at = None
        if self.tied is not None and layout is not None:
            assert self.tied.shared is not None
            at = self.tied.shared.at(layout)
        numbers = torch.arange(len(outputs))  # on the CPU: a GPU would be waited for

        def of(f: Tensor, W: Tensor | None, y: Tensor, number: Tensor, *words: Tensor) -> Tensor:
            assert W is not None
            first = int(number[0])
            u = self.task.root(f, y, signs(slice(first, first + len(number))).to(f.dtype))
            picked = [u.gather(2, at[:, None].expand(-1, u.shape[1], -1)) for at in words]
            traces = self.task.curvature_traces(f, y)[..., None]
            return torch.cat([u @ W.mT, traces, *picked], 2)

        constants = (targets, numbers) if at is None else (targets, numbers, at)
        found = in_parts(of, outputs, self.weight, *constants)
        width = self.weight.shape[0]
        rows = found[..., :width].flatten(0, 1)[torch.argsort(self.order)]
        words = [] if at is None else [self._of_words(found[..., width + 1 :])]
        return rows, words, found[..., width]

    def below(self, uses: Sequence[Use]) -> list[Use]:
        """Uses but those of this layer."""
        own = {*self.names.values(), *([] if self.tied is None else [self.tied_name])}
        return [use for use in uses if own.isdisjoint(use.names.values())]

    def embeddings(self) -> list[Use]:
        """What has the tied weight below this layer; nothing where it is not tied."""
        if self.tied is None:
            return []
        kept = [n for n, node in enumerate(self.tied.nodes) if node is not self.node]
        return [
            replace(
                self.tied,
                nodes=tuple(self.tied.nodes[n] for n in kept),
                edges=tuple(self.tied.edges[n] for n in kept),
                rows_at=tuple(self.tied.rows_at[n] for n in kept),
                flatten=tuple(self.tied.flatten[n] for n in kept),
            )
        ]

    def _of_words(self, picked: Tensor) -> Use:
        """The embeddings' part of the tied weight's norm, and what it has with this layer's."""
        (use,) = self.embeddings()
        shared = use.shared
        assert shared is not None

        def norms(rows: Sequence[Tensor], layout: Layout, _: Scales) -> Norms:
            words = shared.words([layout.group(g) for g in rows], layout)
            hidden = in_full(self.by_term(self.hidden))
            return {"weight": words.own() + words.across(in_full(picked), hidden)}

        return replace(use, norms=norms)


def find_head(outputs: Tensor, uses: Sequence[Use], task: Task) -> Head | None:
    """The layer that gives the outputs, if all that has its parameters is known.

    Args:
        outputs: With their graph.
        uses: Of `find_uses`.
        task: Says which outputs make up a term.
    """
    if outputs.dim() != 3 or not outputs.numel() or not _is_a_term_a_row(outputs, task):
        return None
    node: Any = outputs.grad_fn
    names: dict[str, str] = {}
    numbers = torch.arange(outputs[..., 0].numel(), device=outputs.device)
    # Of each term, in the shape that it had before these operations:
    place: Tensor | None = numbers.view(outputs.shape[:2])
    while node is not None and place is not None and operation(node) in (*_MOVES, "Add"):
        if operation(node) == "Add":
            own = [use for use in uses if use.nodes == (node,)]
            if len(own) != 1 or names or not _is_of_words(node, outputs):
                return None
            names["bias"] = own[0].names["weight"]
            node = without_bias(node)
        else:
            place = _moved_back(node, place, outputs.shape[2])
            node = node.next_functions[0][0]
    if node is None or place is None or operation(node) not in ("Addmm", "Mm"):
        return None
    names |= {role: n for use in uses if use.nodes == (node,) for role, n in use.names.items()}
    tied = next((use for use in uses if node in use.nodes and use.shared is not None), None)
    if tied is not None and not _is_once_in(node, tied):
        return None
    if output_shape(node) != [place.numel(), outputs.shape[2]] or not _has_all(node, names, tied):
        return None
    order = torch.empty_like(place.flatten())
    order[place.flatten()] = torch.arange(place.numel(), device=order.device)
    return Head(outputs, node, order, names, tied, task)


def _is_a_term_a_row(outputs: Tensor, task: Task) -> bool:
    numbers = task.term_numbers(outputs)
    if numbers.stride(2):
        return False
    numbers = numbers[..., 0].flatten()
    return torch.equal(numbers, torch.arange(len(numbers), device=numbers.device))


def _is_of_words(node: Any, outputs: Tensor) -> bool:
    """Whether a bias that is added has an entry a word, and nothing else is added."""
    leaf = [n for n, _ in node.next_functions if hasattr(n, "variable")]
    return len(leaf) == 1 and leaf[0].variable.shape == outputs.shape[2:]


def _is_once_in(node: Any, tied: Use) -> bool:
    """Whether what has the layer's weight are embeddings but for this layer."""
    others = [operation(each) for each in tied.nodes if each is not node]
    return set(others) == {"Embedding"} and tied.names.keys() == {"weight"}


def _has_all(node: Any, names: dict[str, str], tied: Use | None) -> bool:
    """Whether every trainable operand is known, and what the rows below need is there."""
    inputs = [following for following, _ in node.next_functions]
    bias = inputs[0] if operation(node) == "Addmm" else None
    has_weight = tied is not None or "weight" in names
    X = node._saved_mat1 if operation(node) == "Addmm" else node._saved_self
    if X is None or node._saved_mat2 is None or not has_weight:
        return False
    if operation(node) == "Addmm" and not node._saved_alpha == node._saved_beta == 1:
        return False
    return bias is None or "bias" in names


def _moved_back(node: Any, place: Tensor, num_words: int) -> Tensor | None:
    """Numbers of the terms in the shape that they had before; None where words move too."""
    if operation(node) == "Transpose":
        num_dims = place.dim() + 1
        dims = [_signed(d) % num_dims for d in (node._saved_dim0, node._saved_dim1)]
        return None if num_dims - 1 in dims else place.transpose(*dims)
    if operation(node) == "Permute":
        dims = [_signed(d) % (place.dim() + 1) for d in node._saved_dims]
        if dims[-1] != place.dim():
            return None
        return place.permute([dims.index(d) for d in range(place.dim())])
    before = output_shape(node.next_functions[0][0])
    return place.reshape(before[:-1]) if before and before[-1] == num_words else None


def _signed(dim: int) -> int:
    """A dimension as it was given: autograd's saved ones are unsigned."""
    return dim - 2**64 if dim >= 2**63 else dim


Part = Callable[..., Tensor]
"""From some examples' outputs, a weight or None and what else belongs to them to (n, ...)."""


def in_parts(part: Part, outputs: Tensor, weight: Tensor | None, *constants: Tensor) -> Tensor:
    """A function of every example by itself, of some at a time, and again where differentiated.

    Args:
        part: Of outputs, weight and constants.
        outputs: (N, ...).
        weight: Shared by all.
        constants: (N, ...), of no gradient.
    """
    if is_recorded(outputs, *([] if weight is None else [weight])):
        found: Tensor = _InParts.apply(part, outputs, weight, *constants)
        return found
    return _by_parts(part, outputs, weight, constants)


def _by_parts(
    part: Part, outputs: Tensor, weight: Tensor | None, constants: Sequence[Tensor]
) -> Tensor:
    size = parts_of(outputs)
    pieces = zip(outputs.split(size), *(c.split(size) for c in constants), strict=True)
    return torch.cat([part(f, weight, *own) for f, *own in pieces])


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: Part, outputs: Tensor, weight: Tensor | None, *constants: Tensor
    ) -> Tensor:
        ctx.save_for_backward(outputs, weight, *constants)
        ctx.part = part
        return _by_parts(part, outputs, weight, constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        outputs, weight, *constants = ctx.saved_tensors
        size, needs = parts_of(outputs), ctx.needs_input_grad[1:3]
        of_outputs = torch.empty_like(outputs) if needs[0] else None
        of_weight = torch.zeros_like(weight) if needs[1] else None
        W = None if weight is None else weight.detach().requires_grad_(needs[1])
        for first in range(0, len(outputs), size):
            own = slice(first, first + size)
            with torch.enable_grad():
                f = outputs[own].detach().requires_grad_(needs[0])
                made = ctx.part(f, W, *(c[own] for c in constants))
                wanted = [t for t, n in zip((f, W), needs, strict=True) if n and t is not None]
                grads = list(torch.autograd.grad(made, wanted, slope[own]))
            if of_outputs is not None:
                of_outputs[own] = grads.pop(0)
            if of_weight is not None:
                of_weight += grads.pop(0)
        return None, of_outputs, of_weight, *(None for _ in constants)
