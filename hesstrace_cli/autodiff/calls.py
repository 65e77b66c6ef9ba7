"""A model called: with differentiable operations or its own, at given parameters, in a mode.

Nothing of it changes: its buffers, its modes and the global random state are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from hesstrace_cli.autodiff.arguments import arguments_of
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.errors import ModelError
from hesstrace_cli.randomness import random_state_kept


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that need a gradient, by name; a tied one once.

    Raises:
        ModelError: If there is none, or one that the loss has no Hessian in.
    """
    params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ModelError("the model has no trainable parameter, so its Hessian is empty")
    for name, p in params.items():
        if is_lazy(p):
            raise ModelError(
                f"parameter {name!r} is not initialized; run the model once on an input first"
            )
        if p.is_complex():
            raise ModelError(
                f"parameter {name!r} is complex, expected real ones, as the Hessian is taken in "
                "real numbers; hold it as a real tensor (..., 2) and use torch.view_as_complex"
            )
    return params


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Without the hooks on gradients of parameters, which are for those of the whole loss.

    A mask or a clip there would be taken twice, and change what a trace is of.
    """
    found = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in zip(found, kept, strict=True):
            hooks.update(own)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run what is inside in eval mode, `hooks_off`; every module's own mode is back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with hooks_off(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def outputs_of(output: Any) -> Tensor:
    """The outputs that a loss is taken of: a tensor, or the `logits` of a dict or object.

    Raises:
        ModelError: If it is neither.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else (
            getattr(output, "logits", None)
        )  # fmt: skip
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ModelError(
            f"the model gives a {kind}{keys}, expected a tensor, or a dict or object with logits; "
            "torchvision's auxiliary outputs: --model-arg aux_logits=false"
        )
    return found


def native_outputs(model: nn.Module, X: Tensor, params: Params | None = None) -> Tensor:
    """The outputs with the model's own operations, its buffers left as they are.

    They have first derivatives in eval mode too, where cuDNN's recurrent layers have none.

    Args:
        model: In the mode that is meant.
        X: A batch.
        params: Taken instead of the model's own.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with differentiable_ops(order=1), _reading(model, params or {}):
        return outputs_of(functional_call(model, {**buffers, **(params or {})}, *arguments_of(X)))


def differentiable_outputs(model: nn.Module, params: Params, X: Tensor) -> Tensor:
    """The outputs at other parameters, with differentiable operations.

    The model's own parameters and buffers stay as they are: it works on copies of the buffers, as
    BatchNorm counts its batches in place.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with differentiable_ops(), _reading(model, params):
        return outputs_of(functional_call(model, {**params, **buffers}, *arguments_of(X)))


def recorded_outputs(
    model: nn.Module, params: Params, X: Tensor, *, by_example: bool = True
) -> Tensor:
    """The outputs with a graph for second derivatives in reverse mode, buffers left as they are.

    Args:
        model: In the mode that is meant.
        params: The model's own.
        X: A batch.
        by_example: Whether batch norm's statistics can be held, see `differentiable_ops`.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with differentiable_ops(order=2, by_example=by_example):
        return outputs_of(functional_call(model, {**params, **buffers}, *arguments_of(X)))


class _Reading(TorchFunctionMode):
    """Gives the values asked for to whoever reads a parameter by another name than its own.

    `functional_call` replaces attributes of modules; a parameter may also be in a list, a closure
    or another object, and would be read from there as it is.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.found = False
        self._own = [own for own, _ in pairs]  # held, so that their numbers stay theirs
        self._given = {id(own): given for own, given in pairs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: self._replaced(each) for name, each in (kwargs or {}).items()}
        return func(*self._replaced(args), **named)

    def _replaced(self, thing: Any) -> Any:
        if type(thing) in (tuple, list):
            return type(thing)(map(self._replaced, thing))
        given = self._given.get(id(thing))
        self.found |= given is not None
        return thing if given is None else given


def _reading(model: nn.Module, params: Params) -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling():  # which cannot follow it, see `reads_by_other_names`
        return nullcontext()
    pairs = [(p, params[n]) for n, p in model.named_parameters() if params.get(n, p) is not p]
    return _Reading(pairs) if pairs else nullcontext()


def reads_by_other_names(model: nn.Module, X: Tensor) -> bool:
    """Whether the model reads a parameter in another way than as its module's attribute."""
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    watch = _Reading([(p, given[name]) for name, p in model.named_parameters()])
    with torch.no_grad(), random_state_kept(), watch:
        functional_call(model, {**buffers, **given}, *arguments_of(X))
    return watch.found


class _BatchStatistics(TorchFunctionMode):
    """Notes whether a batch norm takes its statistics from the batch."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.batch_norm, torch.batch_norm):
            by_position = args[5] if len(args) > 5 else False
            self.found |= bool(kwargs.get("training", by_position))
        return func(*args, **kwargs)


def uses_batch_statistics(model: nn.Module, X: Tensor) -> bool:
    """Whether the logits of one example depend on the others in its batch, through BatchNorm.

    Decided by the operations that a forward pass in the model's present mode runs, so that a
    batch norm called as a function is found too. The model and the random state are untouched.
    """
    with torch.no_grad(), random_state_kept(), _BatchStatistics() as watch:
        native_outputs(model, X)
    return watch.found


def draws_random_numbers(model: nn.Module, X: Tensor) -> bool:
    """Whether a forward pass in the model's present mode is random, as with active Dropout."""
    devices = [X.device] if X.device.type == "cuda" else []

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    with torch.no_grad(), random_state_kept():
        before = state()
        native_outputs(model, X)
        return any(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
