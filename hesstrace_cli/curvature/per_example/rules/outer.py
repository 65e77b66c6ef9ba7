"""The squared norm of a sum of outer products, by the cheaper of two forms."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.curvature.per_example.rules import chunks
from hesstrace_cli.curvature.per_example.rules.layout import (
    Rows,
    in_full,
    is_recorded,
    total_squares,
)


class Outer:
    """||sum_l g_l x_l^T||^2 for one set of x and one g after another.

    Args:
        rows: Gives x, shape (N, L, d), from `source`.
        source: A tensor.
    """

    def __init__(self, source: Tensor, rows: Rows) -> None:
        self.source, self.rows = source, rows
        self.X = rows(source)
        self._gram: Tensor | None = None

    def norms(self, source: Tensor, rows: Rows, scale: Tensor | None = None) -> Tensor:
        """The squared norms (N,), by the cheaper of the two forms.

        Args:
            source: A tensor.
            rows: Gives G, shape (N, L, k), from it.
            scale: Multiplies the entries of the gradient, shape (k, d).
        """
        G, X = rows(source), self.X
        N, L, k = G.shape
        d = X.shape[2]
        if L == 1:
            return _norms_of_rows(G[:, 0], X[:, 0], scale)
        recorded = is_recorded(G, X)
        if scale is not None or not gram_is_cheaper(L, k, d, recorded=recorded):
            if recorded:
                return total_squares(G.mT @ X, scale)
            return chunks.in_chunks(lambda g, x: total_squares(g.mT @ x, scale), k * d, G, X)
        if recorded:
            return gram_norms(source, self.source, rows, self.rows)
        if N * L * L > chunks.CHUNK:
            return chunks.in_chunks(lambda g, x: ((g @ g.mT) * (x @ x.mT)).sum((1, 2)), L * L, G, X)
        if self._gram is None:
            self._gram = X @ X.mT
        return ((G @ G.mT) * self._gram).sum((1, 2))


def gram_is_cheaper(L: int, k: int, d: int, *, recorded: bool) -> bool:
    """Whether (g g^T) * (x x^T) takes fewer products than g^T x does, L by k and L by d.

    Differentiated, the former takes four products of L L k or L L d numbers, the latter three of
    L k d; else g^T x is one, and x x^T is shared by many g.
    """
    return 2 * L * (k + d) < 3 * k * d if recorded else L * k + L * L <= k * d


def _norms_of_rows(G: Tensor, X: Tensor, scale: Tensor | None) -> Tensor:
    """||s * (g x^T)||^2 of one row an example."""
    G, X = in_full(G).square(), in_full(X).square()
    if scale is None:
        return G.sum(1) * X.sum(1)
    return ((G @ scale.square()) * X).sum(1)


class Windows(Protocol):
    """How Gram matrices of patches are sums of parts of one of pixels, and back."""

    def sums(self, gram: Tensor) -> Tensor:
        """Of the patches, from that of the pixels."""

    def spread(self, gram: Tensor) -> Tensor:
        """The derivative: of the pixels' shape, from the patches'."""


def gram_norms(
    g: Tensor, x: Tensor, rows_of_g: Rows, rows_of_x: Rows, windows: Windows | None = None
) -> Tensor:
    """sum_{l,l'} (g_l . g_l') (x_l . x_l'), to be differentiated once.

    Args:
        g: A tensor.
        x: A tensor.
        rows_of_g: Gives the rows g_l from the former.
        rows_of_x: Gives the rows x_l from the latter.
        windows: If these are pixels, and x_l patches of them.
    """
    norms: Tensor = _GramNorms.apply(g, x, rows_of_g, rows_of_x, windows)
    return norms


class _GramNorms(torch.autograd.Function):
    """Only the two Gram matrices are held.

    The derivative in g is 2 (x x^T) g, that in x is 2 (g g^T) x; g and x are made again for it.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, rows_of_g: Rows, rows_of_x: Rows, windows: Windows | None
    ) -> Tensor:
        G, X = in_full(rows_of_g(g)), in_full(rows_of_x(x))
        gram_of_g, gram_of_x = G @ G.mT, X @ X.mT
        if windows is not None:
            gram_of_x = windows.sums(gram_of_x)
        ctx.save_for_backward(g, x, gram_of_g, gram_of_x)
        ctx.settings = rows_of_g, rows_of_x, windows
        return (gram_of_g * gram_of_x).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        g, x, gram_of_g, gram_of_x = ctx.saved_tensors
        rows_of_g, rows_of_x, windows = ctx.settings
        needs_g, needs_x = ctx.needs_input_grad[:2]
        twice = 2 * slope[:, None, None]
        of_g = of_x = None
        if needs_g:
            of_g = _pulled(rows_of_g, g, twice * gram_of_x)
        if needs_x:
            gram = twice * gram_of_g
            of_x = _pulled(rows_of_x, x, gram if windows is None else windows.spread(gram))
        return of_g, of_x, None, None, None


def _pulled(rows: Rows, source: Tensor, gram: Tensor) -> Tensor:
    """The gradient in `source` where that in its rows is the Gram matrix times them."""
    with torch.enable_grad():
        source = source.detach().requires_grad_()
        made = rows(source)
    with torch.no_grad():
        slope = (gram @ in_full(made)).to(made.dtype)
    (grad,) = torch.autograd.grad(made, source, slope)
    return grad
