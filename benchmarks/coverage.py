"""Do the 95 % intervals hold the truth, and how wide are they? Over many repetitions, by method.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --batches 1

A small network of three classes is trained for a few steps; H and G of every batch are written out,
so that the truth is known and thousands of repetitions take seconds. Probes, running means,
intervals and the stopping rule are the package's own; that its samplers draw the very samples that
are drawn here is a test (tests/curvature/test_coverage.py). Fixed are the passes, two probes a
batch in each, or the products; or the stopping rule ends it, at a tolerance that is reached after
about 3 and about 10 passes (24 and 48 products). Widths are in units of the normal interval's,
1.96 standard deviations of the estimates. The last column is the parameter tensor with the least
coverage in any of the settings.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from hesstrace_cli.analysis.estimation import LEAST_DEGREES
from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.curvature.probes import (
    EVERYTHING,
    Inclusion,
    Scheme,
    draw_keep,
    inclusion,
    rademacher,
)
from hesstrace_cli.curvature.statistics import Mean, StratifiedMean, Stratum
from hesstrace_cli.curvature.trace.estimators import Stop
from hesstrace_cli.curvature.trace.hutchpp import hutchpp
from hesstrace_cli.curvature.trace.xtrace import xtrace
from hesstrace_cli.reporting.layout import markdown_table
from hesstrace_cli.tasks.softmax import softmax_root

PROBES = 2
SCHEMES: tuple[Scheme, ...] = ("tensor", "block", "entry")
SKETCHES = {"hutch++": hutchpp, "xtrace": xtrace}


@dataclass(frozen=True)
class Problem:
    """A network whose curvature is written out.

    Attributes:
        params: Its T parameter tensors, P entries together.
        hessians: H of every batch, shape (B, P, P).
        roots: J_i^T B_i of every example, shape (B, N, P, C); G_i is this times its transpose.
    """

    params: dict[str, Tensor]
    hessians: Tensor
    roots: Tensor

    @property
    def sizes(self) -> list[int]:
        return [p.numel() for p in self.params.values()]

    @property
    def ggns(self) -> Tensor:
        return torch.einsum("bnpc,bnqc->bpq", self.roots, self.roots) / self.roots.shape[1]

    def traces(self, matrices: Tensor) -> Tensor:
        """The mean over the batches, of the whole and of the blocks, shape (T + 1,)."""
        blocks = matrices.diagonal(dim1=1, dim2=2).mean(0).split(self.sizes)
        parts = torch.stack([block.sum() for block in blocks])
        return torch.cat([parts.sum()[None], parts])


def trained_network(steps: int, examples: int, classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of one hidden layer, and examples of different sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, classes)).double()
        X = torch.randn(examples, 8, dtype=torch.float64)
        X = X * torch.rand(examples, 1, dtype=torch.float64) * 2
        y = torch.randint(0, classes, (examples,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model, X, y


def written_out(model: nn.Module, X: Tensor, y: Tensor, batches: int) -> Problem:
    """The curvature of every batch, by PyTorch's own derivatives."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.flatten() for p in params.values()])

    def logits(flat: Tensor, X: Tensor) -> Tensor:
        parts = zip(params.items(), flat.split(sizes), strict=True)
        own = {name: part.view_as(p) for (name, p), part in parts}
        return functional_call(model, own, (X,))

    hessians, roots = [], []
    for own_X, own_y in zip(X.chunk(batches), y.chunk(batches), strict=True):

        def loss(w: Tensor, X: Tensor = own_X, y: Tensor = own_y) -> Tensor:
            return F.cross_entropy(logits(w, X), y)

        def own_logits(w: Tensor, X: Tensor = own_X) -> Tensor:
            return logits(w, X)

        hessians.append(torch.autograd.functional.hessian(loss, flat))
        jacobian = torch.autograd.functional.jacobian(own_logits, flat)
        eye = torch.eye(jacobian.shape[1], dtype=flat.dtype)
        B = softmax_root(own_logits(flat)[:, None], eye)  # row c of example i: B_i e_c
        roots.append(torch.einsum("nkc,ncp->npk", B, jacobian))
    return Problem(params, torch.stack(hessians), torch.stack(roots))


Draw = Callable[[int, int, int, Generator], Tensor]
"""From a batch's number, m, R and a generator to the samples of R repetitions, (m, E, R, T + 1)."""


def kept_factors(
    params: Params, scheme: Scheme, keep_prob: float, draws: int, generator: Generator
) -> Tensor:
    """The factors of `draw_keep`, shape (draws, P)."""
    if scheme == "none":
        return torch.ones((), dtype=torch.float64)
    if scheme == "entry":
        many = {name: p.new_empty(draws, p.numel()) for name, p in params.items()}
        kept = draw_keep(many, scheme=scheme, keep_prob=keep_prob, generator=generator)
        return torch.cat(list(kept.values()), 1)
    rows = []
    for _ in range(draws):
        kept = draw_keep(params, scheme=scheme, keep_prob=keep_prob, generator=generator)
        rows.append([float(kept[name]) if name in kept else 0.0 for name in params])
    sizes = torch.tensor([p.numel() for p in params.values()])
    return torch.tensor(rows, dtype=torch.float64).repeat_interleave(sizes, 1)


def by_probes(
    problem: Problem, matrices: Tensor, scheme: Scheme = "none", keep_prob: float = 1.0
) -> Draw:
    """v_t^T (A v)_t for the matrix A of a batch, and its sum over the tensors t."""

    def draw(batch: int, m: int, repeats: int, generator: Generator) -> Tensor:
        size = sum(problem.sizes)
        keep = kept_factors(problem.params, scheme, keep_prob, m * repeats, generator)
        v = rademacher(matrices.new_empty(m * repeats, size), generator=generator) * keep
        products = (v * (v @ matrices[batch])).split(problem.sizes, 1)
        parts = torch.stack([part.sum(1) for part in products], 1)
        samples = torch.cat([parts.sum(1, keepdim=True), parts], 1)
        return samples.reshape(m, 1, repeats, -1)

    return draw


_OF_OUTPUT_LAYER = 2  # its weight and bias come last, and are known in closed form


def by_signs(problem: Problem) -> Draw:
    """||(J_it)^T B_i e||^2 for every example i of a batch, e its own signs."""
    grams = torch.stack([r.mT @ r for r in problem.roots.split(problem.sizes, 2)])
    closed = grams[-_OF_OUTPUT_LAYER:].diagonal(dim1=-2, dim2=-1).sum(-1)

    def draw(batch: int, m: int, repeats: int, generator: Generator) -> Tensor:
        num_examples, classes = grams.shape[2], grams.shape[-1]
        like = grams.new_empty(m, num_examples, repeats, classes)
        e = rademacher(like, generator=generator)
        parts = torch.einsum("mnrc,tncd,mnrd->mnrt", e, grams[:, batch], e)
        parts[..., -_OF_OUTPUT_LAYER:] = closed[:, batch].T[None, :, None]
        return torch.cat([parts.sum(-1, keepdim=True), parts], -1)

    return draw


def with_control_variate(problem: Problem, *, signs: bool) -> Draw:
    """tr(G) of a batch, exactly or by signs, plus v^T (H - G) v."""
    residual = by_probes(problem, problem.hessians - problem.ggns)
    main = by_signs(problem)
    exact = torch.stack([problem.traces(G[None]) for G in problem.ggns])

    def draw(batch: int, m: int, repeats: int, generator: Generator) -> Tensor:
        part = exact[batch]
        if signs:
            part = main(batch, m, repeats, generator).mean(1, keepdim=True)
        return part + residual(batch, m, repeats, generator)

    return draw


@dataclass(frozen=True)
class Outcome:
    """What the intervals of many repetitions did.

    Attributes:
        coverage: The share that holds the truth, of the whole trace.
        layers: The least of those shares over the tensors, of the intervals that are known.
        half: The mean half-width.
        width: That over 1.96 times the standard deviation of the estimates.
        passes: The mean number of passes, or products.
    """

    coverage: float
    layers: float
    half: float
    width: float
    passes: float


def held(found: list[list[Mean]], truth: Tensor, passes: float) -> Outcome:
    """Judge the means of all repetitions, shape (R, T + 1)."""
    shares, scale = [], truth.abs().max().item()
    for column, true in zip(zip(*found, strict=True), truth.tolist(), strict=True):
        intervals = [interval for mean in column if (interval := mean.interval()) is not None]
        slack = 1e-9 * scale  # rounding, where a part has no spread
        hits = sum(low - slack <= true <= high + slack for low, high in intervals)
        shares.append(hits / len(intervals) if intervals else 1.0)
    totals = [row[0] for row in found]
    spread = torch.tensor([mean.value for mean in totals]).std().item()
    ends = [mean.interval() or (math.nan, math.nan) for mean in totals]
    half = sum(high - low for low, high in ends) / 2 / len(ends)
    return Outcome(shares[0], min(shares[1:]), half, half / (1.96 * spread), passes)


def repeated(
    draw: Draw,
    truth: Tensor,
    batches: int,
    *,
    stop: Stop,
    repeats: int,
    kept: Inclusion,
    seed: int,
) -> Outcome:
    """Repetitions side by side: to the running mean they are so many more quantities."""
    generator = Generator().manual_seed(seed)
    running = StratifiedMean(inclusion=Inclusion(kept.probability))
    found: dict[int, list[Mean]] = {}
    total_passes = 0
    passes = 0
    while len(found) < repeats:
        passes += 1
        for batch in range(batches):
            samples = draw(batch, PROBES, repeats, generator)
            running.add(batch, 1 / batches, samples.flatten(2))
        columns = len(truth)
        totals = stop.judged(running.means()[::columns])
        for number, total in enumerate(totals):
            if number not in found and stop.reached(total, passes, 0.0):
                own = slice(number * columns, (number + 1) * columns)
                found[number] = stop.judged(of_columns(running, own, kept).means())
                total_passes += passes
    return held(list(found.values()), truth, total_passes / repeats)


def of_columns(running: StratifiedMean, columns: slice, kept: Inclusion) -> StratifiedMean:
    """The running mean of one repetition."""
    own = {
        number: Stratum(
            s.count, torch.as_tensor(s.mean)[:, columns], torch.as_tensor(s.squares)[:, columns]
        )
        for number, s in running.batches.items()
    }
    included = torch.as_tensor(running.included)[columns]
    return StratifiedMean(False, kept, own, running.weights, included, running.count)


def sketched(
    method: str, problem: Problem, matrices: Tensor, *, stop: Stop, first: int, repeats: int,
    seed: int,
) -> Outcome:  # fmt: skip
    """Hutch++ or XTrace on the matrix over all batches, the products doubled as `estimate` does."""
    matrix, like = matrices.mean(0), matrices[0, 0]
    generator = Generator().manual_seed(seed)
    found, products = [], 0
    for _ in range(repeats):
        m, used = first, 0
        while True:
            drawn = SKETCHES[method](
                matrix, like, problem.sizes, num_products=m, generator=generator
            )
            own, used = stop.judged(drawn), used + m
            if stop.reached(own[0], used + m, 0.0, LEAST_DEGREES):
                break
            m *= 2
        found.append(own)
        products += used
    return held(found, problem.traces(matrices), products / repeats)


FIXED = {"2 passes": 2, "8 passes": 8}
TOLERANCES = {"to ~3 passes": 3, "to ~10 passes": 10}


def settings_of(draw: Draw, truth: Tensor, batches: int) -> dict[str, Stop]:
    """The stopping rules, with tolerances by the spread that a pass has."""
    generator = Generator().manual_seed(0)
    parts = [draw(b, PROBES, 1000, generator).mean((0, 1)) for b in range(batches)]
    spread = (torch.stack(parts).mean(0)[:, 0].std() / truth[0].abs()).item()
    rules = {name: Stop(0.0, max_passes=passes) for name, passes in FIXED.items()}
    for name, passes in TOLERANCES.items():
        rules[name] = Stop(1.96 * spread / math.sqrt(passes), max_passes=200)
    return rules


def methods(problem: Problem) -> Iterator[tuple[str, Draw, Tensor, Inclusion]]:
    """Name, samples, matrices and inclusion probability of every method that works by batches."""
    for name, matrices in (("H", problem.hessians), ("G", problem.ggns)):
        yield f"hutchinson, {name}", by_probes(problem, matrices), matrices, EVERYTHING
        for scheme, q in itertools.product(SCHEMES, (0.5, 0.2)):
            kept = inclusion(problem.params, scheme, q)
            draw = by_probes(problem, matrices, scheme, q)
            yield f"dropout {scheme} {q}, {name}", draw, matrices, kept
    yield (
        "exact+hutchinson, H",
        with_control_variate(problem, signs=False),
        problem.hessians,
        EVERYTHING,
    )
    yield (
        "signs+hutchinson, H",
        with_control_variate(problem, signs=True),
        problem.hessians,
        EVERYTHING,
    )
    yield "signs, G", by_signs(problem), problem.ggns, EVERYTHING


def outcomes(
    problem: Problem, repeats: int, seed: int = 0, only: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """Every method, or these alone, in every setting."""
    batches = len(problem.hessians)
    for name, draw, matrices, kept in methods(problem):
        if only is not None and name not in only:
            continue
        truth = problem.traces(matrices)
        rules = settings_of(draw, truth, batches)
        yield (
            name,
            {
                setting: repeated(
                    draw, truth, batches, stop=stop, repeats=repeats, kept=kept, seed=seed
                )
                for setting, stop in rules.items()
            },
        )


SKETCH_SETTINGS = {"12 products": 12, "24 products": 24}
SKETCH_TOLERANCES = {"to ~24 products": 24, "to ~48 products": 48}


def sketch_outcomes(
    problem: Problem, repeats: int, seed: int = 0, only: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """The same for the methods that work on the matrix over all batches."""
    pairs = (("H", problem.hessians), ("G", problem.ggns))
    for method, (name, matrices) in itertools.product(SKETCHES, pairs):
        if only is not None and f"{method}, {name}" not in only:
            continue
        found = {}
        truth = problem.traces(matrices)[0].item()
        for setting, products in SKETCH_SETTINGS.items():
            found[setting] = sketched(
                method, problem, matrices, stop=Stop(None), first=products, repeats=repeats,
                seed=seed,
            )  # fmt: skip
        for setting, products in SKETCH_TOLERANCES.items():
            pilot = sketched(
                method, problem, matrices, stop=Stop(None), first=products, repeats=100, seed=1
            )
            found[setting] = sketched(
                method, problem, matrices, stop=Stop(pilot.half / abs(truth), max_passes=400),
                first=12, repeats=repeats, seed=seed,
            )  # fmt: skip
        yield f"{method}, {name}", found


def table(found: Iterator[tuple[str, dict[str, Outcome]]]) -> str:
    """A row a method: coverage in percent (width), or (passes, width) where a rule stopped it."""
    rows: list[list[str]] = []
    head: list[str] = []
    for name, own in found:
        cells = []
        for setting, outcome in own.items():
            more = f"{outcome.passes:.0f}, " if setting.startswith("to") else ""
            cells.append(f"{100 * outcome.coverage:.1f} ({more}{outcome.width:.2f})")
        least = min(outcome.layers for outcome in own.values())
        rows.append([name, *cells, f"{100 * least:.1f}"])
        head = ["method", *own, "a layer, at least"]
    return markdown_table(head, rows)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--sketch-repeats", type=int, default=400, help="of Hutch++ and XTrace")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = trained_network(arguments.steps, arguments.examples, classes=3)
    problem = written_out(*network, arguments.batches)
    print(f"{arguments.batches} batches, {sum(problem.sizes)} weights, {arguments.steps} steps\n")
    print(table(outcomes(problem, arguments.repeats)))
    print()
    print(table(sketch_outcomes(problem, arguments.sketch_repeats)))


if __name__ == "__main__":
    main()
