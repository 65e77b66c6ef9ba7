"""Products with the Hessian of a scalar loss: H v to estimate, v^T H v to train with.

H is taken of whatever scalar `loss` returns (the mean loss of a batch everywhere in this
package), over all entries of `params`. The loss must run its model inside `differentiable_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp

from hesstrace_cli.autodiff.graph import Params, check_graph, gradient, inner
from hesstrace_cli.autodiff.taylor import Jet

ScalarFunc = Callable[[Params], Tensor]
Mode = Literal["taylor", "forward", "reverse"]


def hvp(
    grad: Params, params: Params, probe: Params, *, create_graph: bool = False
) -> dict[str, Tensor]:
    """The product H v, by differentiating <g, v>.

    Args:
        grad: g, the gradient of the loss, made with `create_graph=True`; its graph is kept.
        params: The parameters w, leaves or not.
        probe: v, by name; names left out count as zero.
        create_graph: Whether the product itself is to be differentiated.

    Returns:
        H v by name, in the shapes of `params`.
    """
    return gradient(inner(grad, probe), params, create_graph=create_graph)


def quadratic_form(
    loss: ScalarFunc, params: Params, probe: Params, *, mode: Mode = "forward"
) -> Tensor:
    """The scalar v^T H v, to be differentiated once more in the parameters.

    It is the second derivative of the loss along v. In Taylor mode that is carried through one
    forward pass (`curvature.taylor`); in forward mode it is two nested Jacobian-vector products,
    which cost more and need nothing known of the operations; its gradient takes one backward pass
    in both. In reverse mode it is <H v, v>, which costs two backward passes more, and works for
    operations that have no forward derivative.

    Args:
        loss: A function of the parameters, as a dict like `params`, to a scalar.
        params: The parameters w; they need a gradient if the result is to be differentiated.
        probe: v, by name; tensors left out are dropped and cost no derivative but in reverse mode.
        mode: "taylor", "forward" or "reverse".

    Returns:
        v^T H v, a 0-dim tensor with a graph to all of `params`, dropped ones included.
    """
    if mode == "reverse":
        grad = gradient(loss(params), params, create_graph=True)
        product = hvp(grad, params, probe, create_graph=True)
        check_graph(*grad.values(), *product.values())
        return inner(product, probe)
    if mode == "taylor":
        return loss_and_form(loss, params, probe)[1]
    kept = {name: params[name] for name in probe}

    def of_kept(parts: Any) -> Tensor:
        return loss({**params, **parts})

    def slope(parts: Any) -> Tensor:
        return jvp(of_kept, (parts,), (dict(probe),))[1]

    return jvp(slope, (kept,), (dict(probe),))[1]


def loss_and_form(loss: ScalarFunc, params: Params, probe: Params) -> tuple[Tensor, Tensor]:
    """The loss and v^T H v by one pass of Taylor propagation, both with their graphs.

    The arguments are those of `quadratic_form`.

    Raises:
        NotImplementedError: If an operation has no rule, as most in-place ones.
    """
    # Dropped tensors too, without a derivative: in-place sums may then meet either.
    found = loss({name: Jet(p, probe.get(name), None) for name, p in params.items()})
    if not isinstance(found, Jet):  # it does not depend on what is kept
        return found, torch.zeros_like(found)
    value, _, second = found.parts
    return value, torch.zeros_like(value) if second is None else second
