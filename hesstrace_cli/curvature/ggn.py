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
from torch.func import jvp, vjp

from hesstrace_cli.curvature.graph import check_graph, gradient, inner
from hesstrace_cli.curvature.probes import Params
from hesstrace_cli.failures import is_of_the_machine


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
    return traces_of(root_gradient(logits, params, signs, keep), keep, len(logits))


def traces_of(grads: Params, keep: Params, num_examples: int) -> dict[str, Tensor]:
    """|| s g ||^2 / N for each kept tensor, from `root_gradient` of a whole batch."""
    return {name: (keep[name] * g).square().sum() / num_examples for name, g in grads.items()}


def root_gradient(logits: Tensor, params: Params, signs: Tensor, keep: Params) -> dict[str, Tensor]:
    """G = sum_i J_i^T B_i e_i for each kept tensor, with a graph to all parameters.

    The arguments are those of `trace_sample`. g is a sum over the examples: those of the parts of
    a batch add up, which the samples ||s g||^2 / N do not.
    """
    grads = torch.autograd.grad(
        logits, [params[name] for name in keep], grad_outputs=softmax_root(logits, signs),
        create_graph=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(keep, grads, strict=True))


def trace_sample_of_parts(local: Params, whole: Params, keep: Params, num_examples: int) -> Tensor:
    """The sample of tr(G) of a batch in parts, with the gradient that this part adds to it.

        t = ||s g||^2 / N,   dt = (2/N) sum over the parts of <s^2 g, dg_part>

    Args:
        local: `root_gradient` of this part, with its graph.
        whole: g, their sum over all parts, without one.
        keep: The factors s.
        num_examples: N, of the whole batch.

    Returns:
        A 0-dim tensor with the value t, whose gradients over the parts sum to that of t.
    """
    scaled = {name: factor**2 * whole[name] for name, factor in keep.items()}
    value = torch.stack([(scaled[n] * whole[n]).sum() for n in keep]).sum() / num_examples
    slope = torch.stack([(scaled[n] * local[n]).sum() for n in keep]).sum() * 2 / num_examples
    return value + slope - slope.detach()


def trace_sample_at(
    logits_of: Callable[[Params], Tensor], params: Params, signs: Tensor, keep: Params
) -> dict[str, Tensor]:
    """`trace_sample` as a function of the parameters, which `torch.compile` takes as a whole.

    Args:
        logits_of: The logits, shape (N, C), as a function of the parameters; it must run its
            model inside `differentiable_ops`.
        params: The parameters w by name.
        signs: e, shape (N, C), independent signs.
        keep: The factors s.
    """
    logits, pull = vjp(logits_of, params)[:2]
    (grads,) = pull(softmax_root(logits, signs))
    return traces_of({name: grads[name] for name in keep}, keep, len(signs))


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

    Raises:
        NotImplementedError: If an operation has neither a forward nor a second derivative.
    """
    try:
        logits, pushed = _pushed_forward(logits_of, params, probe)
    except RuntimeError as problem:
        if is_of_the_machine(problem):
            raise
        # Fused recurrent layers and many a custom Function have no forward derivative.
        logits, pushed = _pushed_backward(logits_of, params, probe)
    cotangent = softmax_hessian(logits, pushed).detach() / len(logits)
    return gradient((logits * cotangent).sum(), params)


def _pushed_forward(
    logits_of: Callable[[Params], Tensor], params: Params, probe: Params
) -> tuple[Tensor, Tensor]:
    """The logits with their graph, and J v by forward mode."""

    def of_kept(parts: Any) -> Tensor:
        return logits_of({**params, **parts})

    kept = {name: params[name] for name in probe}
    logits, pushed = jvp(of_kept, (kept,), (dict(probe),))[:2]
    return logits, pushed


def _pushed_backward(
    logits_of: Callable[[Params], Tensor], params: Params, probe: Params
) -> tuple[Tensor, Tensor]:
    """The same by two backward passes: <J^T u, v> is linear in u, and its gradient in u is J v."""
    logits = logits_of(params)
    u = torch.zeros_like(logits, requires_grad=True)
    pulled = gradient((logits * u).sum(), {n: params[n] for n in probe}, create_graph=True)
    check_graph(*pulled.values())
    return logits, gradient(inner(pulled, probe), {"u": u})["u"]
