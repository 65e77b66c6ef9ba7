"""The Gauss-Newton part G of the Hessian of a mean loss, and its trace.

    G = (1/M) sum_m J_m^T A_m J_m,   A_m = B_m B_m^T

with J_m the Jacobian of term m's outputs in the parameters and A_m the Hessian of its loss in the
outputs, both of which the task knows. For convex losses G is never negative. Where the outputs
are linear in each single weight, as in ReLU networks in eval mode, tr(H) = tr(G) exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from hesstrace_cli.autodiff.graph import Params, check_graph, gradient, inner, named
from hesstrace_cli.failures import is_of_the_machine
from hesstrace_cli.tasks import Task


def trace_sample(
    outputs: Tensor, params: Params, cotangent: Tensor, keep: Params, num_terms: int
) -> dict[str, Tensor]:
    """One unbiased sample of tr(G), tensor by tensor, to estimate or to differentiate.

        t = || s * sum_m J_m^T B_m e_m ||^2 / M,   E[t] = tr(G)

    as the cross terms vanish for independent signs e_m. This is one backward pass of the batch
    with the cotangent u_m = B_m e_m, which is not detached: it depends on the parameters.

    Args:
        outputs: Of a batch, with a graph to the parameters.
        params: The parameters w by name.
        cotangent: u, the task's `root` of independent signs e, in the shape of the outputs.
        keep: The factors s of `draw_keep`; tensors left out cost no derivative.
        num_terms: M.

    Returns:
        For each kept tensor its part of t, 0-dim, with a graph to all parameters.
    """
    return traces_of(root_gradient(outputs, params, cotangent, keep), keep, num_terms)


def traces_of(grads: Params, keep: Params, num_terms: float) -> dict[str, Tensor]:
    """|| s g ||^2 / M for each kept tensor, from `root_gradient` of a whole batch."""
    return {name: (keep[name] * g).square().sum() / num_terms for name, g in grads.items()}


def root_gradient(
    outputs: Tensor, params: Params, cotangent: Tensor, keep: Params
) -> dict[str, Tensor]:
    """The sum g = sum_m J_m^T B_m e_m for each kept tensor, with a graph to all parameters.

    The arguments are those of `trace_sample`. g is a sum over the terms: those of the parts of a
    batch add up, which the samples ||s g||^2 / M do not.
    """
    grads = torch.autograd.grad(
        outputs, [params[name] for name in keep], grad_outputs=cotangent,
        create_graph=True, materialize_grads=True,
    )  # fmt: skip
    return named(keep, grads)


def trace_sample_of_parts(local: Params, whole: Params, keep: Params, num_terms: int) -> Tensor:
    """The sample of tr(G) of a batch in parts, with the gradient that this part adds to it.

        t = ||s g||^2 / M,   dt = (2/M) sum over the parts of <s^2 g, dg_part>

    Args:
        local: `root_gradient` of this part, with its graph.
        whole: g, their sum over all parts, without one.
        keep: The factors s.
        num_terms: M, of the whole batch.

    Returns:
        A 0-dim tensor with the value t, whose gradients over the parts sum to that of t.
    """
    scaled = {name: factor**2 * whole[name] for name, factor in keep.items()}
    value = torch.stack([(scaled[n] * whole[n]).sum() for n in keep]).sum() / num_terms
    slope = torch.stack([(scaled[n] * local[n]).sum() for n in keep]).sum() * 2 / num_terms
    return value + slope - slope.detach()


def trace_sample_at(
    outputs_of: Callable[[Params], Tensor],
    params: Params,
    cotangent_of: Callable[[Tensor], Tensor],
    keep: Params,
    num_terms: int,
) -> dict[str, Tensor]:
    """`trace_sample` as a function of the parameters, which `torch.compile` takes as a whole.

    Args:
        outputs_of: The outputs as a function of the parameters; it must run its model inside
            `differentiable_ops`.
        params: The parameters w by name.
        cotangent_of: u from the outputs.
        keep: The factors s.
        num_terms: M.
    """
    outputs, pull = vjp(outputs_of, params)[:2]
    (grads,) = pull(cotangent_of(outputs))
    return traces_of({name: grads[name] for name in keep}, keep, num_terms)


def ggn_vp(
    outputs_of: Callable[[Params], Tensor],
    params: Params,
    probe: Params,
    task: Task,
    targets: Tensor,
) -> dict[str, Tensor]:
    """The product G v = (1/M) sum_m J_m^T A_m J_m v.

    Args:
        outputs_of: The outputs as a function of the parameters; it must run its model inside
            `differentiable_ops`.
        params: The parameters w, needing a gradient.
        probe: v, by name; names left out count as zero.
        task: Gives A and M.
        targets: Of the batch.

    Returns:
        G v by name, in the shapes of `params`.

    Raises:
        NotImplementedError: If an operation has neither a forward nor a second derivative.
    """
    try:
        outputs, pushed = _pushed_forward(outputs_of, params, probe)
    except RuntimeError as problem:
        if is_of_the_machine(problem):
            raise
        # Fused recurrent layers and many a custom Function have no forward derivative.
        outputs, pushed = _pushed_backward(outputs_of, params, probe)
    cotangent = task.curve(outputs, targets, pushed).detach() / task.divisor(targets)
    return gradient((outputs * cotangent).sum(), params)


def _pushed_forward(
    outputs_of: Callable[[Params], Tensor], params: Params, probe: Params
) -> tuple[Tensor, Tensor]:
    """The outputs with their graph, and J v by forward mode."""

    def of_kept(parts: Any) -> Tensor:
        return outputs_of({**params, **parts})

    kept = {name: params[name] for name in probe}
    outputs, pushed = jvp(of_kept, (kept,), (dict(probe),))[:2]
    return outputs, pushed


def _pushed_backward(
    outputs_of: Callable[[Params], Tensor], params: Params, probe: Params
) -> tuple[Tensor, Tensor]:
    """The same by two backward passes: <J^T u, v> is linear in u, and its gradient in u is J v."""
    outputs = outputs_of(params)
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = gradient((outputs * u).sum(), {n: params[n] for n in probe}, create_graph=True)
    check_graph(*pulled.values())
    return outputs, gradient(inner(pulled, probe), {"u": u})["u"]
