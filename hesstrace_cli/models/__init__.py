"""Models by name: built in, from torchvision, or a user's factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torchvision import models as torchvision_models

from hesstrace_cli.errors import ModelError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.models.cifar import WideResNet, cifar_resnet
from hesstrace_cli.models.small import MLP, small_cnn
from hesstrace_cli.plugins import accepted, call_factory, is_factory, load_factory

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": small_cnn,
    "mlp": MLP,
    "resnet18": partial(cifar_resnet, torchvision_models.resnet18),
    "resnet50": partial(cifar_resnet, torchvision_models.resnet50),
    "wrn-16-4": partial(WideResNet, depth=16, widen=4),
    "wrn-28-10": partial(WideResNet, depth=28, widen=10),
}
TORCHVISION = "torchvision:"


def is_plugin(spec: str) -> bool:
    """Whether building this model imports code of the user's."""
    return is_factory(spec) and not spec.startswith(TORCHVISION)


def build_model(
    spec: str,
    *,
    num_classes: int,
    in_shape: Sequence[int],
    model_args: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """Build a model with weights that depend on the seed alone.

    Args:
        spec: A built-in name, `torchvision:NAME`, `FILE.py:factory` or `package.module:factory`.
        num_classes: Number of logits; given to a factory that takes it, as is `in_shape`.
        in_shape: Shape of one input, (C, H, W) for images.
        model_args: The user's `--model-arg`s.
        seed: Seeds the initial weights; the global random state is untouched.

    Raises:
        ModelError: If the name is not known, or the factory refuses its arguments.
    """
    factory = _factory(spec)
    offered = {"num_classes": num_classes, "in_shape": tuple(in_shape)}
    arguments = {**accepted(factory, offered), **model_args}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = call_factory(factory, arguments, f"model {spec}", ModelError)
        except (TypeError, ValueError, RuntimeError) as problem:
            if is_out_of_memory(problem) or (is_plugin(spec) and not model_args):
                raise
            raise ModelError(f"model {spec!r} cannot be built: {problem}") from problem
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec!r} gave a {type(model).__name__}, expected a torch.nn.Module"
        )
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _initialize(model, in_shape, spec)
    return model


def _initialize(model: nn.Module, in_shape: Sequence[int], spec: str) -> None:
    """Give lazy modules their parameters by a forward pass."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *in_shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"model {spec!r} has lazy modules, and the forward pass on inputs of shape "
            f"{tuple(in_shape)} that would initialize them failed: {reason}"
        ) from problem
    for module, training in modes.items():
        module.training = training


def _factory(spec: str) -> Callable[..., nn.Module]:
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if spec.startswith(TORCHVISION):
        return partial(_torchvision_model, spec.removeprefix(TORCHVISION))
    if is_factory(spec):
        return load_factory(spec, ModelError)
    near = get_close_matches(spec, BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"no model is called {spec!r}{hint} Built in: {', '.join(BUILT_IN)}; "
        "or torchvision:NAME, FILE.py:factory, package.module:factory"
    )


def _torchvision_model(name: str, **arguments: Any) -> nn.Module:
    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(f"torchvision has no classification model {name!r}{hint}")
    arguments.pop("in_shape", None)
    model: nn.Module = torchvision_models.get_model(name, weights=None, **arguments)
    return model
