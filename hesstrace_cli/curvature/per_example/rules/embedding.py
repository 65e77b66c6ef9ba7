"""Embeddings: the rows of one word add up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesstrace_cli.curvature.per_example.rules.chunks import in_chunks
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms, NormsOf, Scales, in_full


def embedding(node: Any) -> NormsOf | None:
    """A table, its padding row held."""
    if node._saved_scale_grad_by_freq:
        return None
    indices, padding = node._saved_indices.flatten(), node._saved_padding_idx

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        def of(G: Tensor, at: Tensor) -> Tensor:
            return (G * ((at[:, :, None] == at[:, None, :]).to(G) @ G)).sum((1, 2))

        at, scale = layout.group(indices), scales["weight"]
        G = in_full(layout.group(g)) * (at != padding)[..., None]
        G = G if scale is None else G * scale[at]
        return {"weight": in_chunks(of, at.shape[1] ** 2, G, at)}

    return norms
