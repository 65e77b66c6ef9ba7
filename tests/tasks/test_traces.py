"""Every trace method for every task against dense Hessians of the loss in words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hesstrace_cli.analysis import method_choice as methods
from hesstrace_cli.analysis.estimation import data_loss, estimate
from hesstrace_cli.analysis.evaluation import evaluate, input_jacobian
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.flatness import Landscape
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example import norms as per_example
from hesstrace_cli.curvature.per_example.output_layer import output_layer
from hesstrace_cli.curvature.per_example.uses import find_uses
from hesstrace_cli.curvature.spectrum.lanczos import Krylov, extreme_eigenvalues
from hesstrace_cli.curvature.trace.estimators import (
    Stop,
    control_variate_sampler,
    diagonal_sampler,
    estimate_trace,
    exact_sampler,
    ggn_sampler,
    hessian_sampler,
    signs_sampler,
)
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.tasks import Regression, Segmentation, SoftmaxTask, Tokens
from tests.jobs import joined, run_job
from tests.tasks.cases import (
    BATCHES,
    CASES,
    block_traces,
    case_of,
    dense,
    flat_params,
    mean_in_words,
    outputs_at,
    trace,
)

CURVATURES = ("hessian", "ggn")
SURE = 1 - 1e-6


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def is_curved(name):
    return any(word in name for word in ("tanh", "layer norm", "tied"))


def config(**settings):
    return EstimateConfig(**{"dtype": "float64", "batch_size": 8, **settings})


def estimated(name, **settings):
    case = case_of(name)
    return estimate(case.model, case.split, config(**settings))


def assert_exact(result, name, curvature):
    for each, truth in block_traces(name, curvature).items():
        assert result.tensors[each].value == pytest.approx(truth, rel=1e-9, abs=1e-9), each
        assert result.tensors[each].stderr == 0
    assert result.total.value == pytest.approx(trace(name, curvature), rel=1e-9, abs=1e-9)
    assert result.total.stderr == 0


def assert_near(result, name, curvature):
    """No interval, of the whole or a block, is off by far."""
    truths = block_traces(name, curvature)
    for each, part in result.tensors.items():
        if part.stderr is None:  # a tensor that was dropped each time
            continue
        low, high = part.interval(SURE)
        rounding = 1e-9 * (1 + abs(truths[each]))
        assert low - rounding <= truths[each] <= high + rounding, (name, each)
    truth, total = math.fsum(truths.values()), result.total
    assert abs(total.value - truth) <= 4.5 * total.stderr + 1e-9 * abs(truth), name


def assert_cover(results, curvature):
    """Of estimates by the names of their cases, 95 % intervals hold the truth about as often."""
    hits, scores = 0, []
    for name, result in results:
        assert_near(result, name, curvature)
        truth = trace(name, curvature)
        rounding = 1e-9 * (1 + abs(truth))
        low, high = result.total.interval()
        hits += low - rounding <= truth <= high + rounding
        if result.total.stderr > rounding:
            scores.append((result.total.value - truth) / result.total.stderr)
    assert hits >= 0.88 * len(results), (hits, len(results))
    assert abs(sum(scores)) <= 4.5 * math.sqrt(len(scores))  # and they are off to both sides


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_exact(name, curvature, batch_size):
    found = estimated(name, method="exact", curvature=curvature, batch_size=batch_size)
    assert found.method == "exact"
    is_diagonal = "diagonal" in found.reason
    assert is_diagonal == (is_curved(name) and curvature == "hessian")
    assert_exact(found.result, name, curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_signs(curvature, monkeypatch):
    """Those of piecewise linear models are of tr(H) too."""
    monkeypatch.setattr(methods, "MAX_COLUMNS", 0)
    results = []
    for name in (n for n in CASES if curvature == "ggn" or not is_curved(n)):
        for seed in range(3):
            found = estimated(name, curvature=curvature, num_probes=10, seed=seed)
            assert found.method == "signs"
            results.append((name, found.result))
    assert_cover(results, curvature)


@pytest.mark.parametrize("by_signs", [False, True])
def test_control_variate(by_signs, monkeypatch):
    monkeypatch.setattr(methods, "MAX_DIAGONAL", 0)
    if by_signs:
        monkeypatch.setattr(methods, "MAX_COLUMNS", 0)
    results = []
    for name in filter(is_curved, CASES):
        for seed in range(4):
            found = estimated(name, num_probes=10, seed=seed)
            assert found.method == ("signs+hutchinson" if by_signs else "exact+hutchinson")
            results.append((name, found.result))
    assert_cover(results, "hessian")


RANDOM = {
    "hutchinson": {"method": "hutchinson", "num_probes": 20},
    "tensors": {"method": "dropout", "num_probes": 30, "keep_prob": 0.5},
    "entries": {
        "method": "dropout", "num_probes": 30, "keep_prob": 0.5, "dropout_scheme": "entry"
    },
    "blocks": {
        "method": "dropout", "num_probes": 30, "keep_prob": 0.5, "dropout_scheme": "block"
    },
    "hutch++": {"method": "hutch++", "num_probes": 30},
    "xtrace": {"method": "xtrace", "num_probes": 24},
}  # fmt: skip


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("method", RANDOM)
def test_random_methods(method, curvature):
    results = [
        (name, estimated(name, curvature=curvature, seed=seed, **RANDOM[method]).result)
        for name in CASES
        for seed in range(2 if curvature == "hessian" else 1)
    ]
    assert_cover(results, curvature)


def samplers(data, X):
    objective = data.objective
    per_example = PerExampleTrace(objective, X)
    return {
        "exact": (exact_sampler(per_example), "ggn", True),
        "diagonal": (diagonal_sampler(objective), "hessian", True),
        "signs": (signs_sampler(per_example), "ggn", False),
        "control variate": (
            control_variate_sampler(objective, per_example, by_signs=False), "hessian", False
        ),
        "hessian": (hessian_sampler(objective), "hessian", False),
        "ggn": (ggn_sampler(objective), "ggn", False),
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", BATCHES)
def test_loss_over_a_data_set(name, batch_size):
    case = case_of(name)
    data = case.data(batch_size)
    assert sum(batch.share for batch in data) == pytest.approx(1)
    for sampler, curvature, exact in samplers(data, case.X).values():
        result = estimate_trace(
            sampler, data, num_probes=16, stop=Stop(None), exact=exact,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        if exact:
            assert_exact(result, name, curvature)
        else:
            assert_near(result, name, curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_are_those_with_the_dense_matrix(name, curvature):
    case = case_of(name)
    matrix = CurvatureMatrix(case.data(8), curvature)
    expected = dense(name)[curvature]
    torch.testing.assert_close(
        matrix @ torch.eye(matrix.size, dtype=torch.float64), expected, rtol=1e-9, atol=1e-10
    )
    start = Krylov(matrix, torch.ones(matrix.size, dtype=torch.float64))
    largest = extreme_eigenvalues(start, k=1).largest[0]
    assert largest == pytest.approx(torch.linalg.eigvalsh(expected)[-1].item(), rel=1e-3)


def test_residual_is_the_hessian_without_the_gauss_newton_part(name):
    data = case_of(name).data(8)
    objective, params = data.objective, data.objective.params
    R = dense(name)["hessian"] - dense(name)["ggn"]
    v = torch.randn(len(R), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = v.split([p.numel() for p in params.values()])
    probe = {n: part.view_as(params[n]) for n, part in zip(params, parts, strict=True)}
    total = torch.zeros_like(v)
    for batch in data:
        residual = objective.residual(params, batch.X, batch.y)
        product = hvp(gradient(residual, params, create_graph=True), params, probe)
        total += batch.share * torch.cat([p.detach().flatten() for p in product.values()])
    torch.testing.assert_close(total, R @ v, rtol=1e-9, atol=1e-10)


def test_landscape_is_the_loss_in_words(name):
    case = case_of(name)
    landscape = Landscape(case.data(8))
    params = landscape.objective.params
    moved = {n: 0.1 * torch.ones_like(p) for n, p in params.items()}
    flat = (flat_params(case) + 0.1).requires_grad_()
    expected = mean_in_words(case.task, outputs_at(case, flat), case.y)
    (slope,) = torch.autograd.grad(expected, flat)
    loss, grad = landscape.gradient(moved)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert landscape.loss(moved).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([g.flatten() for g in grad.values()]), slope)


def test_evaluation_and_input_jacobian(name):
    case = case_of(name)
    flat = flat_params(case)
    found = evaluate(case.model, case.split, 8)
    expected = mean_in_words(case.task, outputs_at(case, flat), case.y)
    assert found.loss == pytest.approx(expected.item(), rel=1e-12)
    jacobian = input_jacobian(case.model, case.split, 8)
    if not case.X.is_floating_point():
        assert jacobian is None
        return

    def outputs(X):
        given = case.model(X)
        return given if isinstance(given, torch.Tensor) else given["logits"]

    J = torch.autograd.functional.jacobian(outputs, case.X)
    assert jacobian.value == pytest.approx(J.square().sum().item() / len(case.X), rel=1e-9)


SHARED = (
    "tokens weighted, relu, sequence first, in an object", "pixels smoothed, group norm, tanh",
    "labels between, tanh, layer norm",
)  # fmt: skip
METHODS = {
    "exact": {"method": "exact"},
    "hutchinson": {"method": "hutchinson", "num_probes": 30},
    "hutch++": {"method": "hutch++", "num_probes": 15},
    "xtrace": {"method": "xtrace", "num_probes": 12},
}  # fmt: skip


def shared_work(rank, ports):
    """In each of two processes: shares, and of both curvatures every method and a product."""
    ranks, found = joined(rank, 2, ports), {}
    for name in SHARED:
        case = case_of(name)
        data = data_loss(case.model, case.split, 4, ranks)
        found[name] = [batch.share for batch in data]
        for curvature in CURVATURES:
            results = {
                method: estimate(
                    case.model, case.split, config(curvature=curvature, batch_size=4, **settings),
                    ranks=ranks,
                ).result
                for method, settings in METHODS.items()
            }  # fmt: skip
            v = torch.ones(len(flat_params(case)), 1, dtype=torch.float64)
            found[name, curvature] = results, CurvatureMatrix(data, curvature) @ v
    return found


def test_two_processes_get_what_one_gets(tmp_path):
    first, second = run_job(2, shared_work, tmp_path)
    for name in SHARED:
        assert sum(first[name]) + sum(second[name]) == pytest.approx(1)
        for curvature in CURVATURES:
            (results, product), (others, other_product) = (
                found[name, curvature] for found in (first, second)
            )
            assert others == results
            assert_exact(results["exact"], name, curvature)
            for method in METHODS:
                assert_near(results[method], name, curvature)
            expected = dense(name)[curvature].sum(1, keepdim=True)
            torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(other_product, product)


def closed(layer, task, X, y):
    data = DataLoss.counted(
        Objective(layer, trainable(layer), task),
        lambda: zip(X.split((3, 2)), y.split((3, 2)), strict=True),
    )
    sampler = exact_sampler(PerExampleTrace(data.objective, X, linear=True))
    generator = torch.Generator().manual_seed(0)
    result = estimate_trace(
        sampler, data, num_probes=1, stop=Stop(None), exact=True, generator=generator
    )
    return [result.tensors[name].value for name in ("weight", "bias")]


def test_linear_squared_error_in_closed_form():
    X = torch.randn(5, 3, dtype=torch.float64)
    for width in (1, 4):
        weight, bias = closed(
            nn.Linear(3, width).double(), Regression(), X, torch.zeros(5, width).double()
        )
        assert weight == pytest.approx(2 / 5 * X.square().sum().item())
        assert bias == pytest.approx(2)


def test_linear_softmax_of_tokens_in_closed_form():
    layer = nn.Linear(3, 4).double()
    X = torch.randn(5, 2, 3, dtype=torch.float64)
    y = torch.tensor([[-100, 1], [2, 3], [0, -100], [-100, -100], [1, 1]])
    p = torch.softmax(layer(X), -1)
    traces = (1 - p.square().sum(-1))[y != -100]
    weight, bias = closed(layer, Tokens(), X, y)
    assert weight == pytest.approx((traces * X.square().sum(-1)[y != -100]).mean().item())
    assert bias == pytest.approx(traces.mean().item())


def test_wrongly_batched_norms_are_found_by_examples_that_count(monkeypatch):
    """Those at the ends may have no term, and then nothing but zeros."""
    X, w = torch.randn(4, 3, dtype=torch.float64), {"w": torch.ones(3, 2, dtype=torch.float64)}
    w["w"].requires_grad_()
    u = torch.randn(2, 4, 2, dtype=torch.float64)
    u[:, [0, 3]] = 0
    vmap = per_example.vmap

    def wrong(*args, **kwargs):
        mapped = vmap(*args, **kwargs)
        return lambda *inputs: {name: 2 * each for name, each in mapped(*inputs).items()}

    monkeypatch.setattr(per_example, "vmap", wrong)
    found = per_example.differentiated_norms(lambda p, x: x @ p["w"], w, X, u)["w"]
    torch.testing.assert_close(found, u.square().sum(-1) * X.square().sum(-1))


def output_names(name):
    """The parameters of the linear layer that gives the outputs, if one does."""
    if "tied" in name or name == "images of numbers, relu":  # whose terms are whole images
        return []
    return [n for n, _ in case_of(name).model.named_parameters()][-1 if "no bias" in name else -2 :]


def test_the_output_layer_has_no_noise_in_signs(name, monkeypatch):
    monkeypatch.setattr(methods, "MAX_COLUMNS", 0)
    truths = block_traces(name, "ggn")
    parts = estimated(name, curvature="ggn", num_probes=3).result.tensors
    for each, part in parts.items():
        if each in output_names(name):
            assert part.stderr == 0
            assert part.value == pytest.approx(truths[each], rel=1e-9)
        elif name not in ("one number, relu", "images of numbers, relu"):  # constant by their signs
            assert part.stderr > 0 or truths[each] == 0, each


class Odd(nn.Module):
    """Outputs of a layer that numbers are moved, or more is done, after."""

    def __init__(self, layer, after, extra=None):
        super().__init__()
        self.layer, self.after = layer, after
        if extra is not None:
            self.extra = nn.Parameter(extra)

    def forward(self, X):
        f = self.layer(X)
        return self.after(f, self.extra) if hasattr(self, "extra") else self.after(f)


def twice(f, extra):
    return f @ extra + extra[0]


ODD = {  # a model, inputs, class numbers, and which blocks are in closed form
    "all tokens at once": (
        lambda: Odd(nn.Linear(3, 8), lambda f: f.unflatten(1, (2, 4))),
        (5, 3), (5, 2), {"layer.weight", "layer.bias"},
    ),
    "classes before tokens": (
        lambda: Odd(nn.Linear(3, 8), lambda f: f.unflatten(1, (4, 2)).mT),
        (5, 3), (5, 2), {"layer.weight", "layer.bias"},
    ),
    "the last tokens": (
        lambda: Odd(nn.Linear(3, 4), lambda f: f[:, 1:]), (5, 3, 3), (5, 2),
        {"layer.weight", "layer.bias"},
    ),
    "some classes": (
        lambda: Odd(nn.Linear(3, 6), lambda f: f[..., 1:5]), (5, 2, 3), (5, 2),
        {"layer.weight", "layer.bias"},
    ),
    "a bias of places": (
        lambda: Odd(nn.Linear(3, 4, bias=False), torch.add, torch.randn(2, 4)),
        (5, 2, 3), (5, 2), {"layer.weight", "extra"},
    ),
    "a bias that classes share": (
        lambda: Odd(nn.Linear(3, 4), torch.add, torch.randn(2, 1)), (5, 2, 3), (5, 2),
        {"layer.weight", "layer.bias"},
    ),
    "a bias that is scaled": (
        lambda: Odd(nn.Linear(3, 4), lambda f, b: torch.add(b, f, alpha=3), torch.randn(2, 4)),
        (5, 2, 3), (5, 2), {"extra"},
    ),
    "a temperature": (lambda: Odd(nn.Linear(3, 4), lambda f: f / 3), (5, 2, 3), (5, 2), set()),
    "a scale": (
        lambda: Odd(nn.Linear(3, 4), torch.mul, torch.rand(4)), (5, 2, 3), (5, 2), set()
    ),
    "used twice": (
        lambda: Odd(nn.Linear(3, 4), twice, torch.randn(4, 4)), (5, 2, 3), (5, 2), set()
    ),
    "classes in several rows": (
        lambda: Odd(nn.Linear(3, 2), lambda f: f.flatten(2)), (5, 2, 2, 3), (5, 2), set()
    ),
    "the same outputs for all tokens": (
        lambda: Odd(nn.Linear(3, 4), lambda f: f.expand(-1, 2, -1)), (5, 1, 3), (5, 2), set()
    ),
    "strides": (
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), (4, 2, 6, 5), (4, 2, 2),
        {"weight", "bias"},
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1), (4, 2, 2, 1), (4, 5, 3),
        {"weight", "bias"},
    ),
    "groups": (lambda: nn.Conv2d(3, 3, 1, groups=3), (4, 3, 2, 2), (4, 2, 2), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_output_layers(name):
    make, shape, targets, expected = ODD[name]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    X = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, targets, generator=generator)
    y[0] = -100
    task = Tokens() if len(targets) == 2 else Segmentation()
    objective = Objective(model, trainable(model), task)
    outputs = model(X)
    found = output_layer(outputs, find_uses(outputs, objective.params), objective.params, task)
    assert found.keys() == expected
    per_example = PerExampleTrace(objective, X)
    exact = per_example.exact(X, y).sum(0) / task.num_terms(y)
    signs = per_example.sample(X, y, 2000, generator).sum(1).mean(0) / task.num_terms(y)
    for index, (each, p) in enumerate(objective.params.items()):
        H = torch.autograd.functional.hessian(
            lambda v, each=each: mean_in_words(
                task, torch.func.functional_call(model, {each: v}, (X,)), y
            ),
            p.detach(),
        )
        truth = H.reshape(p.numel(), p.numel()).trace().item()
        assert exact[index].item() == pytest.approx(truth, rel=1e-9)
        assert signs[index].item() == pytest.approx(truth, rel=1e-9 if each in expected else 0.1)


def test_many_classes_need_no_columns_where_the_output_layer_is_all(monkeypatch):
    model = nn.Linear(3, 50).double()
    y = torch.randint(50, (5,))
    split = TensorSplit(torch.randn(5, 3).double(), y, Preprocess(), torch.float64)
    monkeypatch.delattr(SoftmaxTask, "columns")
    found = estimate(model, split, config())
    assert found.method == "exact"
    assert "closed form" in found.reason
    p = torch.softmax(model(split.inputs), -1)
    truth = ((1 - p.square().sum(1)) * (1 + split.inputs.square().sum(1))).mean().item()
    assert found.result.total.value == pytest.approx(truth)
