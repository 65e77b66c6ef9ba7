"""However a batch falls to the processes of a job, they meet at the same places: as one process."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.trace import estimators as trace
from hesstrace_cli.distributed.parallel import Ranks
from hesstrace_cli.errors import DataError, LostProcess, NumericsError, Stopped
from tests.conftest import make_run
from tests.jobs import joined, run_job
from tests.test_parts import assert_close

BATCH = 6
SIZES = (3, 2)
DETERMINISTIC = """
import torch
from hesstrace_cli.regularizers import Regularizer, Term

class Slope(Regularizer):
    order = 2

    def transform(self, X, targets, generator):
        return X.detach().requires_grad_(), targets

    def term(self, step):
        (g,) = torch.autograd.grad(step.outputs.square().sum(), step.X, create_graph=True)
        return Term(self.strength, g.square().sum() / len(step.X))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run whose batches have BATCH examples, then one less each.

    Attributes:
        settings: Of the run.
        equal: Whether several processes give the weights of one, to rounding.
    """

    settings: dict[str, object]
    equal: bool

    @property
    def name(self) -> str:
        """Its folder's."""
        return "-".join(f"{k}{v}" for k, v in self.settings.items()).replace("/", "+")


def _case(norm, accumulate, reg, equal=None, **more) -> Case:
    settings = {"norm": norm, "accumulate": accumulate, "reg": reg, **more}
    return Case(settings, (norm != "batch" or "sync_bn" in more) if equal is None else equal)


PENALTIES = {"ggn": "trace=0.01", "hessian": "trace=0.0001"}
CASES = [
    *(
        _case(norm, accumulate, PENALTIES[curvature], curvature=curvature)
        for norm, accumulate, curvature in itertools.product(
            ("none", "batch", "group"), (1, 2), PENALTIES
        )
    ),
    *(_case("batch", 1, PENALTIES[name], curvature=name, sync_bn=True) for name in PENALTIES),
    _case("batch", 1, "slope.py:Slope=0.1", sync_bn=True),
    _case("batch", 1, "jacobian=0.1,nso=0.01", False, sync_bn=True),
    _case("none", 2, "none"),
    _case("none", 2, "trace=0.01", every=2),
    _case("none", 2, "trace=0.01", warmup=0.9),
    _case("none", 2, "trace=0.01", draw="labels"),
    _case("none", 2, "trace=0.01", dropout_scheme="entry", num_probes=2),
    _case("group", 2, "trace=0.01", form="example", num_probes=2),
    _case("batch", 1, "trace=0.01", form="example", sync_bn=True),
    _case("batch", 1, "trace=0.01", False, form="example", penalty_examples=0.5, sync_bn=True),
    _case("none", 2, "slope.py:Slope=0.1,confidence=0.1,label-smoothing=0.1,trace=0.01"),
    _case("none", 2, "nso=0.01,mixup=0.2,cutout=2", False),
    _case("batch", 2, "trace=0.01,jacobian=0.1,dropout=0.2"),
]


def _stepped(case: Case, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights in float64 after each step, and at last what the epoch adds up."""
    settings = {**case.settings}
    norm = settings.pop("norm")
    run = make_run(
        folder / case.name,
        **{"model_arg": {"width": 3, "norm": norm}, "train_examples": 2 * BATCH, "epochs": 3,
           "batch_size": BATCH, "val_fraction": 0, "warmup": 0, "lr": 0.01, **settings},
    )  # fmt: skip
    run.trainer.model.double()
    train = dataclasses.replace(run.trainer.data.train, dtype=torch.float64)
    run.trainer.data = dataclasses.replace(run.trainer.data, train=train)
    after = []
    least = 2 if norm == "batch" else 1  # one example has no batch statistics
    for size in range(BATCH, least - 1, -1):
        (examples,) = run.trainer.examples([torch.arange(size)])
        run.trainer.take_step(examples)
        run.trainer.step += 1
        after.append({name: p.detach().clone() for name, p in run.trainer.model.named_parameters()})
    sums = run.trainer.reduce()
    figures = {"loss": sums.loss, "correct": sums.correct, "penalty": sums.penalty}
    after.append({**figures, "examples": torch.tensor(sums.examples), **_buffers(run)})
    return after


def _buffers(run):
    return {name: buffer.clone() for name, buffer in run.trainer.model.named_buffers()}


def _work(rank, ports):
    """All that the tests ask: first of three processes, then of two."""
    Path("slope.py").write_text(DETERMINISTIC)
    results = {}
    for size in SIZES:
        if rank < size:
            ranks = joined(rank, size, ports)
            for case in CASES:
                results[size, case.name] = _stepped(case, Path(f"of{size}"))
    if rank < 2:
        results |= {"halves": _in_halves(), "probes": _probes(ranks), "failures": _failures(ranks)}
    return results


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    return folder, run_job(max(SIZES), _work, folder)


def test_every_remainder_is_as_of_one_process(job, tmp_path):
    _, results = job
    (tmp_path / "slope.py").write_text(DETERMINISTIC)
    problems = []
    for case in CASES:
        whole = _stepped(case, tmp_path)
        for size in SIZES:
            own = [result[size, case.name] for result in results[:size]]
            for number, parts in enumerate(zip(whole, *own, strict=True)):
                try:
                    _compare(*parts, equal=case.equal)
                except AssertionError as problem:
                    said = " ".join(str(problem).split())[:200]
                    problems.append(f"{case.name} over {size}, {BATCH - number} examples: {said}")
    assert not problems, "\n".join(problems)


def _compare(whole, first, *others, equal):
    for other in others:
        assert_close(first, other, rtol=0, atol=0)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
    if equal:
        assert_close(whole, first, rtol=1e-12, atol=1e-13)


STOPPED = {
    "model_arg": {"width": 3}, "train_examples": 60, "batch_size": 12, "epochs": 2, "warmup": 0,
    "reg": "trace=0.01,dropout=0.2", "val_fraction": 0.2,
}  # fmt: skip


def _in_halves():
    """Two runs, one of them stopped in the middle of its last epoch."""
    states = []
    for name, stop in (("whole", None), ("halves", 6)):
        run = make_run(Path(name), **STOPPED)
        if stop is not None:
            with pytest.raises(Stopped):
                list(
                    run.advance(lambda run=run, stop=stop: 15 if run.trainer.step == stop else None)
                )
            run = make_run(Path(name), resume=True, **STOPPED)
            assert run.trainer.step == stop % run.trainer.total_steps
        list(run.advance())
        run.finish()
        states.append((dict(run.trainer.model.state_dict()), run.trainer.best_score))
    return states


def test_an_epoch_in_two_halves_is_counted_once(job):
    folder, results = job
    for (whole, best), (halves, best_again) in (result["halves"] for result in results[:2]):
        assert_close(whole, halves, rtol=0, atol=0)
        assert best == best_again > 0
    records = [
        [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
        for file in (folder / "whole" / "metrics.jsonl", folder / "halves" / "metrics.jsonl")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 2
    assert records[0][1]["penalty_trace"] > 0


def _probes(ranks):
    """Those of estimates over batches that are all the same, and what came out."""
    run = make_run(Path("estimated"), model_arg={"width": 3, "norm": "none"})
    drawn, real = [], trace.draw_probe

    def recorded(*args, **kwargs):
        probe = real(*args, **kwargs)
        drawn.append(torch.cat([part.flatten() for part in probe.values()]))
        return probe

    trace.draw_probe = recorded
    same = run.trainer.data.train.subset(torch.arange(10).repeat(8))
    config = EstimateConfig(method="hutchinson", num_probes=3, batch_size=10)
    values = [
        estimate(
            run.trainer.model, same, dataclasses.replace(config, seed=seed), ranks=ranks
        ).result
        for seed in (0, 0, 1)
    ]
    return torch.stack(drawn), [value.total.value for value in values]


def test_probes_differ_between_processes_and_repeat_with_the_seed(job):
    first, second = (result["probes"] for result in job[1][:2])
    assert first[1] == second[1]
    assert first[1][0] == first[1][1] != first[1][2]
    probes = [torch.unbind(drawn.view(3, -1, drawn.shape[1])) for drawn, _ in (first, second)]
    for once, again, _ in probes:
        torch.testing.assert_close(once, again, rtol=0, atol=0)
    distinct = torch.cat([own[i] for own in probes for i in (0, 2)])  # of two seeds
    products = distinct @ distinct.T / distinct.shape[1]
    off = products - torch.eye(len(distinct))
    assert off.abs().max() < 5 / distinct.shape[1] ** 0.5


def _failures(ranks):
    """What is heard where the second process fails, and after it; tensors of the first one."""
    rank, heard = ranks.rank, []

    def fail(problem):
        if rank == 1:
            raise problem
        yield rank

    for meet in (
        lambda: ranks.together(lambda: next(fail(DataError("gone")))),
        lambda: list(ranks.each(fail(NumericsError("inf")))),
        lambda: ranks.together(lambda: rank),
        lambda: list(ranks.each([rank])),
    ):
        try:
            heard.append(meet())
        except (DataError, NumericsError) as problem:
            heard.append(f"{type(problem).__name__} {problem}")
    own = [
        torch.tensor([rank == 0, True]), torch.tensor(1.0 + 2j) * (rank + 1), torch.zeros(0),
        torch.tensor(rank, dtype=torch.int16), torch.full((2, 3), float("nan") if rank else 1.0),
        torch.full((3, 2), rank, dtype=torch.float16).T,
    ]  # fmt: skip
    ranks.take_first_(own)
    heard.append(own)
    return heard


def test_what_fails_in_one_process_fails_in_all(job):
    for rank, heard in enumerate(result["failures"] for result in job[1][:2]):
        assert heard[:4] == ["DataError gone", "NumericsError inf", rank, [0, 1]]
        flags, number, nothing, short, ones, zeros = heard[4]
        assert flags.tolist() == [True, True]
        assert number == 1.0 + 2j
        assert nothing.numel() == 0
        assert short == 0
        assert bool((ones == 1).all())
        assert bool((zeros == 0).all())


def test_nccl_meets_on_the_cpu_first(monkeypatch):
    """NCCL would wait for a process that is gone; gloo says so."""

    def gone(tensor, *_):
        assert tensor.device.type == "cpu"
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    for meet in (Ranks(0, 2).sum_, Ranks(0, 2).take_first_):
        with pytest.raises(LostProcess, match="another process of the job is gone"):
            meet([_OnGpu()])


class _OnGpu:
    device = torch.device("cuda", 0)
