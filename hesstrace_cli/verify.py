"""Are the derivatives right for this model, on this machine? A row a check, with a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hesstrace_cli.casting import cast_model
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
from hesstrace_cli.data import load_data
from hesstrace_cli.estimation import versions
from hesstrace_cli.failures import is_of_the_machine
from hesstrace_cli.loading import check_fit, check_training_output, select_device
from hesstrace_cli.models import build_model
from hesstrace_cli.precision import full_precision
from hesstrace_cli.stepcost import step_costs
from hesstrace_cli.verdicts import (
    GOOD,
    NEARER_STEPS,
    Row,
    Truth,
    judge,
    one_line,
    pinned,
    with_fallbacks,
)

SCHEMA = "hesstrace/verify/1"
_MOST_NAMED = 3
_ENGINES = ("taylor", "forward", "reverse")


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
    )  # fmt: skip
    cast_model(model, device, torch.float64)
    check_fit(model, data, config.model)
    check_training_output(model, data, config.model)
    _move_aside(model, config.seed)
    X, y = next(data.train.batches(config.batch_size))
    again, _ = next(data.train.batches(config.batch_size))
    rows = [_data_repeats(torch.equal(X, again))]
    for mode in ("train", "eval"):
        model.train(mode == "train")
        objective = Objective(model, trainable(model), data.train.task)
        with full_precision():
            rows += _rows(objective, X, y, mode, config.seed)
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


def _data_repeats(same: bool) -> Row:
    if same:
        return Row("data: results repeat", "yes", "read twice, the same examples in the same order")
    detail = "read twice, the first batch differs: the data set draws random numbers or an order"
    return Row("data: results repeat", "refused", detail)


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


def _rows(objective: Objective, X: Tensor, y: Tensor, mode: str, seed: int) -> Iterator[Row]:
    model, task = objective.model, objective.task
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
        with pinned(X):
            outputs, values = _displaced(model, params, X, [(t, v), (s, u)])
            grads = gradient(task.loss(outputs, y), values)
        return sum((grads[n] * v[n]).sum().item() for n in v)

    try:
        truths, slopes_of_it = slopes(native, (*STEPS, *NEARER_STEPS)), mixed(native)
    except (RuntimeError, NotImplementedError) as problem:
        if is_of_the_machine(problem):
            raise
        yield Row(f"{mode}: the model's own gradient", "refused", one_line(problem))
        return
    truth = Truth(truths, slopes_of_it)
    engines: dict[str, list[Row]] = {}
    for name in _ENGINES:
        form = partial(
            quadratic_form, lambda p: objective.loss(p, X, y), params, v, mode=cast(Mode, name)
        )
        engines[name] = judge(f"{mode}: v'Hv, {name} mode", form, truth, objective, X, u)
    yield from with_fallbacks(engines, is_random=repeats.verdict == "no")
    estimate = partial(_estimate, objective, X, y, v)
    yield from judge(f"{mode}: v'Hv of the estimate", estimate, truth, objective, X, u)
    yield from _judge_ggn(mode, objective, X, y, u, generator)
    if mode == "eval":
        why = why_not_linear(call_as_it_is(model, X), params)
        yield Row("eval: tr(H) = tr(G)", "no" if why else "yes", why or "piecewise linear")


def _displaced(
    model: nn.Module, params: Params, X: Tensor, moves: Sequence[tuple[float, Params]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The unmodified model's logits at displaced parameters, and these, as leaves."""
    values = {n: p.detach().clone() for n, p in params.items()}
    for size, direction in moves:
        for name, part in direction.items():
            values[name] += size * part
    leaves = {n: value.requires_grad_() for n, value in values.items()}
    return call_as_it_is(model, X, leaves), leaves


def _repeats(model: nn.Module, X: Tensor, mode: str) -> Row:
    with torch.no_grad(), pinned(X):
        first = call_as_it_is(model, X)
    with torch.no_grad(), pinned(X):
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


def _estimate(objective: Objective, X: Tensor, y: Tensor, v: Params) -> Tensor:
    params = objective.params
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    check_graph(*grad.values())
    product = hvp(grad, params, v)
    return torch.stack([(product[n] * v[n]).sum() for n in v]).sum().detach()


def _judge_ggn(
    mode: str, objective: Objective, X: Tensor, y: Tensor, u: Params, generator: Generator
) -> Iterator[Row]:
    """The penalty on tr(G): its gradient against differences of its value, taken natively."""
    params, model, task = objective.params, objective.model, objective.task
    num_terms = task.num_terms(y)
    keep = draw_keep(params, scheme="none", keep_prob=1.0, generator=generator)
    signs = rademacher(call_as_it_is(model, X).detach(), generator=generator)

    def native(t: float) -> float:
        with pinned(X):
            outputs, values = _displaced(model, params, X, [(t, u)])
            cotangent = task.root(outputs.detach(), y, signs)
            grads = torch.autograd.grad(
                outputs, list(values.values()), cotangent, materialize_grads=True
            )
        return sum(g.square().sum().item() for g in grads) / num_terms

    def engine() -> Tensor:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with differentiable_ops(order=2):
            outputs = functional_call(model, {**params, **buffers}, (X,))
        parts = trace_sample(outputs, params, task.root(outputs, y, signs), keep, num_terms)
        value = torch.stack(list(parts.values())).sum()
        check_graph(value)
        return value

    name = f"{mode}: penalty on tr(G)"
    truth = Truth([native(0.0)], slopes(native, (*STEPS, *NEARER_STEPS)))
    yield from judge(name, engine, truth, objective, X, u)


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
