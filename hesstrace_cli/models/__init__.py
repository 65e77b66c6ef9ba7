"""Models by name: built in, from torchvision, or a user's factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torchvision import models as torchvision_models

from hesstrace_cli.autodiff.calls import eval_mode
from hesstrace_cli.config import did_you_mean, likely, shortened
from hesstrace_cli.errors import ModelError
from hesstrace_cli.failures import is_of_the_machine, is_out_of_memory
from hesstrace_cli.models.cifar import WideResNet, cifar_resnet
from hesstrace_cli.models.hugging_face import PREFIX as HUGGING_FACE
from hesstrace_cli.models.hugging_face import hugging_face
from hesstrace_cli.models.language import GPT, LSTM
from hesstrace_cli.models.small import MLP, small_cnn
from hesstrace_cli.plugins import accepted, call_factory, is_factory, load_factory
from hesstrace_cli.randomness import random_state_kept, seed_defaults

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": small_cnn,
    "mlp": MLP,
    "resnet18": partial(cifar_resnet, torchvision_models.resnet18),
    "resnet50": partial(cifar_resnet, torchvision_models.resnet50),
    "wrn-16-4": partial(WideResNet, depth=16, widen=4),
    "wrn-28-10": partial(WideResNet, depth=28, widen=10),
    "lstm": LSTM,
    "gpt": GPT,
}
TORCHVISION = "torchvision:"


def is_plugin(spec: str) -> bool:
    """Whether building this model imports code of the user's."""
    return is_factory(spec) and not spec.startswith((TORCHVISION, HUGGING_FACE))


def build_model(
    spec: str,
    *,
    num_classes: int,
    in_shape: Sequence[int],
    model_args: Mapping[str, Any],
    seed: int,
    task: str = "classification",
) -> nn.Module:
    """Build a model with weights that depend on the seed alone.

    Args:
        spec: A built-in name, `torchvision:NAME`, `hf:DIR`, `hf:CONFIG.json`, `FILE.py:factory` or
            `package.module:factory`.
        num_classes: Number of logits; given to a factory that takes it, as is `in_shape`.
        in_shape: Shape of one input, (C, H, W) for images.
        model_args: The user's `--model-arg`s.
        seed: Seeds the initial weights; the global random state is untouched.
        task: What outputs are for; of Hugging Face's models it says which.

    Raises:
        ModelError: If the name is not known, or the factory refuses its arguments.
    """
    factory = _factory(spec, task)
    offered = {"num_classes": num_classes, "in_shape": tuple(in_shape)}
    if getattr(factory, "__init__", None) is nn.Module.__init__:  # it takes none, but says any
        offered = {}
    if spec in BUILT_IN:
        _check_arguments(spec, factory, model_args)
    arguments = {**accepted(factory, offered), **model_args}
    with random_state_kept():
        seed_defaults(seed)
        try:
            model = call_factory(factory, arguments, f"model {spec}", ModelError)
        except (TypeError, ValueError, RuntimeError) as problem:
            if is_out_of_memory(problem) or (is_plugin(spec) and not model_args):
                raise
            raise ModelError(f"model {spec!r} cannot be built: {problem}") from problem
    _check_model(model, spec)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if any(map(is_lazy, _tensors(model))):
        with random_state_kept():
            seed_defaults(seed)
            _initialize(model, in_shape, spec)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # a form of its gradient, which few second derivatives take
    return model


_LEAST = {"depth": 0}  # of a number of layers or of what is in one, 1
_KINDS: dict[type, str] = {float: "a number", bool: "true or false", str: "a name"}


def _check_arguments(
    spec: str, factory: Callable[..., nn.Module], given: Mapping[str, Any]
) -> None:
    """Refuse arguments that a built-in model does not have, or of another kind.

    Raises:
        ModelError: Saying what is expected.
    """
    known = inspect.signature(factory, eval_str=True).parameters
    for name, value in given.items():
        if name not in known:
            own = [each for each in known if each not in ("num_classes", "in_shape")]
            raise ModelError(
                f"model {spec!r} has no argument {shortened(name)}{did_you_mean(name, own)} It "
                f"takes {', '.join(own) or 'none'}"
            )
        kind, least = known[name].annotation, _LEAST.get(name, 1)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is int and not (fits and value >= least):
            expected = f"a whole number, at least {least}"
        elif kind in _KINDS and not fits:
            expected = _KINDS[kind]
        else:
            continue
        raise ModelError(f"model {spec!r}: its {name} is {shortened(value)}, expected {expected}")


def _check_model(model: Any, spec: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec!r} gave a {type(model).__name__}, expected a torch.nn.Module"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model {spec!r} is scripted, so that its parameters cannot be varied; give the module "
            "as it is, before torch.jit.script or trace"
        )
    if any(tensor.is_meta for tensor in _tensors(model)):
        raise ModelError(f"model {spec!r} has tensors on the meta device, which have no data")
    for name, p in model.named_parameters():
        if not is_lazy(p) and _overlaps(p):
            raise ModelError(
                f"parameter {name!r} of model {spec!r} has entries in the same memory, as expand() "
                "leaves them, which cannot be moved; make it of a clone()"
            )


def _overlaps(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _initialize(model: nn.Module, in_shape: Sequence[int], spec: str) -> None:
    """Give lazy modules their parameters by a forward pass."""
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(2, *in_shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        if is_of_the_machine(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"model {spec!r} has lazy modules, and the forward pass on inputs of shape "
            f"{tuple(in_shape)} that would initialize them failed: {reason}"
        ) from problem


def _factory(spec: str, task: str) -> Callable[..., nn.Module]:
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if spec.startswith(TORCHVISION):
        return partial(_torchvision_model, spec.removeprefix(TORCHVISION))
    if spec.startswith(HUGGING_FACE):
        return partial(hugging_face, spec, task=task)
    if is_factory(spec):
        return load_factory(spec, ModelError)
    raise ModelError(
        f"no model is called {shortened(spec)}{_meant(spec)} Built in: {', '.join(BUILT_IN)}; "
        "or torchvision:NAME, hf:DIR, hf:CONFIG.json, FILE.py:factory, package.module:factory"
    )


def _meant(spec: str) -> str:
    """Half a sentence on a name that is not known."""
    if spec.endswith(".py"):
        return f"; a file's factory is named behind a colon: {shortened(spec + ':build')}."
    elsewhere = torchvision_models.list_models(module=torchvision_models)
    near = likely(spec, [*elsewhere, *BUILT_IN])
    return "." if near is None else f"; did you mean {_full(near)!r}?"


def _full(name: str) -> str:
    return name if name in BUILT_IN else TORCHVISION + name


def _torchvision_model(name: str, **arguments: Any) -> nn.Module:
    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        raise ModelError(
            f"torchvision has no classification model {shortened(name)}{did_you_mean(name, known)}"
        )
    arguments.pop("in_shape", None)
    model: nn.Module = torchvision_models.get_model(name, weights=None, **arguments)
    return model
