"""Calls of layers that have a rule, noted at the nodes of the graph that they give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
    """From now on, note calls of this class of layers."""
    if not _noted:
        register_module_forward_hook(_note, with_kwargs=True)
    _noted.add(kind)


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
