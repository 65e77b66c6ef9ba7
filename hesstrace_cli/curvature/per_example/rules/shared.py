"""A weight that several operations take: linear layers, as over time, and embeddings tied to them.

Each of them adds outer products a_l b_l^T to an example's gradient, in the weight's orientation:
of a linear layer g_l and x_l, of an embedding the unit vector of a word and g_l. So

    || sum_l a_l b_l^T ||^2   =   sum_{l,l'} (a_l . a_l') (b_l . b_l')

over the positions of all operations together, and no vector over the words is made for embeddings:

    sum_{s,s'} [w_s = w_s'] g_s . g_s'   +   sum_{l,l'} (u_l . u_l') (h_l . h_l')
        +   2 sum_{l,s} u_l[w_s] (h_l . g_s)

with words w_s, and gradients u_l over the words of linear layers with inputs h_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.rules.chunks import in_chunks
from hesstrace_cli.curvature.per_example.rules.embedding import embedding
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    Scales,
    in_full,
    total_squares,
)
from hesstrace_cli.curvature.per_example.rules.outer import Outer

View = tuple[str, Any, Tensor, Tensor]
"""A role, an operation, and how it sees the parameter in that role, which is the last."""


def takes_rows(nodes: Sequence[Any]) -> bool:
    """Whether operations are linear layers and embeddings, and nothing else."""
    return all(_is_linear(node) or _is_embedding(node) for node in nodes)


def shared_rule(nodes: Sequence[Any], views: Sequence[View]) -> Shared | None:
    """The rule of several operations that take the same weight, or weight and bias.

    Args:
        nodes: The operations, those that `takes_rows`.
        views: How each sees its parameters.
    """
    flipped: dict[Any, bool] = {}
    for role, node, view, p in views:
        if role == "weight" and p.dim() == 2 and view.shape == p.mT.shape:
            flipped[node] = view.stride() == p.mT.stride()
        same = view.shape == p.shape and view.stride() == p.stride()
        if not same and not flipped.get(node):
            return None
    tied = [node for node in nodes if _is_embedding(node)]
    linear = [node for node in nodes if not _is_embedding(node)]
    if tied and not all(flipped.get(node) for node in linear):  # whose outputs are no words
        return None
    return Shared(nodes, flipped)


def _is_embedding(node: Any) -> bool:
    return operation(node) == "Embedding" and embedding(node) is not None


def _is_linear(node: Any) -> bool:
    if operation(node) == "Mm":
        return True
    return operation(node) == "Addmm" and node._saved_alpha == node._saved_beta == 1


@dataclass
class Words:
    """What embeddings have of a tied weight.

    Attributes:
        at: The words w_s of every example, (N, L).
        grads: g_s, (N, L, d), 0 for padding.
    """

    at: Tensor
    grads: Tensor

    def own(self) -> Tensor:
        """Their part by themselves, (N,)."""

        def of(G: Tensor, at: Tensor) -> Tensor:
            return (G * ((at[:, :, None] == at[:, None, :]).to(G) @ G)).sum((1, 2))

        return in_chunks(of, self.at.shape[1] ** 2, self.grads, self.at)

    def across(self, picked: Tensor, hidden: Tensor) -> Tensor:
        """Twice the part that they have with linear layers, (N,).

        Args:
            picked: u_l[w_s], (N, L', L).
            hidden: h_l, (N, L', d).
        """
        return 2 * (picked * (hidden @ self.grads.mT)).sum((1, 2))

    def picked_from(self, U: Tensor) -> Tensor:
        """u_l[w_s], (N, L', L), of gradients (N, L', words)."""
        return U.gather(2, self.at[:, None].expand(-1, U.shape[1], -1))


class Shared:
    """What several operations have of a weight.

    Args:
        nodes: The operations.
        flipped: Which of the linear ones take its transpose.

    Attributes:
        is_tied: Whether embeddings are among them.
    """

    def __init__(self, nodes: Sequence[Any], flipped: dict[Any, bool]) -> None:
        self.nodes = nodes
        self.is_tied = any(map(_is_embedding, nodes))
        self._flipped = flipped
        self._remembered: dict[Layout, Outer] = {}

    @property
    def kind(self) -> str:
        """What users know it as."""
        if all(map(_is_embedding, self.nodes)):
            return "embeddings used several times"
        return "tied embeddings" if self.is_tied else "linear layers used several times"

    def norms(self, rows: Sequence[Tensor], layout: Layout, scales: Scales) -> Norms:
        """The squared norms (N,) by role, from the rows of every operation's g."""
        result: Norms = {}
        grads = [layout.group(g) for g in rows]
        if "bias" in scales:
            summed = torch.stack([in_full(g).sum(1) for g in grads]).sum(0)
            result["bias"] = total_squares(summed, scales["bias"])
        if "weight" not in scales:
            return result
        if self.is_tied:
            result["weight"] = self._of_tied(grads, layout)
        else:
            result["weight"] = self._of_linear(grads, layout, scales["weight"])
        return result

    def inputs(self, node: Any) -> Tensor:
        """X of a linear layer, (R, d)."""
        X: Tensor = node._saved_mat1 if operation(node) == "Addmm" else node._saved_self
        return X

    def at(self, layout: Layout) -> Tensor:
        """The words of the embeddings, (N, L)."""
        nodes = filter(_is_embedding, self.nodes)
        return torch.cat([layout.group(node._saved_indices.flatten()) for node in nodes], 1)

    def words(self, grads: Sequence[Tensor], layout: Layout) -> Words:
        """What the embeddings have, from their g (N, L, d), in their order."""
        kept = []
        for node, g in zip(filter(_is_embedding, self.nodes), grads, strict=True):
            at = layout.group(node._saved_indices.flatten())
            kept.append(in_full(g) * (at != node._saved_padding_idx)[..., None])
        return Words(self.at(layout), torch.cat(kept, 1))

    def _of_linear(self, grads: Sequence[Tensor], layout: Layout, scale: Tensor | None) -> Tensor:
        pairs = [
            (g, layout.group(self.inputs(node))) if self._flipped.get(node)
            else (layout.group(self.inputs(node)), g)
            for node, g in zip(self.nodes, grads, strict=True)
        ]  # fmt: skip
        first = torch.cat([a for a, _ in pairs], 1)
        if all(self._flipped.get(node) for node in self.nodes):  # the inputs stay the same
            if layout not in self._remembered:
                inputs = torch.cat([b for _, b in pairs], 1)
                self._remembered[layout] = Outer(inputs, _as_it_is)
            return self._remembered[layout].norms(first, _as_it_is, scale)
        return Outer(torch.cat([b for _, b in pairs], 1), _as_it_is).norms(first, _as_it_is, scale)

    def _of_tied(self, grads: Sequence[Tensor], layout: Layout) -> Tensor:
        of = dict(zip(self.nodes, grads, strict=True))
        linear = [node for node in self.nodes if not _is_embedding(node)]
        words = self.words([of[node] for node in self.nodes if _is_embedding(node)], layout)
        total = words.own()
        if not linear:
            return total
        U = in_full(torch.cat([of[node] for node in linear], 1))
        H = in_full(torch.cat([layout.group(self.inputs(node)) for node in linear], 1))
        return (
            total + Outer(H, _as_it_is).norms(U, _as_it_is) + words.across(words.picked_from(U), H)
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
