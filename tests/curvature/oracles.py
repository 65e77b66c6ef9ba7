"""Derivatives from values of the unmodified model alone, by finite differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call

_SECOND = (-1 / 560, 8 / 315, -1 / 5, 8 / 5, -205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560)


def flatten(params):
    return torch.cat([p.detach().flatten() for p in params.values()])


def unflatten(flat, params):
    parts = flat.split([p.numel() for p in params.values()])
    return {n: part.reshape(p.shape) for part, (n, p) in zip(parts, params.items(), strict=True)}


@torch.no_grad()
def native_loss(model, params, X, y):
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return F.cross_entropy(functional_call(model, {**params, **buffers}, (X,)), y)


def second_difference(loss, w, v, step=2e-3):
    """d^2/dt^2 loss(w + t v) at 0, to eighth order."""
    return sum(c * loss(w + (i - 4) * step * v) for i, c in enumerate(_SECOND)) / step**2


def first_difference(function, w, u, step=1e-3):
    """d/dt function(w + t u) at 0, to fourth order."""
    parts = ((-1 / 12, 2), (2 / 3, 1), (-2 / 3, -1), (1 / 12, -2))
    return sum(c * function(w + s * step * u) for c, s in parts) / step


def dense_hessian(objective, X, y):
    """H of the objective by double backward, column by column, of the unmodified operations."""
    params = objective.params

    def loss(flat):
        values = unflatten(flat, params)
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        return F.cross_entropy(functional_call(objective.model, {**values, **buffers}, (X,)), y)

    return torch.autograd.functional.hessian(loss, flatten(params))


def dense_ggn(objective, X):
    """G written out: the logits' Jacobian and the softmax Hessian of every example."""
    params = objective.params

    def logits(flat):
        values = unflatten(flat, params)
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        return functional_call(objective.model, {**values, **buffers}, (X,))

    jacobian = torch.autograd.functional.jacobian(logits, flatten(params), create_graph=False)
    p = F.softmax(logits(flatten(params)), -1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, A, jacobian).detach() / len(X)
