"""Are the derivatives right for this model, on this machine? A row a check, with a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hesstrace_cli.config import DataConfig, TrainConfig, VerifyConfig
from hesstrace_cli.curvature.differentiable import differentiable_ops, replacements
from hesstrace_cli.curvature.finite import mixed, slopes
from hesstrace_cli.curvature.ggn import softmax_root, trace_sample
from hesstrace_cli.curvature.graph import check_graph, gradient
from hesstrace_cli.curvature.hessian import hvp, quadratic_form
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
GOOD = ("right", "replaced", "unsettled", "yes", "no", "measured")
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: "right", "replaced" (made right by another form), "wrong", "refused",
            "unsettled" (the differences themselves depend on the step), or, where no verdict
            hangs on it, the answer "yes" or "no", or "measured".
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


def _costs(config: VerifyConfig) -> Iterator[Row]:
    """What a step with the penalty costs here, at the defaults of `hesstrace train`."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(DataConfig)}
    plain = TrainConfig(**{**shared, "data_dir": config.data_dir or "data"})
    rows = {"SEHT-H": "hutchinson", "SEHT-D": "dropout"}
    configs = {
        name: dataclasses.replace(plain, reg=["trace=0.01"], estimator=estimator)
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
    if draws_random_numbers(model, X):
        verdict = "no" if mode == "train" else "refused"
        detail = "it draws random numbers (Dropout): its loss has no one Hessian"
        yield Row(f"{mode}: results repeat", verdict, detail)
        return
    yield Row(f"{mode}: results repeat", "yes", "")
    replaced = replaced_modules(model, X)
    for name, operation in replaced:
        yield Row(f"{mode}: {operation} in {name}", "replaced", "by primitive operations")
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
        values = {n: (p.detach() + t * v[n] + s * u[n]).requires_grad_() for n, p in params.items()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = objective.loss_func(functional_call(model, {**values, **buffers}, (X,)), y)
        grads = gradient(loss, values)
        return sum((grads[n] * v[n]).sum().item() for n in v)

    truths, slopes_of_it = slopes(native), mixed(native)
    engines: dict[str, Callable[[], Tensor]] = {
        f"v'Hv, {engine} mode": partial(
            quadratic_form, lambda p: objective.loss(p, X, y), params, v, mode=engine
        )
        for engine in ("taylor", "forward", "reverse")
    }
    engines["v'Hv of the estimate"] = lambda: _estimate(objective, X, y, v)
    for name, engine in engines.items():
        yield from _judge(f"{mode}: {name}", engine, truths, slopes_of_it, objective, X, u)
    yield from _judge_ggn(mode, objective, X, u, generator)
    if mode == "eval":
        why = why_not_linear(call_as_it_is(model, X), params)
        yield Row("eval: tr(H) = tr(G)", "no" if why else "yes", why or "piecewise linear")


def _estimate(objective: Objective, X: Tensor, y: Tensor, v: Params) -> Tensor:
    params = objective.params
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    check_graph(*grad.values())
    product = hvp(grad, params, v)
    return torch.stack([(product[n] * v[n]).sum() for n in v]).sum().detach()


def _judge(
    name: str,
    engine: Callable[[], Tensor],
    truths: list[float],
    true_slopes: list[float],
    objective: Objective,
    X: Tensor,
    u: Params,
) -> Iterator[Row]:
    try:
        value = engine()
        yield _compared(f"{name}, value", value.item(), truths)
        if value.requires_grad:
            grads = gradient(value, objective.params)
            slope = torch.stack([(grads[n] * u[n]).sum() for n in u]).sum().item()
            yield _compared(f"{name}, gradient", slope, true_slopes, tolerance=10 * _TOLERANCE)
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if "taylor" in name:
            yield Row(name, "no", f"forward mode is taken: {' '.join(str(problem).split())[:80]}")
            return
        reason = refuse(problem, objective, X)
        if not isinstance(reason, HesstraceError):
            raise reason from problem
        yield Row(name, "refused", str(reason))


def _judge_ggn(
    mode: str, objective: Objective, X: Tensor, u: Params, generator: Generator
) -> Iterator[Row]:
    """The penalty on tr(G): its gradient against differences of its value, taken natively."""
    params, model = objective.params, objective.model
    keep = draw_keep(params, scheme="none", keep_prob=1.0, generator=generator)
    signs = rademacher(call_as_it_is(model, X).detach(), generator=generator)

    def native(t: float) -> float:
        values = {n: (p.detach() + t * u[n]).requires_grad_() for n, p in params.items()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        logits = functional_call(model, {**values, **buffers}, (X,))
        grads = torch.autograd.grad(
            logits, list(values.values()), softmax_root(logits, signs).detach(),
            materialize_grads=True,
        )  # fmt: skip
        return sum(g.square().sum().item() for g in grads) / len(X)

    def engine() -> Tensor:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with differentiable_ops(order=2):
            logits = functional_call(model, {**params, **buffers}, (X,))
        value = torch.stack(list(trace_sample(logits, params, signs, keep).values())).sum()
        check_graph(value)
        return value

    name = f"{mode}: penalty on tr(G)"
    yield from _judge(name, engine, [native(0.0)], slopes(native), objective, X, u)


def _compared(name: str, value: float, truths: list[float], tolerance: float = _TOLERANCE) -> Row:
    """Right if it agrees with the differences for one step; wrong if these agree with each other.

    Where neither holds, as with kinks everywhere, differences cannot tell.
    """

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9)

    truth = min(truths, key=lambda t: abs(t - value))
    detail = f"{value:.6g}, by differences {truth:.6g}"
    if near(value, truth):
        return Row(name, "right", detail)
    settled = len(truths) == 1 or any(near(a, b) for a, b in pairwise(truths))
    return Row(name, "wrong" if settled else "unsettled", detail)


class _Watch(TorchFunctionMode):
    """Notes which replaced operations are called, and in which module."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in replacements():
            self.found.append((self.stack[-1] if self.stack else "the model", func.__name__))
        return func(*args, **(kwargs or {}))


def replaced_modules(model: nn.Module, X: Tensor) -> list[tuple[str, str]]:
    """The innermost module and the operation, wherever one is replaced by a differentiable form."""
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
    return list(dict.fromkeys(watch.found))
