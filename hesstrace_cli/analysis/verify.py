"""Are the derivatives right for this model, on this machine? A row a check, with a verdict."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import versions
from hesstrace_cli.analysis.loading import check_fit, check_training_output, select_device
from hesstrace_cli.autodiff.calls import draws_random_numbers, eval_mode, native_outputs, trainable
from hesstrace_cli.autodiff.differentiable import is_replaced
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import VerifyConfig
from hesstrace_cli.curvature.checks.copies import checked, tries
from hesstrace_cli.curvature.checks.derivatives import Check
from hesstrace_cli.curvature.checks.verdicts import (
    GOOD,
    Row,
    is_settled,
    merged,
    pinned,
    with_fallbacks,
)
from hesstrace_cli.curvature.hessian import Mode
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.linearity import why_not_linear
from hesstrace_cli.data import Split, load_data
from hesstrace_cli.errors import DerivativeError
from hesstrace_cli.models import build_model
from hesstrace_cli.randomness import random_state_kept

SCHEMA = "hesstrace/verify/1"
_MOST_NAMED = 3
_ENGINES: tuple[Mode, ...] = ("taylor", "forward", "reverse")
_MORE = 4  # times the examples where differences do not settle
_PRECISION = ": checked in float64"


def verify(config: VerifyConfig) -> records.Verification:
    """Check the derivatives of a model against finite differences of itself.

    In float64, or in the model's own precision where it cannot run in that.

    Raises:
        HesstraceError: If the model or the data cannot be built.
    """
    device = select_device(config.device)
    data = load_data(config, device)
    model = build_model(
        config.model, num_classes=data.num_classes, in_shape=data.in_shape,
        model_args=config.model_arg, seed=config.seed, task=data.task.name,
    )  # fmt: skip
    model = model.to(device)
    check_fit(model, data, config.model)
    check_training_output(model, data, config.model)
    first = config.batch_size
    X, y = _first_batch(data.train, _MORE * first)
    again, _ = _first_batch(data.train, _MORE * first)
    rows = [_data_repeats(torch.equal(X, again))]
    objective = Objective(model, trainable(model), data.train.task)
    rows += rows_of_modes(objective, X, y, config.seed, first)
    return {
        "schema": SCHEMA,
        "model": config.model,
        "dataset": data.name,
        "task": data.task.name,
        "task_note": data.task_note,
        "right": all(row.verdict in GOOD for row in rows),
        "rows": [row.as_record() for row in rows],
        "dtype": "float32" if any(row.check.endswith(_PRECISION) for row in rows) else "float64",
        "device": str(device),
        "seed": config.seed,
        "versions": versions(),
    }


@full_precision()
def rows_of_modes(
    objective: Objective, X: Tensor, y: Tensor, seed: int, first: int | None = None
) -> list[Row]:
    """The rows in training and in eval mode; modes and random state are as before.

    Args:
        objective: Of the model.
        X: A batch.
        y: Its targets.
        seed: Of the directions looked along.
        first: So many examples are tried first, all of them only where that proves nothing.
    """
    rows: list[Row] = []
    with random_state_kept(), eval_mode(objective.model):  # which puts the modes back
        for mode in ("train", "eval"):
            objective.model.train(mode == "train")
            rows += _rows(objective, X, y, mode, seed, first)
    return rows


def _first_batch(split: Split, batch_size: int) -> tuple[Tensor, Tensor]:
    """The first batch with a term that counts: the loss of others is the constant 0."""
    batches = split.batches(batch_size)
    return next((X, y) for X, y in batches if split.task.num_terms(y))


def _data_repeats(same: bool) -> Row:
    if same:
        return Row("data: results repeat", "yes", "read twice, the same examples in the same order")
    detail = "read twice, the first batch differs: the data set draws random numbers or an order"
    return Row("data: results repeat", "refused", detail)


def _rows(
    objective: Objective, X: Tensor, y: Tensor, mode: str, seed: int, first: int | None = None
) -> Iterator[Row]:
    """The rows of a mode; more than the first examples are looked at where these prove nothing."""
    model, first = objective.model, len(X) if first is None else first
    some = X[:first]
    repeats = _repeats(model, some, mode)
    yield repeats
    if repeats.verdict == "refused":
        return
    replaced = _replaced(model, some)
    yield from (Row(f"{mode}: {what}", "replaced", detail) for what, detail in replaced)
    found: dict[str, list[Row]] = {}
    try:
        for examples, targets, number in tries(objective, X, y, first, seed):
            with checked(objective, examples, targets, seed=number, prefix=f"{mode}: ") as check:
                settled = _look(check, found)
            if settled:
                break
    except DerivativeError as problem:
        yield Row(f"{mode}: the model's own gradient", "refused", str(problem))
        return
    if check.note is not None:
        yield Row(f"{mode}{_PRECISION}", "no", check.note)
    yield from with_fallbacks({engine: found.pop(engine) for engine in _ENGINES})
    yield from itertools.chain(*found.values())
    if mode == "eval":
        why = why_not_linear(native_outputs(model, some), objective.params)
        yield Row("eval: tr(H) = tr(G)", "no" if why else "yes", why or "piecewise linear")


def _look(check: Check, found: dict[str, list[Row]]) -> bool:
    """Check what is not settled yet; whether all is now."""
    looks: dict[str, Callable[[], list[Row]]] = {
        **{str(engine): partial(check.hessian, engine) for engine in _ENGINES},
        "estimate": check.estimate,
        "estimate of G": check.estimate_of_ggn,
        "penalty on tr(G)": check.ggn,
        "norm rules": check.norm_rules,
    }
    for name, look in looks.items():
        if name not in found or not is_settled(found[name]):
            found[name] = merged(found.get(name, []), look())
    rest = [row for name, rows in found.items() if name not in _ENGINES for row in rows]
    return is_settled([*with_fallbacks({e: found[e] for e in _ENGINES}), *rest])


def _repeats(model: nn.Module, X: Tensor, mode: str) -> Row:
    with torch.no_grad(), pinned():
        first = native_outputs(model, X)
    with torch.no_grad(), pinned():
        second = native_outputs(model, X)
    name = f"{mode}: results repeat"
    if not torch.equal(first, second):
        return Row(name, "refused", "two passes differ though PyTorch's random state is the same: "
                   "it draws from elsewhere (random, numpy), or counts")  # fmt: skip
    if not draws_random_numbers(model, X):
        return Row(name, "yes", "")
    if mode == "train":
        return Row(name, "no", "it draws random numbers (Dropout), held fixed for these checks")
    return Row(name, "refused", "it draws random numbers (Dropout): its loss has no one Hessian")


class _Watch(TorchFunctionMode):
    """Notes which replaced operations are called, and in which module."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_replaced(func, args, kwargs or {}) or func is F.scaled_dot_product_attention:
            self.found.append((func.__name__, self.stack[-1] if self.stack else "the model"))
        return func(*args, **(kwargs or {}))


def _replaced(model: nn.Module, X: Tensor) -> Iterator[tuple[str, str]]:
    """Where an operation is replaced by a differentiable form: it and its innermost module."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            continue
        label = f"{name or 'the model'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(
            lambda _m, _i, label=label: watch.stack.append(label)
        ))  # fmt: skip
        handles.append(module.register_forward_hook(lambda _m, _i, _o: watch.stack.pop() and None))
    try:
        with torch.no_grad(), watch:
            native_outputs(model, X)
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
