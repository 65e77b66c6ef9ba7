"""The Gauss-Newton part G of the Hessian of a mean softmax cross-entropy, and its trace.

    G = (1/N) sum_i J_i^T A_i J_i,   A_i = diag(p_i) - p_i p_i^T

with J_i the Jacobian of example i's logits in the parameters and p_i its softmax. G does not
depend on the targets, nor on label smoothing, and is never negative. Where the logits are
linear in each single weight, as in ReLU networks in eval mode, tr(H) = tr(G) exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from hesstrace_cli.curvature.graph import gradient
from hesstrace_cli.curvature.probes import Params


def softmax_root(logits: Tensor, e: Tensor) -> Tensor:
    """B e for the factor B = diag(sqrt p) - p sqrt(p)^T, which has B B^T = A.

    sqrt(p) is taken as exp(log_softmax / 2), whose gradient is finite where p underflows.

    Args:
        logits: Shape (N, C).
        e: Shape (N, C), or anything that broadcasts with it.
    """
    root = torch.exp(F.log_softmax(logits, dim=-1) / 2)
    return root * e - root.square() * (root * e).sum(-1, keepdim=True)


def softmax_hessian(logits: Tensor, vector: Tensor) -> Tensor:
    """A v for A = diag(p) - p p^T; both of shape (N, C)."""
    p = F.softmax(logits, dim=-1)
    return p * vector - p * (p * vector).sum(-1, keepdim=True)


def trace_sample(logits: Tensor, params: Params, signs: Tensor, keep: Params) -> dict[str, Tensor]:
    """One unbiased sample of tr(G), tensor by tensor, to estimate or to differentiate.

        t = || s * sum_i J_i^T B_i e_i ||^2 / N,   E[t] = tr(G)

    as the cross terms vanish for independent signs e_i. This is one backward pass of the batch
    with the cotangent u_i = B_i e_i, which is not detached: it depends on the parameters.

    Args:
        logits: Shape (N, C), of a batch of N, with a graph to the parameters.
        params: The parameters w by name.
        signs: e, shape (N, C), independent signs.
        keep: The factors s of `draw_keep`; tensors left out cost no derivative.

    Returns:
        For each kept tensor its part of t, 0-dim, with a graph to all parameters.
    """
    u = softmax_root(logits, signs)
    grads = torch.autograd.grad(
        logits, [params[name] for name in keep], grad_outputs=u, create_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    return {
        name: (factor * g).square().sum() / len(logits)
        for (name, factor), g in zip(keep.items(), grads, strict=True)
    }


def ggn_vp(
    logits_of: Callable[[Params], Tensor], params: Params, probe: Params
) -> dict[str, Tensor]:
    """The product G v = (1/N) sum_i J_i^T A_i J_i v.

    Args:
        logits_of: The logits, shape (N, C), as a function of the parameters; it must run its
            model inside `differentiable_ops`.
        params: The parameters w, needing a gradient.
        probe: v, by name; names left out count as zero.

    Returns:
        G v by name, in the shapes of `params`.
    """
    kept = {name: params[name] for name in probe}

    def of_kept(parts: Any) -> Tensor:
        return logits_of({**params, **parts})

    logits, pushed = jvp(of_kept, (kept,), (dict(probe),))  # type: ignore[misc]
    cotangent = softmax_hessian(logits, pushed).detach() / len(logits)
    return gradient((logits * cotangent).sum(), params)
