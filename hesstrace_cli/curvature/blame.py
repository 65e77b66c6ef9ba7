"""Naming the module that has no derivative of the order that is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.autodiff.graph import check_graph
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ConfigError, DerivativeError
from hesstrace_cli.failures import is_of_the_machine


@contextmanager
def naming_fault(objective: Objective, X: Tensor) -> Iterator[None]:
    """Around what takes derivatives on a batch: raises `derivative_error` where that fails."""
    try:
        yield
    except RuntimeError as problem:  # NotImplementedError too
        raise derivative_error(problem, objective, X) from problem


_COMPILER = ("torch._dynamo", "torch._inductor")


def derivative_error(problem: Exception, objective: Objective, X: Tensor) -> Exception:
    """The error to raise for a derivative that failed: it names the innermost module at fault.

    Args:
        problem: What differentiating raised.
        objective: Its model is run once more, each module then tried by itself.
        X: The batch that it failed on.

    Returns:
        A DerivativeError; a ConfigError where the compiler failed; or `problem` itself where memory
        ran out or a device failed.
    """
    if is_of_the_machine(problem):
        return problem
    reason = " ".join(str(problem).split())
    if type(problem).__module__.startswith(_COMPILER):
        return ConfigError(
            f"PyTorch's compiler failed: {reason[:300]}; leave out --compile, or empty its cache "
            "(TORCHINDUCTOR_CACHE_DIR)"
        )
    name, module = _innermost_at_fault(objective, X)
    where = f"module {name!r} ({type(module).__name__})" if module is not None else "the model"
    return DerivativeError(
        f"{where} has no derivative of the order that its curvature needs: {reason[:300]}"
    )


def _innermost_at_fault(objective: Objective, X: Tensor) -> tuple[str, nn.Module | None]:
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, _output, name=name: calls.append((name, m, args, kwargs)),
            with_kwargs=True,
        )
        for name, module in objective.model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    ]
    try:
        objective.outputs(objective.params, X)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, args, kwargs in calls:  # inner modules return before outer ones
        if not _twice_differentiable(module, args, kwargs):
            return name or "model", module
    return "", None


def _twice_differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    inputs = [fresh(a) for a in args]
    variables = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    variables += [p for p in module.parameters() if p.requires_grad]
    if not variables:
        return True
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with differentiable_ops():
            output = functional_call(module, state, tuple(inputs), kwargs)
        tensors = [output] if isinstance(output, Tensor) else [
            o for o in output if isinstance(o, Tensor)
        ]  # fmt: skip
        total = torch.stack([t.square().sum() for t in tensors if t.is_floating_point()]).sum()
        grads = torch.autograd.grad(total, variables, create_graph=True, allow_unused=True)
        present = [g for g in grads if g is not None]
        check_graph(*present)
        again = torch.stack([g.square().sum() for g in present]).sum()
        torch.autograd.grad(again, variables, create_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as problem:
        if is_of_the_machine(problem):
            raise
        return False
    return True
