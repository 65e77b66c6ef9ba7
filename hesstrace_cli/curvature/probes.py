"""Random probe vectors v with E[v v^T] = I, dense or with dropped parts.

The dropout scheme of the paper draws entries from Q(p): +1 and -1 with probability p each and 0
with 1 - 2p, so E[v v^T] = 2p I. Here `keep_prob` is q = 2p, and every probe is divided by the
square root of its inclusion probability, so that v^T H v estimates tr(H) at every q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.tasks import Task

Scheme = Literal["none", "entry", "tensor", "block"]


def rademacher(like: Tensor, *, generator: Generator) -> Tensor:
    """Draw independent signs, +1 or -1 with probability 1/2, in the shape of `like`."""
    signs = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def balanced_signs(like: Tensor, *, generator: Generator) -> Tensor:
    """Signs for (N, C) outputs whose products of two classes cancel over the examples.

        e_ic = sigma_i s_c H[r(i), k(c)],   H Hadamard of order n = 2^k >= C

    with random signs sigma and s, random columns k, and rows r that are another permutation for
    every n examples. E[e_i e_i^T] = I and E[e_i e_j^T] = 0 as of independent signs, so that
    squared norms have the same mean, by example or of a sum. But sum_i e_i e_i^T = n I over n
    examples: what they have in common, sum_i e_i^T M e_i with one M, comes without noise. The
    first examples' signs do not depend on how many follow. Outputs of other shapes, and more than
    1024 classes, take independent signs.
    """
    order = 1 << (like.shape[-1] - 1).bit_length()
    if like.dim() != 2 or order > _LARGEST_ORDER:
        return rademacher(like, generator=generator)
    N, num_classes = like.shape

    def uniform() -> Tensor:
        return torch.rand(2, order, generator=generator, device=like.device)

    keys, halves = uniform()
    columns, s = keys.argsort()[:num_classes], halves[:num_classes] < 0.5
    blocks = [uniform() for _ in range(-(-N // order))]
    keys, halves = torch.stack(blocks, 1) if blocks else like.new_empty(2, 0, order)
    rows, sigma = keys.argsort(dim=1).flatten()[:N], halves.flatten()[:N] < 0.5
    odd = _is_odd(rows[:, None] & columns) ^ sigma[:, None] ^ s
    return 1 - 2 * odd.to(like.dtype)


_LARGEST_ORDER = 1024


def _is_odd(numbers: Tensor) -> Tensor:
    """Whether the number of ones among the ten lowest bits is odd: H[r, k] = -1 for r & k."""
    for shift in (8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return (numbers & 1).bool()


def num_kept(num_tensors: int, keep_prob: float) -> int:
    """The number of tensors k that the tensor scheme keeps: max(1, round(q T))."""
    return max(1, round(keep_prob * num_tensors))


class Inclusion(NamedTuple):
    """What a probe leaves out.

    Attributes:
        probability: With which it includes each entry.
        of_tensors: Whether it includes or leaves out the entries of a tensor together.
    """

    probability: float = 1.0
    of_tensors: bool = False


EVERYTHING = Inclusion()


def inclusion(params: Params, scheme: Scheme, keep_prob: float) -> Inclusion:
    """What the probes of `draw_keep` leave out."""
    if scheme == "none":
        return EVERYTHING
    if scheme == "entry":
        return Inclusion(keep_prob)
    share = num_kept(len(params), keep_prob) / len(params)
    return Inclusion(share, of_tensors=share < 1)


def draw_keep(
    params: Params, *, scheme: Scheme, keep_prob: float, generator: Generator
) -> dict[str, Tensor]:
    """Draw which parts of the parameters are kept, scaled by the inclusion probability.

    Args:
        params: The P parameter tensors by name.
        scheme: "none" keeps all; "entry" keeps each entry with probability q by its own coin
            (the paper's); "tensor" keeps exactly k = max(1, round(q T)) of the T tensors,
            drawn without replacement, each included with probability pi = k / T; "block" keeps k
            that follow each other (the first follows the last), with the same pi: the graph in
            front of them, half of the network on average, is spared.
        keep_prob: q in (0, 1].
        generator: Source of all randomness.

    Returns:
        For each kept tensor a factor s, a 0-dim tensor or of the tensor's shape, with
        E[s^2] = 1 in every entry (s = 0 where dropped): 1, mask / sqrt(q), or pi^(-1/2).
        Dropped tensors have no entry.

    Source:
        Liu, Yu, Lin, arXiv 2208.05924, the dropout scheme of SEHT-D.
    """
    if not 0 < keep_prob <= 1:
        raise ValueError(f"keep_prob is {keep_prob}, expected a number in (0, 1]")
    if scheme == "entry":
        return {name: _kept_entries(p, keep_prob, generator) for name, p in params.items()}
    names: Sequence[str] = list(params)
    scale = inclusion(params, scheme, keep_prob).probability ** -0.5
    if scheme in ("tensor", "block"):
        kept = num_kept(len(names), keep_prob)
        # On the generator's device; sorted, so that the order of work is the model's own.
        drawn = torch.randperm(len(names), generator=generator, device=generator.device)[:kept]
        if scheme == "block":
            drawn = (drawn[0] + torch.arange(kept, device=drawn.device)) % len(names)
        names = [names[i] for i in sorted(drawn.tolist())]
    # One factor for all, and none that is copied from the CPU, for which a GPU would be waited.
    kinds = {(params[name].dtype, params[name].device) for name in names}
    factors = {kind: torch.full((), scale, dtype=kind[0], device=kind[1])
               for kind in kinds}  # fmt: skip
    return {name: factors[params[name].dtype, params[name].device] for name in names}


def _kept_entries(like: Tensor, keep_prob: float, generator: Generator) -> Tensor:
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(keep_prob, generator=generator).mul_(keep_prob**-0.5)


def draw_probe(
    params: Params, *, scheme: Scheme = "none", keep_prob: float = 1.0, generator: Generator
) -> dict[str, Tensor]:
    """Draw a probe v with E[v v^T] = I: signs times the factors of `draw_keep`.

    Args:
        params: The parameter tensors by name.
        scheme: See `draw_keep`; "none" is Hutchinson's dense probe (SEHT-H).
        keep_prob: q in (0, 1]; without effect for "none".
        generator: Source of all randomness.

    Returns:
        The kept tensors' parts of v, by name; the others are zero and left out.
    """
    keep = draw_keep(params, scheme=scheme, keep_prob=keep_prob, generator=generator)
    return {
        name: factor * rademacher(params[name], generator=generator)
        for name, factor in keep.items()
    }


def draw_signs(
    outputs: Tensor, generator: Generator, rows: Tensor | None = None, num_examples: int = 0, *,
    balanced: bool = False,
) -> Tensor:  # fmt: skip
    """Signs for the outputs of some examples: those that they have in their batch.

    Args:
        outputs: Of the examples.
        generator: Source of all randomness; the same for all parts of a batch.
        rows: The examples' positions in their batch; None where they are the batch.
        num_examples: Of the batch, where they are a part of it.
        balanced: Take `balanced_signs`, not independent ones.
    """
    draw = balanced_signs if balanced else rademacher
    return _of_batch(draw, outputs, generator, rows, num_examples)


def uniform(like: Tensor, *, generator: Generator) -> Tensor:
    """Draw independent numbers from [0, 1) in the shape of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).uniform_(
        generator=generator
    )


def _of_batch(
    draw: Callable[..., Tensor], outputs: Tensor, generator: Generator, rows: Tensor | None,
    num_examples: int,
) -> Tensor:  # fmt: skip
    """What is drawn for these examples' outputs, the same however a batch comes in parts."""
    if rows is None:
        return draw(outputs, generator=generator)
    like = outputs.new_empty((num_examples, *outputs.shape[1:]))
    return draw(like, generator=generator)[rows.to(like.device, non_blocking=True)]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for a penalty in a step.

    Attributes:
        scheme: Which parts of the parameters are left out, see `draw_keep`.
        keep_prob: The probability that a part is kept, in (0, 1].
        num_probes: Samples a step.
        labels: Whether labels are drawn from the outputs' distribution, not signs.
    """

    scheme: Scheme = "none"
    keep_prob: float = 1.0
    num_probes: int = 1
    labels: bool = False

    def cotangent(
        self, outputs: Tensor, targets: Tensor, task: Task, generator: Generator,
        rows: Tensor | None = None, num_examples: int = 0,
    ) -> Tensor:  # fmt: skip
        """A random u for every term with E[u u^T] = A: B e for signs e, or of drawn labels.

        Args:
            outputs: Of the examples.
            targets: Of the same examples.
            task: Gives B and labels.
            generator: Source of all randomness; the same for all parts of a batch.
            rows: The examples' positions in their batch; None where they are the batch.
            num_examples: Of the batch, where they are a part of it.
        """
        if self.labels:
            noise = _of_batch(uniform, outputs, generator, rows, num_examples)
            return task.label_root(outputs, targets, noise)
        return task.root(outputs, targets, draw_signs(outputs, generator, rows, num_examples))

    def keep(self, params: Params, generator: Generator) -> dict[str, Tensor]:
        """The factors of `draw_keep`."""
        return draw_keep(
            params, scheme=self.scheme, keep_prob=self.keep_prob, generator=generator
        )  # fmt: skip

    def probe(self, params: Params, generator: Generator) -> dict[str, Tensor]:
        """The probe of `draw_probe`."""
        return draw_probe(
            params, scheme=self.scheme, keep_prob=self.keep_prob, generator=generator
        )  # fmt: skip
