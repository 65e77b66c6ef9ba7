"""tr(G) without probes in weight space, and small Hessians' whole diagonals.

    tr(G) = (1/M) sum_i sum_k || J_i^T u_ik ||^2,   sum_k u_ik u_ik^T = A_i

The task's K columns u_k, a backward pass each, give it exactly; one with u_i = B_i e_i for random
signs e, E[e e^T] = I, gives it without bias and with little variance over many examples. The
blocks of a linear output layer need neither (`output_layer`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.graph import Params, gradient
from hesstrace_cli.curvature.detached import CutWatch, check_attached
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.head import Head, find_head, in_parts, parts_of
from hesstrace_cli.curvature.per_example.independence import Unfit, check_independence, check_others
from hesstrace_cli.curvature.per_example.linearity import why_not_linear
from hesstrace_cli.curvature.per_example.norms import (
    check_layouts,
    differentiated_norms,
    gradients,
    rule_norms,
)
from hesstrace_cli.curvature.per_example.output_layer import output_layer
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms, output_shape
from hesstrace_cli.curvature.per_example.uses import Use, find_uses
from hesstrace_cli.curvature.probes import rademacher


class Curved(Unfit):
    """The outputs are not piecewise linear in the weights, so that tr(H) is not tr(G)."""


ACTIVATIONS = 1 << 27
"""Numbers in the outputs of all operations together, of the examples that are worked on at once."""


_Part = tuple[Tensor, Tensor, tuple[int, int] | None]  # X, y, its place among all of them


class PerExampleTrace:
    """The blocks' traces of every example's G_i = J_i^T A_i J_i, in the model's own mode.

    A batch is examined as it is used, since what a model executes may differ from one to the next:
    whether examples touch each other, which rows of an operation belong to which example and, if
    asked for, whether tr(H) = tr(G).

    Args:
        objective: The mean loss that G is of.
        X: A few examples, for the more thorough checks.
        linear: Whether outputs that are not piecewise linear in the weights are refused.
        curved: Gives of inputs the outputs at which A is taken, as those of other weights; where
            it is None they are the model's own.

    Attributes:
        is_closed: Whether the output layer is all that there is, so that no columns are needed.
        linear_blocks: Parameters that the outputs of the last batch sampled are linear in, those of
            an output layer that was taken apart.

    Raises:
        Unfit: If the outputs of an example depend on the others in its batch, or are curved; so do
            the methods.
    """

    def __init__(
        self, objective: Objective, X: Tensor, *, linear: bool = False,
        curved: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.objective = objective
        self.linear = linear
        self._curved = curved
        self.linear_blocks: frozenset[str] = frozenset()
        self._examined: dict[tuple[tuple[int, int], bool], dict[str, Layout]] = {}
        check_independence(self._outputs, X, Generator(X.device).manual_seed(0))
        found = self._found(self._outputs(X))
        self._check_linear(found.outputs)
        self._layouts = found.layouts(apart=False)
        self.is_closed = found.squares().keys() == objective.params.keys()
        self._by_row = {  # those with a row an example
            name for use in found.uses if use.rows_at == (len(X),) and len(X) > 1
            for name in use.names.values() if name in self._layouts
        }  # fmt: skip
        made = sum(math.prod(output_shape(node)) for use in found.uses for node in use.nodes)
        self._at_once = max(1, ACTIVATIONS * len(X) // max(1, made))

    def _outputs(self, X: Tensor) -> Tensor:
        # The model's own operations: their first derivatives, all that is needed, are right.
        return native_outputs(self.objective.model, X)

    def _watched(self, X: Tensor) -> tuple[_Found, bool]:
        """A pass, and whether a value that was taken off the graph is used for its outputs."""
        with CutWatch() as watch:
            outputs = self._outputs(X)
        return self._found(outputs), watch.found

    def _at(self, X: Tensor, found: _Found) -> Tensor:
        """The outputs at which A is taken."""
        return found.outputs.detach() if self._curved is None else self._curved(X).detach()

    def _found(self, outputs: Tensor) -> _Found:
        uses = find_uses(outputs, self.objective.params)
        return _Found(self.objective, outputs, uses, find_head(outputs, uses, self.objective.task))

    def _check_linear(self, outputs: Tensor) -> None:
        problem = why_not_linear(outputs, self.objective.params) if self.linear else None
        if problem is not None:
            raise Curved(problem)

    def without_rule(self) -> list[str]:
        """The parameters that have to be differentiated example by example."""
        return [name for name in self.objective.params if name not in self._layouts]

    def exact(self, X: Tensor, y: Tensor, number: int | None = None) -> Tensor:
        """M times each example's part of the blocks' traces, (N, T), a backward pass a column.

        Args:
            X: The batch.
            y: Its targets.
            number: Of the batch, if it comes again: it is then examined only once.
        """
        return torch.cat([self._exact(*part) for part in self._parts(X, y, number)])

    def _parts(self, X: Tensor, y: Tensor, number: int | None) -> Iterator[_Part]:
        size = self._at_once
        for index, (X_part, y_part) in enumerate(zip(X.split(size), y.split(size), strict=True)):
            yield X_part, y_part, None if number is None else (number, index)

    def _exact(self, X: Tensor, y: Tensor, key: tuple[int, int] | None) -> Tensor:
        found, is_cut = self._watched(X)
        layouts = self._examine(X, key, found, is_cut)
        at = self._at(X, found)
        closed = found.closed(y, at)
        total = self._stacked(closed, len(X))
        if closed.keys() == self.objective.params.keys():
            return total
        cotangents = self.objective.task.columns(at, y)
        if not len(cotangents):  # a softmax of one class is constant
            return total
        return total + self._blocks(X, found, cotangents, layouts, closed).sum(0)

    def sample(
        self, X: Tensor, y: Tensor, num_samples: int, generator: Generator,
        number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Unbiased samples of them, shape (num_samples, N, T), a backward pass each."""
        parts, linear = [], set(self.objective.params)
        for X_part, y_part, key in self._parts(X, y, number):
            found, is_cut = self._watched(X_part)
            linear &= set() if found.head is None else set(found.head.names.values())
            apart = self._examine(X_part, key, found, is_cut, apart=True)
            if found.head is not None and (
                found.head.tied is None or found.head.tied_name in apart
            ):
                parts.append(
                    self._below(found, found.head, apart, X_part, y_part, num_samples, generator)
                )
                continue
            layouts = apart if found.head is None else found.layouts(apart=False)
            at = self._at(X_part, found)
            closed = found.closed(y_part, at)
            signs = rademacher(at.expand(num_samples, *at.shape), generator=generator)
            cotangents = [self.objective.task.root(at, y_part, e) for e in signs]
            own = self._blocks(X_part, found, torch.stack(cotangents), layouts, closed)
            parts.append(own + self._stacked(closed, len(X_part)))
        self.linear_blocks = frozenset(linear)
        return torch.cat(parts, 1)

    def _below(
        self, found: _Found, head: Head, layouts: dict[str, Layout], X: Tensor, y: Tensor,
        num_samples: int, generator: Generator,
    ) -> Tensor:  # fmt: skip
        """The samples where the output layer is taken apart: no signs of all examples at once."""
        at = self._at(X, found)
        head = replace(head, outputs=at)

        def signs(part: slice) -> Tensor:
            return rademacher(at[part], generator=generator)

        tied = None if head.tied is None else layouts[head.tied_name]
        uses = [use for use in head.below(found.uses) if layouts.keys() >= set(use.names.values())]
        rows = []
        for _ in range(num_samples):
            with torch.no_grad():
                u, words, of_terms = head.pulled(y, signs, tied)
            each = [*uses, *words]
            rows.append(rule_norms(each, gradients(head.hidden, each, u), layouts))
        norms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        closed = head.closed(of_terms)
        rest = {n: p for n, p in self.objective.params.items() if n not in norms | closed}
        if rest:
            norms |= self._differentiated(rest, X, y, num_samples, generator)
        return self._stacked(norms, num_samples, len(X)) + self._stacked(closed, len(X))

    def _differentiated(
        self, rest: Params, X: Tensor, y: Tensor, num_samples: int, generator: Generator
    ) -> Norms:
        """What has no rule, some examples at a time."""
        task, outputs_of, pieces = self.objective.task, self.objective.outputs, []
        size = parts_of(self._outputs(X[:1]))
        for X_part, y_part in zip(X.split(size), y.split(size), strict=True):
            at = (self._curved or self._outputs)(X_part).detach()
            signs = (rademacher(at, generator=generator) for _ in range(num_samples))
            cotangents = torch.stack([task.root(at, y_part, e) for e in signs])
            pieces.append(differentiated_norms(outputs_of, rest, X_part, cotangents))
        return {name: torch.cat([piece[name] for piece in pieces], 1) for name in rest}

    def _blocks(
        self, X: Tensor, found: _Found, cotangents: Tensor, layouts: dict[str, Layout],
        closed: Norms,
    ) -> Tensor:  # fmt: skip
        """The squared norms for each cotangent, (K, N, T); 0 for the blocks in closed form."""
        objective, outputs = self.objective, found.outputs
        uses = [use for use in found.uses if closed.keys().isdisjoint(use.names.values())]
        uses = [use for use in uses if layouts.keys() >= set(use.names.values())]
        rows = [rule_norms(uses, gradients(outputs, uses, u), layouts) for u in cotangents]
        norms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        done = norms.keys() | closed.keys()
        rest = {name: p for name, p in objective.params.items() if name not in done}
        if rest:
            norms |= differentiated_norms(objective.outputs, rest, X, cotangents)
        return self._stacked(norms, *cotangents.shape[:2])

    def _stacked(self, norms: Norms, *shape: int) -> Tensor:
        """By parameter in the last dimension, 0 for those that are not in it: (..., T)."""
        params = self.objective.params
        zeros = next(iter(params.values())).new_zeros(shape)
        return torch.stack([norms.get(n, zeros).detach() for n in params], -1).double()

    def _examine(
        self, X: Tensor, key: tuple[int, int] | None, found: _Found, is_cut: bool, *,
        apart: bool = False,
    ) -> dict[str, Layout]:  # fmt: skip
        """The layouts of a batch, once it is known to fit; see `_Found.layouts`."""
        if key is not None and (key, apart) in self._examined:
            return self._examined[key, apart]
        try:
            check_others(
                self._outputs, X, found.outputs.detach(), Generator(X.device).manual_seed(0)
            )
            self._check_linear(found.outputs)
            if is_cut:
                check_attached(self.objective, X)
        except Unfit as problem:
            if key is None:
                raise
            raise type(problem)(f"{problem} (in batch {key[0] + 1})") from None
        certain = {
            name: Layout(len(X)) for use in found.uses for name in use.names.values()
            if use.rows_at == (len(X),) and name in self._by_row
        }  # fmt: skip
        layouts = certain | found.layouts(apart=apart, but=certain.keys())
        if key is not None:
            self._examined[key, apart] = layouts
        return layouts


@dataclass(frozen=True)
class _Found:
    """A forward pass and what has rules in it.

    Attributes:
        objective: The mean loss.
        outputs: With their graph.
        uses: Of `find_uses`.
        head: Of `find_head`.
    """

    objective: Objective
    outputs: Tensor
    uses: Sequence[Use]
    head: Head | None

    def squares(self) -> Norms:
        """The output layer's ||h||^2 of every term by name, as `output_layer`."""
        if self.head is not None:
            return self.head.squares()
        return output_layer(self.outputs, self.uses, self.objective.params, self.objective.task)

    def closed(self, y: Tensor, at: Tensor) -> Norms:
        """Each example's part of the output layer's blocks, (N,) by name, A taken at outputs."""
        squares = self.squares()
        if not squares:
            return {}
        task = self.objective.task
        traces = in_parts(lambda f, _, t: task.curvature_traces(f, t), at, None, y).flatten()
        return {n: (s * traces).reshape(len(at), -1).sum(1) for n, s in squares.items()}

    def layouts(self, *, apart: bool, but: Collection[str] = ()) -> dict[str, Layout]:
        """Which rows belong to which example, by name.

        Args:
            apart: Whether those of the output layer are not asked for, of which a tied weight's
                may be others; they cost most.
            but: Names that need not be looked at.
        """
        if not apart or self.head is None:
            uses = [use for use in self.uses if not set(but) >= set(use.names.values())]
            return check_layouts(self.outputs, uses)
        uses = [*self.head.below(self.uses), *self.head.embeddings()]
        uses = [use for use in uses if not set(but) >= set(use.names.values())]
        return check_layouts(self.head.hidden, uses, self.head.examples)


def hessian_diagonal_traces(objective: Objective, X: Tensor, y: Tensor) -> Tensor:
    """Tr of every diagonal block of the batch's H, shape (T,), from one product H e_j a weight."""
    params = objective.params
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    traces = []
    for name, p in params.items():
        total = torch.zeros((), dtype=torch.float64, device=p.device)
        for index in range(p.numel()):
            column = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            column[index] = 1
            product = hvp(grad, params, {name: column.view(p.shape)})[name]
            total += product.detach().flatten()[index]
        traces.append(total)
    return torch.stack(traces)
