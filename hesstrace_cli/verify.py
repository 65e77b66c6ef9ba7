"""Are the derivatives right for this model, on this machine? A row a check, with a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hesstrace_cli.config import DataConfig, TrainConfig, VerifyConfig
from hesstrace_cli.curvature.differentiable import differentiable_ops, replacements
from hesstrace_cli.curvature.finite import STEPS, mixed, slopes
from hesstrace_cli.curvature.ggn import trace_sample
from hesstrace_cli.curvature.graph import check_graph, gradient
from hesstrace_cli.curvature.hessian import Mode, hvp, quadratic_form
from hesstrace_cli.curvature.linearity import why_not_linear
from hesstrace_cli.curvature.objective import (
    Objective,
    call_as_it_is,
    draws_random_numbers,
    trainable,
)
from hesstrace_cli.curvature.probes import Params, draw_keep, rademacher
from hesstrace_cli.curvature.refusal import refuse
from hesstrace_cli.data import load_data
from hesstrace_cli.errors import HesstraceError
from hesstrace_cli.estimation import versions
from hesstrace_cli.loading import check_fit, check_training_output, select_device
from hesstrace_cli.models import build_model
from hesstrace_cli.stepcost import step_costs

SCHEMA = "hesstrace/verify/1"
GOOD = ("right", "replaced", "yes", "no", "measured")
_TOLERANCE = 1e-4  # relative; ten times as much for a gradient, whose differences are noisier
_NEARER_STEPS = (1e-7, 1e-8, 1e-9)  # for first differences, which are less noisy
_MOST_NAMED = 3
_ENGINES = ("taylor", "forward", "reverse")


@dataclasses.dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: "right", "replaced" (made right by another form), "wrong", "refused",
            "unsettled" (the differences themselves depend on the step, so that nothing is
            proved), or, where no verdict hangs on it, the answer "yes" or "no", or "measured".
        detail: The figures, or the reason.
    """

    check: str
    verdict: str
    detail: str


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check the derivatives of a model against finite differences of itself, in float64.

    Raises:
        HesstraceError: If the model or the data cannot be built.
    """
    device = select_device(config.device)
    data = load_data(config, device, dtype=torch.float64)
    model = build_model(
        config.model, num_classes=data.num_classes, in_shape=data.in_shape,
        model_args=config.model_arg, seed=config.seed,
    ).to(device, torch.float64)  # fmt: skip
    check_fit(model, data, config.model)
    check_training_output(model, data, config.model)
    _move_aside(model, config.seed)
    X, y = next(data.train.batches(config.batch_size))
    rows: list[Row] = []
    for mode in (True, False):
        rows += _rows(model.train(mode), X, y, "train" if mode else "eval", config.seed)
    good = all(row.verdict in GOOD for row in rows)
    if good:
        rows += _costs(config)
    return {
        "schema": SCHEMA,
        "model": config.model,
        "dataset": data.name,
        "right": good,
        "rows": [dataclasses.asdict(row) for row in rows],
        "dtype": "float64",
        "device": str(device),
        "seed": config.seed,
        "versions": versions(),
    }


def _move_aside(model: nn.Module, seed: int) -> None:
    """A little beside the initial weights: with biases of 0 many a unit sits on its kink there."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(noise, alpha=0.01 * max(1.0, p.abs().mean().item()))


def _costs(config: VerifyConfig) -> Iterator[Row]:
    """What a step with the penalty costs here, at the defaults of `hesstrace train`."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(DataConfig)}
    plain = TrainConfig(**{**shared, "data_dir": config.data_dir or "data"})
    rows = {"SEHT-H of tr(G)": "hutchinson", "SEHT-D of tr(G)": "dropout"}
    configs = {
        name: dataclasses.replace(plain, reg=["trace=0.01"], estimator=estimator, curvature="ggn")
        for name, estimator in rows.items()
    }
    costs = step_costs({"none": plain, **configs})
    for name in rows:
        if name in costs:
            yield Row(
                f"train: a step with {name}, float32, batches of {config.batch_size}",
                "measured",
                f"{costs[name].time:.1f} times the plain step's time, {costs[name].memory:.1f} "
                "times its memory",
            )


def _rows(model: nn.Module, X: Tensor, y: Tensor, mode: str, seed: int) -> Iterator[Row]:
    objective = Objective(model, trainable(model))
    repeats = _repeats(model, X, mode)
    yield repeats
    if repeats.verdict == "refused":
        return
    yield from (Row(f"{mode}: {what}", "replaced", detail) for what, detail in _replaced(model, X))
    generator = Generator(X.device).manual_seed(seed)
    params = objective.params

    def direction() -> dict[str, Tensor]:
        return {
            n: torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            * p.detach().abs().mean().clamp(min=1e-3)
            for n, p in params.items()
        }  # fmt: skip

    v, u = direction(), direction()

    def native(t: float, s: float = 0.0) -> float:
        """The slope of the unmodified model's loss along v, at w + t v + s u."""
        with _pinned(X):
            logits, values = _displaced(model, params, X, [(t, v), (s, u)])
            grads = gradient(objective.loss_func(logits, y), values)
        return sum((grads[n] * v[n]).sum().item() for n in v)

    try:
        truths, slopes_of_it = slopes(native, (*STEPS, *_NEARER_STEPS)), mixed(native)
    except (RuntimeError, NotImplementedError) as problem:
        yield Row(f"{mode}: the model's own gradient", "refused", _one_line(problem))
        return
    truth = _Truth(truths, slopes_of_it)
    engines: dict[str, list[Row]] = {}
    for name in _ENGINES:
        form = partial(
            quadratic_form, lambda p: objective.loss(p, X, y), params, v, mode=cast(Mode, name)
        )
        engines[name] = _judge(f"{mode}: v'Hv, {name} mode", form, truth, objective, X, u)
    yield from _with_fallbacks(engines, is_random=repeats.verdict == "no")
    estimate = partial(_estimate, objective, X, y, v)
    yield from _judge(f"{mode}: v'Hv of the estimate", estimate, truth, objective, X, u)
    yield from _judge_ggn(mode, objective, X, u, generator)
    if mode == "eval":
        why = why_not_linear(call_as_it_is(model, X), params)
        yield Row("eval: tr(H) = tr(G)", "no" if why else "yes", why or "piecewise linear")


@contextmanager
def _pinned(X: Tensor) -> Iterator[None]:
    """The same random numbers each time, and the global state as before."""
    devices = [X.device] if X.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _displaced(
    model: nn.Module, params: Params, X: Tensor, moves: Sequence[tuple[float, Params]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The unmodified model's logits at displaced parameters, and these, as leaves."""
    values = {n: p.detach().clone() for n, p in params.items()}
    for size, direction in moves:
        for name, part in direction.items():
            values[name] += size * part
    leaves = {n: value.requires_grad_() for n, value in values.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    logits: Tensor = functional_call(model, {**leaves, **buffers}, (X,))
    return logits, leaves


def _repeats(model: nn.Module, X: Tensor, mode: str) -> Row:
    with torch.no_grad(), _pinned(X):
        first = call_as_it_is(model, X)
    with torch.no_grad(), _pinned(X):
        second = call_as_it_is(model, X)
    name = f"{mode}: results repeat"
    if not torch.equal(first, second):
        return Row(name, "refused", "two passes differ though PyTorch's random state is the same: "
                   "it draws from elsewhere (random, numpy), or counts")  # fmt: skip
    if not draws_random_numbers(model, X):
        return Row(name, "yes", "")
    if mode == "train":
        return Row(name, "no", "it draws random numbers (Dropout), held fixed for these checks")
    return Row(name, "refused", "it draws random numbers (Dropout): its loss has no one Hessian")


def _with_fallbacks(engines: Mapping[str, list[Row]], *, is_random: bool) -> Iterator[Row]:
    """Where another mode has the derivative, one that has not is no fault.

    Nor is one whose pass draws other random numbers than an ordinary pass, as attention's dropout
    does in forward mode; reverse mode, whose passes are ordinary ones, then decides.
    """
    works = [name for name, rows in engines.items() if all(r.verdict != "refused" for r in rows)]
    decided = is_random and all(row.verdict == "right" for row in engines["reverse"])
    for row in itertools.chain(*engines.values()):
        if row.verdict == "refused" and works:
            yield Row(row.check, "no", f"{works[0]} mode is taken: {row.detail}")
        elif row.verdict in ("wrong", "unsettled") and decided:
            yield Row(row.check, "no", f"other random numbers than an ordinary pass: {row.detail}")
        else:
            yield row


def _estimate(objective: Objective, X: Tensor, y: Tensor, v: Params) -> Tensor:
    params = objective.params
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    check_graph(*grad.values())
    product = hvp(grad, params, v)
    return torch.stack([(product[n] * v[n]).sum() for n in v]).sum().detach()


@dataclasses.dataclass(frozen=True)
class _Truth:
    """Differences of the unmodified model, one a step: of the value, and of its slope along u."""

    values: list[float]
    slopes: list[float]


def _judge(
    name: str,
    engine: Callable[[], Tensor],
    truth: _Truth,
    objective: Objective,
    X: Tensor,
    u: Params,
) -> list[Row]:
    params = objective.params
    try:
        with _pinned(X):
            value = engine()
            if not value.requires_grad:
                return [_compared(f"{name}, value", value.item(), truth.values)]
            grads = gradient(value, params)
        slope = torch.stack([(grads[n] * u[n]).sum() for n in u]).sum().item()
        rows = [_compared(f"{name}, value", value.item(), truth.values)]
        row = _compared(f"{name}, gradient", slope, truth.slopes, tolerance=10 * _TOLERANCE)
        if row.verdict == "unsettled" and rows[0].verdict == "right":
            # Kinks all around: differences of its own value, which is right, take shorter steps.
            own = slopes(partial(_engine_at, engine, params, u, X), _NEARER_STEPS)
            row = _compared(f"{name}, gradient", slope, own, tolerance=10 * _TOLERANCE)
        return [*rows, row]
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if "taylor" in name:  # the next mode knows better which module it is
            return [Row(name, "refused", _one_line(problem))]
        reason = refuse(problem, objective, X)
        if not isinstance(reason, HesstraceError):
            raise reason from problem
        return [Row(name, "refused", str(reason))]


def _engine_at(
    engine: Callable[[], Tensor], params: Params, u: Params, X: Tensor, t: float
) -> float:
    """The engine's value at w + t u."""
    before = {n: p.detach().clone() for n, p in params.items()}
    try:
        with torch.no_grad():
            for n, part in u.items():
                params[n].add_(part, alpha=t)
        with _pinned(X):
            return engine().item()
    finally:
        with torch.no_grad():
            for n, p in before.items():
                params[n].copy_(p)


def _one_line(problem: Exception) -> str:
    return textwrap.shorten(" ".join(str(problem).split()), 160, placeholder=" ...")


def _judge_ggn(
    mode: str, objective: Objective, X: Tensor, u: Params, generator: Generator
) -> Iterator[Row]:
    """The penalty on tr(G): its gradient against differences of its value, taken natively."""
    params, model = objective.params, objective.model
    keep = draw_keep(params, scheme="none", keep_prob=1.0, generator=generator)
    signs = rademacher(call_as_it_is(model, X).detach(), generator=generator)

    def native(t: float) -> float:
        with _pinned(X):
            logits, values = _displaced(model, params, X, [(t, u)])
            root = F.softmax(logits.detach(), 1).sqrt()  # B e, B = diag(root) - p root^T
            cotangent = root * signs - root.square() * (root * signs).sum(1, keepdim=True)
            grads = torch.autograd.grad(
                logits, list(values.values()), cotangent, materialize_grads=True
            )
        return sum(g.square().sum().item() for g in grads) / len(X)

    def engine() -> Tensor:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with differentiable_ops(order=2):
            logits = functional_call(model, {**params, **buffers}, (X,))
        value = torch.stack(list(trace_sample(logits, params, signs, keep).values())).sum()
        check_graph(value)
        return value

    name = f"{mode}: penalty on tr(G)"
    truth = _Truth([native(0.0)], slopes(native, (*STEPS, *_NEARER_STEPS)))
    yield from _judge(name, engine, truth, objective, X, u)


def _compared(name: str, value: float, truths: list[float], tolerance: float = _TOLERANCE) -> Row:
    """Right if it agrees with the differences for one step; wrong if these agree with each other.

    Where neither holds, as with kinks everywhere, differences cannot tell.
    """
    if not math.isfinite(value):
        return Row(name, "wrong", f"{value:g}, by differences {truths[-1]:.6g}")

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9)

    truth = min(truths, key=lambda t: abs(t - value))
    detail = f"{value:.6g}, by differences {truth:.6g}"
    if near(value, truth):
        return Row(name, "right", detail)
    settled = len(truths) == 1 or any(near(a, b) for a, b in itertools.pairwise(truths))
    return Row(name, "wrong" if settled else "unsettled", detail)


class _Watch(TorchFunctionMode):
    """Notes which replaced operations are called, and in which module."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in replacements() or func is F.scaled_dot_product_attention:
            self.found.append((func.__name__, self.stack[-1] if self.stack else "the model"))
        return func(*args, **(kwargs or {}))


def _replaced(model: nn.Module, X: Tensor) -> Iterator[tuple[str, str]]:
    """Where an operation is replaced by a differentiable form: it and its innermost module."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(
            lambda _m, _i, label=label: watch.stack.append(label)
        ))  # fmt: skip
        handles.append(module.register_forward_hook(lambda _m, _i, _o: watch.stack.pop() and None))
    try:
        with torch.no_grad(), watch:
            call_as_it_is(model, X)
    finally:
        for handle in handles:
            handle.remove()
    places: dict[str, list[str]] = {}
    for operation, place in dict.fromkeys(watch.found):
        places.setdefault(operation, []).append(place)
    for operation, own in places.items():
        if len(own) <= _MOST_NAMED:
            yield from ((f"{operation} in {place}", "by primitive operations") for place in own)
        else:
            yield f"{operation} in {len(own)} modules", f"by primitive operations, from {own[0]} on"
