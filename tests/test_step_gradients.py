"""The gradient of a whole training step, in every setting, against one taken apart in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.amp import GradScaler
from torch.func import functional_call

from hesstrace_cli.config import parse_regularizers
from hesstrace_cli.curvature.probes import draw_keep, draw_probe, rademacher
from hesstrace_cli.errors import ConfigError
from tests.conftest import make_run
from tests.curvature.oracles import first_difference, second_difference

SINGLE = 2e-5
GELU = {"width": 4, "activation": "gelu"}
PLAIN = {"reg": "none"}
OF_G = [
    {"reg": "trace=0.1", "estimator": "hutchinson"},
    {"reg": "trace=0.1", "num_probes": 2},
    {"reg": "trace=0.1", "dropout_scheme": "block", "keep_prob": 0.3},
    {"reg": "trace=0.1", "dropout_scheme": "entry"},
    {"reg": "trace=0.1", "form": "batch", "model_arg": {"width": 4, "norm": "none"}},
    {"reg": "trace=0.1", "form": "batch", "model_arg": {**GELU, "norm": "group"}},
]
OF_H = [
    {"reg": "trace=0.001", "curvature": "hessian", "model_arg": GELU},
    {"reg": "trace=0.001", "curvature": "hessian", "model_arg": GELU, "dropout_scheme": "entry"},
    {"reg": "trace=0.01", "curvature": "hessian", "model_arg": {**GELU, "norm": "group"},
     "estimator": "hutchinson", "num_probes": 2},
]  # fmt: skip


def names(settings):
    shown = {**settings, **settings.get("model_arg", {})}
    return ",".join(str(v) for k, v in shown.items() if k != "model_arg")


def gradient_of_one_step(out, **settings):
    """Of the loss with its penalty, at the initial weights."""
    run = make_run(out, warmup=0, **settings)
    if run.trainer.stepper.scaler.is_enabled():  # where no gradient overflows
        run.trainer.stepper.scaler = GradScaler("cpu", init_scale=64.0)
    next(run.advance())
    return torch.cat([p.grad.flatten().double() for p in run.trainer.model.parameters()])


def gradient_in_float64(out, **settings):
    """The same step: its examples and random draws, and otherwise PyTorch's own operations alone.

    Of the sample of tr(G) two backward passes are taken, which PyTorch has right, and they are
    compared with finite differences; of v^T H v the gradient is a second difference of the plain
    loss's gradient.
    """
    run = make_run(out, warmup=0, **settings)
    seen = []
    run.trainer.take_step = seen.append
    next(run.advance())
    ((X, y, _),) = seen[0]
    model, X, config = copy.deepcopy(run.trainer.model).double(), X.double(), run.config
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def at(w):
        parts = zip(w.split(sizes), params.items(), strict=True)
        return {n: part.view_as(p) for part, (n, p) in parts}

    def logits(w):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return functional_call(model, {**at(w), **buffers}, (X,))

    def gradient(function, w):
        w = w.detach().requires_grad_()
        return torch.autograd.grad(function(w), w)[0]

    def loss(w):
        return F.cross_entropy(logits(w), y)

    def flat(parts):
        zero = torch.zeros(())
        return torch.cat([
            parts.get(n, zero).double().expand_as(p).flatten() for n, p in params.items()
        ])  # fmt: skip

    def gradient_of_g(w, factors, signs):
        def sample(w):
            f = logits(w)
            root = F.softmax(f, 1).sqrt()
            B = torch.diag_embed(root) - root.square()[:, :, None] * root[:, None, :]
            (g,) = torch.autograd.grad(f, w, (B @ signs[:, :, None])[..., 0], create_graph=True)
            return (factors * g).square().sum() / len(X)

        found = gradient(sample, w)
        d = torch.randn(len(w), generator=torch.Generator().manual_seed(0), dtype=w.dtype)
        slope = first_difference(lambda at: sample(at.requires_grad_()).detach(), w, d, step=1e-6)
        torch.testing.assert_close(found @ d, slope, rtol=1e-5, atol=1e-7)
        return found

    w = torch.cat([p.detach().flatten() for p in params.values()])
    total = gradient(loss, w)
    row = parse_regularizers(config.reg, None)
    if "trace" not in row:
        return total
    generator = run.trainer.stepper.generators("regularizers", 0)
    scheme = config.dropout_scheme if config.estimator == "dropout" else "none"
    settings = {"scheme": scheme, "keep_prob": config.keep_prob, "generator": generator}
    share = row["trace"] / config.num_probes
    single = dict(run.trainer.model.named_parameters())
    for _ in range(config.num_probes):
        if run.trainer.regularizers[0].choice.curvature == "ggn":
            factors = flat(draw_keep(single, **settings))
            like = torch.empty(len(X), run.trainer.num_outputs)
            signs = rademacher(like, generator=generator).double()
            total += share * gradient_of_g(w, factors, signs)
        else:
            v = flat(draw_probe(single, **settings))
            total += share * second_difference(lambda w: gradient(loss, w), w, v, step=1e-6)
    return total


def error_of(found, truth):
    """In the norm of the whole."""
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("settings", [PLAIN, *OF_G, *OF_H], ids=names)
def test_in_single_precision(tmp_path, settings):
    truth = gradient_in_float64(tmp_path / "a", **settings)
    assert error_of(gradient_of_one_step(tmp_path / "b", **settings), truth) < SINGLE


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_terms_add_up(tmp_path, curvature):
    """The penalty's own pass gives the plain loss only where no other term needs it."""
    settings = {"curvature": curvature, "model_arg": GELU}
    none, first, second, both = (
        gradient_of_one_step(tmp_path / str(number), reg=reg, **settings)
        for number, reg in enumerate(
            ("none", "trace=0.01", "jacobian=0.1", "trace=0.01,jacobian=0.1")
        )
    )
    assert error_of(both - none, (first - none) + (second - none)) < 1e-4
    assert error_of(first - none, second - none) > 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", [*OF_G, *OF_H], ids=names)
def test_in_half_precision(tmp_path, settings, precision):
    """To three times what the rounding does to the plain gradient."""
    errors = []
    for name, own in (("plain", {**settings, **PLAIN}), ("penalised", settings)):
        truth = gradient_in_float64(tmp_path / f"{name}-truth", **own)
        found = gradient_of_one_step(tmp_path / name, **own, precision=precision)
        errors.append(error_of(found, truth))
    assert SINGLE < errors[0] < 0.05
    assert errors[1] < 3 * errors[0]


@pytest.mark.parametrize("settings", [PLAIN, OF_G[0], OF_H[0]], ids=names)
def test_channels_last(tmp_path, settings):
    truth = gradient_in_float64(tmp_path / "a", **settings)
    found = gradient_of_one_step(tmp_path / "b", **settings, channels_last=True)
    assert error_of(found, truth) < SINGLE


@pytest.mark.parametrize("settings", [OF_G[4], OF_G[5], OF_H[2]], ids=names)
def test_in_parts(tmp_path, settings):
    truth = gradient_in_float64(tmp_path / "a", **settings)
    found = gradient_of_one_step(tmp_path / "b", **settings, accumulate=4)
    assert error_of(found, truth) < SINGLE


@pytest.mark.parametrize("settings", [OF_G[1], OF_G[3], OF_H[0]], ids=names)
def test_the_function_that_is_compiled(tmp_path, monkeypatch, settings):
    """Without the compiler, which the slow test below has: the same draws, the same derivative."""
    truth = gradient_in_float64(tmp_path / "a", **settings)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    found = gradient_of_one_step(tmp_path / "b", **settings, compile=True)
    assert error_of(found, truth) < SINGLE


def test_a_compiler_that_fails_is_said_to(tmp_path, monkeypatch):
    """As with a cache that holds half a file; the model is not to blame."""

    def fails(function, **_):
        def call(*_):
            raise BackendCompilerFailed(function, ImportError("main.so: file too short"), None)

        return call if not isinstance(function, torch.nn.Module) else function

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ConfigError, match=r"compiler failed.*file too short.*--compile"):
        gradient_of_one_step(tmp_path / "a", **OF_G[0], compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("settings", [PLAIN, OF_G[0], OF_H[0]], ids=names)
def test_compiled(tmp_path, settings, precision):
    truth = gradient_in_float64(tmp_path / "a", **settings)
    found = gradient_of_one_step(tmp_path / "b", **settings, compile=True, precision=precision)
    assert error_of(found, truth) < (SINGLE if precision == "float32" else 0.15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reg": "jacobian"}, "jacobian takes second derivatives"),
        ({"reg": "grad-norm=0.1"}, "grad-norm takes second derivatives"),
        ({"reg": "trace", "accumulate": 2}, "compiled"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_run(tmp_path / "a", compile=True, **settings)
