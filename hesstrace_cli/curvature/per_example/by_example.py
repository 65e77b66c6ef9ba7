"""Samples of tr(G) that are sums over the examples of squared norms, to be differentiated.

    M t = sum_m ||h_m||^2 tr(A_m) + sum_i || s * J_i^T u_i ||^2 + || s * sum_i J_i^T u_i ||^2

with u_m = B_m e_m for random signs e_m, E[e_m e_l^T] = I where m = l and 0 elsewhere: the first
sum for the output layer, in closed form; the second for all tensors that have a rule in the
registry, run with the graph of what autograd has saved; the third for the others. E[t] = tr(G) of
each, as cross terms between terms vanish; the second lacks those between examples, which are most
of the third's noise.

Through batch norm in training mode the sample is of the network with the batch's statistics as
constants; its gradient is that of this value, the statistics moving with the weights.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.differentiable import held_statistics
from hesstrace_cli.autodiff.graph import Params, topological
from hesstrace_cli.curvature.per_example.head import Head, find_head
from hesstrace_cli.curvature.per_example.norms import check_layouts
from hesstrace_cli.curvature.per_example.output_layer import output_layer
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms
from hesstrace_cli.curvature.per_example.uses import Use, find_uses
from hesstrace_cli.curvature.probes import Draws, draw_signs
from hesstrace_cli.tasks import Task


@dataclass(frozen=True)
class Way:
    """How a parameter's part of the sample is taken.

    Attributes:
        kind: "closed", "example" or "batch".
        operation: Or layer, that has the rule.
        strided: Of the layout of its rows.
        single: Whether there is one row an example, so that nothing is known of the layout.
        reason: Why it is not by example.
        tied: Whether it is a table that several operations take.
    """

    kind: str
    operation: str = ""
    strided: bool = False
    single: bool = False
    reason: str = ""
    tied: bool = False

    def fits(self, use: Use, num_examples: int) -> bool:
        """Whether an operation is the one that was looked at."""
        if self.kind != "example" or any(rows % num_examples for rows in use.rows_at):
            return False
        if self.single:  # whatever it is called: batch norm is another one where it is synced
            return use.rows_at == (num_examples,)
        return self.operation == use.kind


class ByExample:
    """Samples of tr(G) from the graph of a forward pass within `differentiable_ops`.

    It must have been called with `order=2, by_example=True` if there is batch norm in it. Which
    parameter takes which way is found out on the first batch, by two backward passes, and kept for
    passes of the same operations: others, behind the model too, may let examples touch each other.

    Attributes:
        ways: By the parameters' names, in the last pass; empty before the first batch.
    """

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {}
        self._known: dict[int, tuple[dict[str, Way], bool]] = {}

    def examine(self, outputs: Tensor, params: Params, task: Task) -> None:
        """Find out which way each parameter takes.

        An example's rows must have a gradient from its own outputs alone, the statistics of batch
        norms held: where examples touch each other in a model, the layers in front of that place
        take the whole-batch form.

        Args:
            outputs: Of some examples, more than one, with their graph.
            params: The parameters by name.
            task: Says which outputs make up a term.
        """
        uses = find_uses(outputs, params)
        head = find_head(outputs, uses, task)
        with held_statistics():
            if head is None:
                closed = set(output_layer(outputs, uses, params, task))
                uses = [use for use in uses if not closed >= set(use.names.values())]
                layouts = check_layouts(outputs, uses)
            else:
                closed, uses = set(head.names.values()), [*head.below(uses), *head.embeddings()]
                layouts = check_layouts(head.hidden, uses, head.examples)
        self.ways = {name: Way("closed") for name in closed}
        for use in uses:
            for name in use.names.values():
                if name in self.ways:
                    continue
                if name not in layouts:
                    reason = "examples touch each other"
                    self.ways[name] = Way("batch", reason=reason)
                    continue
                single = use.rows_at == (len(outputs),)
                strided, tied = layouts[name].strided, not use.takes_entries
                self.ways[name] = Way("example", use.kind, strided, single, tied=tied)
        for name in params.keys() - self.ways.keys():
            self.ways[name] = Way("batch", reason="used twice, or in an operation without a rule")
        self._known[_operations(outputs)] = self.ways, len(outputs) == 1

    @property
    def is_batch(self) -> bool:
        """Whether no parameter goes by example, nor in closed form."""
        return all(way.kind == "batch" for way in self.ways.values())

    def taken(self, draws: Draws) -> dict[str, Way]:
        """The ways that are taken with what is drawn: dropped entries of a tied table have no rule.

        To scale them one by one, every example's gradient over all words would be made.
        """
        rest = Way("batch", reason="entries of a tied table are dropped")
        return {
            name: rest if draws.scheme == "entry" and way.tied else way
            for name, way in self.ways.items()
        }

    def described(self, draws: Draws) -> str:
        """How many tensors go which way, and why."""
        ways = self.taken(draws)
        counts = Counter(way.kind for way in ways.values())
        parts = [f"{counts['example']} of {len(ways)} tensors by example"]
        if counts["closed"]:
            parts.append(f"{counts['closed']} in closed form")
        for reason in dict.fromkeys(w.reason for w in ways.values() if w.kind == "batch"):
            names = [n for n, way in ways.items() if way.reason == reason]
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} of the whole batch as {reason} ({listed})")
        return "; ".join(parts)

    def samples(
        self, outputs: Tensor, params: Params, task: Task, targets: Tensor, *,
        draws: Draws, generator: Generator, rows: Tensor | None = None, num_examples: int = 0,
        num_terms: float | None = None, hold: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        """Samples t of these examples, one a probe, 0-dim with a graph to all parameters.

        Tensors in closed form have no noise and cost next to nothing, so none of them is dropped.

        Args:
            outputs: Of N examples, with their graph.
            params: The parameters w by name.
            task: Gives A and B.
            targets: Of the same examples.
            draws: What is drawn.
            generator: Source of all randomness; the same for all parts of a batch.
            rows: The examples' positions in their batch; None where they are the batch.
            num_examples: Of the batch, where they are a part of it.
            num_terms: M, if not that of the targets.
            hold: Whether A counts as constant where they are differentiated.
        """
        self.ways, is_of_one = self._known.get(_operations(outputs), ({}, True))
        if not self.ways or (is_of_one and len(outputs) > 1):
            self.examine(outputs, params, task)
        num_terms = num_terms or task.divisor(targets)
        uses = find_uses(outputs, params)
        head = self._head(outputs, uses, task, draws)
        at = outputs.detach() if hold else outputs
        closed, missed = None, dict[str, Tensor]()
        if head is None:
            closed, missed = self._closed(outputs, at, uses, params, task, targets)
        rest = {name: p for name, p in params.items() if self.ways[name].kind != "closed"}
        if head is not None and not rest:
            closed = _total(head.closed(head.traces(targets, hold=hold)))
        samples = []
        for _ in range(draws.num_probes if rest or missed else 1):
            parts = [] if closed is None else [closed]
            if rest or missed:
                keep = missed | draws.keep(rest, generator)
                signs = draw_signs(outputs, generator, rows, num_examples, balanced=True)
                if head is None:
                    cotangent = task.root(at, targets, signs)
                    parts += self._squares(outputs, len(outputs), uses, params, cotangent, keep)
                else:
                    parts += self._below(head, uses, params, targets, signs, keep, hold)
            samples.append(torch.stack(parts).sum() / num_terms)
        return samples

    def _head(self, outputs: Tensor, uses: list[Use], task: Task, draws: Draws) -> Head | None:
        """The output layer, if what else has its weight goes by example too."""
        head = find_head(outputs, uses, task)
        if head is None or head.tied is None:
            return head
        by_example = self.ways[head.tied_name].kind == "example"
        return head if by_example and draws.scheme != "entry" else None

    def _below(
        self, head: Head, uses: list[Use], params: Params, targets: Tensor, signs: Tensor,
        keep: Params, hold: bool,
    ) -> list[Tensor]:  # fmt: skip
        """The output layer's part, and the squared norms of all below it."""
        N, layout = len(head.outputs), None
        kept = signs.to(torch.int8)  # a quarter of the outputs
        if head.tied is not None:
            layout = Layout(N, self.ways[head.tied_name].strided)
        cotangent, words, traces = head.pulled(targets, kept.__getitem__, layout, hold=hold)
        below = [*head.below(uses), *words]
        squares = self._squares(head.hidden, N, below, params, cotangent, keep)
        return [_total(head.closed(traces)), *squares]

    def _closed(
        self, outputs: Tensor, at: Tensor, uses: list[Use], params: Params, task: Task,
        targets: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The output layer's part, and factors 1 for those of its tensors that are not found."""
        names = [name for name, way in self.ways.items() if way.kind == "closed"]
        found = output_layer(outputs, uses, params, task) if names else {}
        missed = {n: params[n].new_ones(()) for n in names if n not in found}
        squares = [found[name] for name in names if name in found]
        if not squares:
            return outputs.new_zeros(()), missed
        traces = task.curvature_traces(at, targets).flatten()
        return (torch.stack(squares).sum(0) * traces).sum(), missed

    def _squares(
        self, outputs: Tensor, N: int, uses: list[Use], params: Params, cotangent: Tensor,
        keep: Params,
    ) -> list[Tensor]:  # fmt: skip
        """The squared norms of the kept tensors, summed over the N examples."""
        chosen: list[tuple[Use, dict[str, Tensor]]] = []
        for use in uses:
            own = {
                n: keep[n] for n in use.names.values() if n in keep and self.ways[n].fits(use, N)
                and (use.takes_entries or not keep[n].dim())
            }  # fmt: skip
            if own:
                chosen.append((use, own))
        done = {name for _, own in chosen for name in own}
        whole = [name for name in keep if name not in done]
        edges = [edge for use, _ in chosen for edge in use.edges]
        at: list[Any] = [*edges, *(params[name] for name in whole)]
        squares: list[Tensor] = []

        def take(use: Use, own: dict[str, Tensor], grads: Sequence[Tensor]) -> None:
            layout = Layout(N, self.ways[next(iter(own))].strided)
            squares.extend(norms.sum() for norms in use.squares(grads, layout, own).values())

        with held_statistics(with_weights=bool(whole)), _on_the_way(chosen, take) as taken:
            grads = iter(torch.autograd.grad(
                outputs, at, cotangent, create_graph=True, materialize_grads=True
            ))  # fmt: skip
        for use, own in chosen:
            of_use = list(itertools.islice(grads, len(use.edges)))
            if id(use) not in taken:
                take(use, own, of_use)
        for name, g in zip(whole, grads, strict=True):
            squares.append((keep[name] * g).square().sum())
        return squares


def _total(norms: Norms) -> Tensor:
    return torch.stack(list(norms.values())).sum()


@contextmanager
def _on_the_way(
    chosen: list[tuple[Use, dict[str, Tensor]]],
    take: Callable[[Use, dict[str, Tensor], Sequence[Tensor]], None],
) -> Iterator[set[int]]:
    """Take the norms of an operation as soon as a backward pass has its output's gradient.

    Autograd goes through what was recorded last first. Were all norms taken after the pass, their
    derivatives would be there at once, and wait in memory for the gradients' own.

    Args:
        chosen: Operations, and what is passed with each.
        take: Takes their norms.

    Yields:
        The ids of those that the pass went through, and not up to only.
    """
    taken: set[int] = set()
    passed: dict[int, dict[int, Tensor]] = {}

    def hook(use: Use, own: dict[str, Tensor], place: int) -> Callable[[Any], None]:
        def run(grads: Any) -> None:
            g = grads[use.edges[place].output_nr]
            if g is None:
                return
            found = passed.setdefault(id(use), {})
            found[place] = g
            if len(found) == len(use.edges):
                taken.add(id(use))
                take(use, own, [found[n] for n in range(len(found))])
                found.clear()

        return run

    handles = [
        edge.node.register_prehook(hook(use, own, place))
        for use, own in chosen
        for place, edge in enumerate(use.edges)
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _operations(outputs: Tensor) -> int:
    """A number for the operations of a forward pass in their order; casts move no example."""
    names = (node.name() for node in topological(outputs))
    return hash(tuple(name for name in names if not name.startswith("ToCopy")))
