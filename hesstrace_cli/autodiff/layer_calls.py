"""Calls of layers that have a rule, noted at the nodes of the graph that they give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from hesstrace_cli.autodiff.graph import Params

_KEY = "hesstrace: calls of layers"
_noted: set[type[nn.Module]] = set()


@dataclass(frozen=True)
class LayerCall:
    """What a layer was called with.

    Attributes:
        layer: The module.
        args: Of its forward.
        kwargs: Of its forward.
        params: Its parameters then, by their names in it.
        place: Of its output among those of its node.
        versions: Of the tensors among the arguments, as writing to them makes others of them.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    params: Params
    place: int
    versions: tuple[int, ...]

    @property
    def is_intact(self) -> bool:
        """Whether the arguments still are what they were."""
        return self.versions == _versions(self.args, self.kwargs)

    def inside(self, node: Any) -> set[Any]:
        """The nodes between the output's and those of the arguments."""
        stop = {t.grad_fn for t in _tensors(self.args, self.kwargs) if t.grad_fn is not None}
        found: set[Any] = set()
        stack = [node]
        while stack:
            each = stack.pop()
            if each is not None and each not in stop and each not in found:
                found.add(each)
                stack.extend(following for following, _ in each.next_functions)
        return found


def note(kind: type[nn.Module]) -> None:
    """From now on, note calls of this class of layers inside `noting`."""
    _noted.add(kind)


class _Inside:
    depth = 0


@contextmanager
def noting() -> Iterator[None]:
    """Note calls of the layers in question; outside no hook is left on anyone's modules."""
    if not _noted or _Inside.depth:
        yield
        return
    handle = register_module_forward_hook(_note, with_kwargs=True)
    _Inside.depth += 1
    try:
        with warnings.catch_warnings():
            # It fires once more for the wrapper of a compiled part, which has no rule.
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are")
            yield
    finally:
        _Inside.depth -= 1
        handle.remove()
        # PyTorch forgets this entry, by which it still holds that there is a hook.
        getattr(modules, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)


def calls_at(node: Any) -> Iterator[LayerCall]:
    """The calls whose output a node gives, the innermost first."""
    if _noted:
        yield from node.metadata.get(_KEY, ())


def _note(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if type(layer) not in _noted or torch.compiler.is_compiling():
        return
    node: Any = output.grad_fn if isinstance(output, Tensor) else None
    if node is not None:
        call = LayerCall(
            layer, args, kwargs, dict(layer.named_parameters()), output.output_nr,
            _versions(args, kwargs),
        )  # fmt: skip
        node.metadata.setdefault(_KEY, []).append(call)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _versions(args: Any, kwargs: Any) -> tuple[int, ...]:
    return tuple(t._version for t in _tensors(args, kwargs))
