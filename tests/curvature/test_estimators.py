"""Probes, unbiasedness, standard errors and the state left behind."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import Batch, DataLoss
from hesstrace_cli.curvature.ggn import trace_sample
from hesstrace_cli.curvature.hessian import quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import Inclusion, draw_keep, draw_probe, num_kept, rademacher
from hesstrace_cli.curvature.statistics import COUNTED, Mean, StratifiedMean, t_quantile
from hesstrace_cli.curvature.trace.estimators import (
    Stop,
    estimate_trace,
    ggn_sampler,
    hessian_sampler,
)
from hesstrace_cli.tasks.softmax import softmax_root
from tests.curvature import oracles
from tests.curvature.zoo import make

SCHEMES = [("none", 1.0), ("entry", 1.0), ("entry", 0.3), ("tensor", 0.6), ("tensor", 0.25),
           ("block", 0.6), ("block", 0.25)]  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_vector(params, parts):
    return torch.cat([parts.get(n, torch.zeros_like(p)).flatten() for n, p in params.items()])


@pytest.mark.parametrize(("scheme", "keep_prob"), SCHEMES)
def test_probes_have_the_identity_as_covariance(scheme, keep_prob):
    params = {n: torch.zeros(2, dtype=torch.float64) for n in "abcd"}
    g, n = generator(1), 20_000
    draws = [draw_probe(params, scheme=scheme, keep_prob=keep_prob, generator=g) for _ in range(n)]
    V = torch.stack([as_vector(params, v) for v in draws])
    # The largest entry's fourth moment is 1/q, so its mean has a standard error below this.
    error = 5 * math.sqrt(1 / (keep_prob * n))
    torch.testing.assert_close(V.mT @ V / n, torch.eye(8, dtype=torch.float64), rtol=0, atol=error)
    torch.testing.assert_close(V.mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=error)


def test_tensor_scheme_keeps_exactly_k():
    params = {str(i): torch.zeros(3) for i in range(10)}
    for q, k in ((0.01, 1), (0.25, 2), (0.3, 3), (1.0, 10)):
        assert num_kept(10, q) == k
        for scheme in ("tensor", "block"):
            assert len(draw_keep(params, scheme=scheme, keep_prob=q, generator=generator())) == k


@pytest.mark.parametrize("q", [0.0, -0.1, 1.1])
def test_keep_prob_out_of_range(q):
    with pytest.raises(ValueError, match="keep_prob"):
        draw_keep({"a": torch.zeros(2)}, scheme="entry", keep_prob=q, generator=generator())


def problem():
    model, X, y = make("gelu", train=False)
    return Objective(model, trainable(model)), X, y


def within(samples, truth, errors=4.0):
    mean, stderr = samples.mean(), samples.std() / math.sqrt(len(samples))
    assert abs(mean - truth) < errors * stderr + 1e-9, (mean, stderr, truth)


@pytest.mark.parametrize(("scheme", "keep_prob"), SCHEMES)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_estimators_are_unbiased(curvature, scheme, keep_prob):
    objective, X, y = problem()
    if curvature == "hessian":
        truth, sampler = oracles.dense_hessian(objective, X, y), hessian_sampler
    else:
        truth, sampler = oracles.dense_ggn(objective, X), ggn_sampler
    rows = sampler(objective, scheme, keep_prob)(Batch(0, X, y, 1.0), 2000, generator(5))[:, 0]
    within(rows.sum(1), truth.trace())
    sizes = [p.numel() for p in objective.params.values()]
    blocks = truth.diagonal().split(sizes)
    for column, block in zip(rows.T, blocks, strict=True):
        within(column, block.sum(), 4.5)


@pytest.mark.parametrize(("scheme", "keep_prob"), SCHEMES)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_penalties_and_their_gradients_are_unbiased(curvature, scheme, keep_prob):
    """Mean value against the dense trace; mean gradient against its finite difference."""
    objective, X, y = problem()
    params, g = objective.params, generator(7)
    u = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}
    values, slopes = [], []
    for _ in range(600):
        if curvature == "hessian":
            v = draw_probe(params, scheme=scheme, keep_prob=keep_prob, generator=g)
            value = quadratic_form(lambda p: objective.loss(p, X, y), params, v)
        else:
            logits = objective.outputs(params, X)
            keep = draw_keep(params, scheme=scheme, keep_prob=keep_prob, generator=g)
            cotangent = softmax_root(logits, rademacher(logits, generator=g))
            parts = trace_sample(logits, params, cotangent, keep, len(X))
            value = sum(parts.values())
        grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        values.append(value.item())
        slopes.append(sum((a * b).sum() for a, b in zip(grads, u.values(), strict=True)).item())

    def trace_at(flat):
        with torch.no_grad():
            for p, part in zip(
                params.values(), oracles.unflatten(flat, params).values(), strict=True
            ):
                p.copy_(part)
        dense = oracles.dense_hessian(objective, X, y) if curvature == "hessian" else (
            oracles.dense_ggn(objective, X))  # fmt: skip
        return dense.trace()

    w = oracles.flatten(params).clone()
    within(torch.tensor(values), trace_at(w))
    within(torch.tensor(slopes), oracles.first_difference(trace_at, w, oracles.flatten(u)))


def test_variance_of_rademacher_probes():
    objective, X, y = problem()
    H = oracles.dense_hessian(objective, X, y)
    samples = hessian_sampler(objective)(Batch(0, X, y, 1.0), 4000, generator(3)).sum((1, 2))
    truth = 2 * (H.square().sum() - H.diagonal().square().sum())
    assert abs(samples.var() / truth - 1) < 0.15


def batches_of(X, y, *sizes):
    return lambda: zip(X.split(list(sizes)), y.split(list(sizes)), strict=True)


def run(sampler, objective, batches, seed=0, probes=2):
    return estimate_trace(
        sampler, DataLoss.counted(objective, batches), num_probes=probes, stop=Stop(None),
        generator=generator(seed),
    )  # fmt: skip


def test_ragged_batches_weigh_by_their_size():
    """With the identity's columns for probes there is no chance: 10 and 8 + 2 agree to rounding."""
    objective, _, _ = problem()
    X = torch.randn(10, 8, dtype=torch.float64, generator=generator(4))
    y = torch.arange(10) % 3
    H = oracles.dense_hessian(objective, X, y)
    sizes = [p.numel() for p in objective.params.values()]

    def exact(batch, m, generator):
        diagonal = oracles.dense_hessian(objective, batch.X, batch.y).diagonal()
        return torch.stack([part.sum() for part in diagonal.split(sizes)])[None, None]

    for split in ((10,), (8, 2)):
        batches = batches_of(X, y, *split)
        result = run(exact, objective, batches, probes=1)
        assert result.total.value == pytest.approx(H.trace().item(), rel=1e-12)
        assert result.total.stderr is None
    sampler = hessian_sampler(objective)
    batches = batches_of(X, y, 8, 2)
    result = run(sampler, objective, batches, probes=1500)
    assert abs(result.total.value - H.trace().item()) < 4 * result.total.stderr


def test_a_tensor_that_was_never_kept_or_never_left_out_has_an_unknown_error():
    """Not one of 0, though its samples do not differ."""
    kept = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]])
    samples = kept * torch.tensor([2.0, 3, 4, 5])
    running = StratifiedMean(inclusion=Inclusion(0.5, of_tensors=True))
    running.add(0, 1.0, torch.cat([samples.sum(1, keepdim=True), samples], 1)[:, None])
    total, always, never, often, once = running.means()
    assert total.stderr is not None
    assert always.stderr is never.stderr is once.stderr is None
    assert often.stderr == pytest.approx((samples[:, 2].std() / 5**0.5).item())
    assert often.degrees == pytest.approx(COUNTED * (2 - 1))


def test_stratified_mean_is_the_formula():
    g = generator(2)
    a, b = torch.randn(5, 1, generator=g).double(), 3 + torch.randn(4, 1, generator=g).double()
    running = StratifiedMean()
    running.add(0, 0.25, a[:, None])
    running.add(1, 0.75, b[:2, None])
    running.add(1, 0.75, b[2:, None])
    (mean,) = running.means()
    parts = [(0.25**2 * a.var() / 5).item(), (0.75**2 * b.var() / 4).item()]
    assert mean.value == pytest.approx((0.25 * a.mean() + 0.75 * b.mean()).item())
    assert mean.stderr == pytest.approx(math.sqrt(sum(parts)))
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 3)
    assert mean.degrees == pytest.approx(COUNTED * degrees)
    running.inclusion = Inclusion(0.2)
    assert running.means()[0].degrees == pytest.approx(0.2 * degrees)


def test_intervals():
    assert t_quantile(0.975, 7) == pytest.approx(stats.t.ppf(0.975, 7))
    assert Mean(2.0, 0.0).interval() == (2.0, 2.0)
    assert Mean(2.0, None).interval() is None


def test_stop_waits_for_enough_degrees_of_freedom():
    stop = Stop(0.1)
    assert not stop.reached(Mean(1.0, 1e-9, degrees=3), 1, 0.0)
    assert stop.reached(Mean(1.0, 1e-9, degrees=30), 1, 0.0)
    assert not stop.reached(Mean(1.0, 0.2, degrees=30), 1, 0.0)
    assert stop.reached(Mean(1.0, 0.2, degrees=30), 100, 0.0)
    assert Stop(0.1, max_seconds=1).reached(Mean(1.0, None), 1, 2.0)


def test_a_block_is_what_follows_each_other():
    params = {str(i): torch.zeros(1) for i in range(7)}
    g = generator(1)
    counts = dict.fromkeys(params, 0)
    for _ in range(700):
        kept = [int(n) for n in draw_keep(params, scheme="block", keep_prob=0.4, generator=g)]
        beginnings = [k for k in kept if (k - 1) % 7 not in kept]
        assert len(beginnings) == 1  # around the end too
        for k in kept:
            counts[str(k)] += 1
    assert all(abs(count - 300) < 70 for count in counts.values())
