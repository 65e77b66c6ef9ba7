"""Gradients by parameter name, and the dead ends of autograd's graphs.

Autograd marks the output of a backward without a derivative of its own with a node that raises
when it is reached; but asked for the gradient in given parameters, it takes the path through such a
node as unused, and the derivative comes out as zero. So the graph is searched for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def gradient(loss: Tensor, params: Params, *, create_graph: bool = False) -> dict[str, Tensor]:
    """The gradient by name; zeros for a parameter that the loss does not use."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, retain_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    return named(params, grads)


def named(names: Iterable[str], grads: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients by name; a sparse one, as `nn.Embedding(sparse=True)` gives, is made dense."""
    pairs = zip(names, grads, strict=True)
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in pairs}


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The inner product over the names in `b`."""
    return torch.stack([(a[name] * part).sum() for name, part in b.items()]).sum()


def topological(*outputs: Tensor) -> Iterator[Any]:
    """The nodes of the graph behind some tensors, each after all that it depends on."""
    stack: list[tuple[Any, bool]] = [(o.grad_fn, False) for o in outputs]
    seen: set[Any] = set()
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions)


def leaves(*outputs: Tensor) -> Iterator[Tensor]:
    """The tensors that some others depend on and whose gradient is accumulated."""
    return (node.variable for node in topological(*outputs) if hasattr(node, "variable"))


_DEAD_ENDS = ("Error", "NotImplemented")


def check_graph(*outputs: Tensor) -> None:
    """Look for nodes of the graph that cannot be differentiated again.

    Raises:
        NotImplementedError: If there is one.
    """
    for node in topological(*outputs):
        if node.name().rpartition("::")[2] in _DEAD_ENDS:
            raise NotImplementedError("a backward in the graph has no derivative of its own")
