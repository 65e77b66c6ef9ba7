"""Products with the Hessian of a scalar loss: H v to estimate, v^T H v to train with.

H is taken of whatever scalar `loss` returns (the mean loss of a batch everywhere in this
package), over all entries of `params`. The loss must run its model inside `differentiable_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.func import jvp

from hesstrace_cli.curvature.graph import check_graph, gradient, inner
from hesstrace_cli.curvature.probes import Params

ScalarFunc = Callable[[Params], Tensor]
Mode = Literal["forward", "reverse"]


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

    In forward mode it is the second derivative of the loss along v, two nested
    Jacobian-vector products: one pass forward, and one backward for its gradient. In reverse
    mode it is <H v, v>, which costs two backward passes more, and works for operations
    that have no forward derivative.

    Args:
        loss: A function of the parameters, as a dict like `params`, to a scalar.
        params: The parameters w; they need a gradient if the result is to be differentiated.
        probe: v, by name; tensors left out are dropped and cost no derivative in forward mode.
        mode: "forward" or "reverse".

    Returns:
        v^T H v, a 0-dim tensor with a graph to all of `params`, dropped ones included.
    """
    if mode == "reverse":
        grad = gradient(loss(params), params, create_graph=True)
        product = hvp(grad, params, probe, create_graph=True)
        check_graph(*grad.values(), *product.values())
        return inner(product, probe)
    kept = {name: params[name] for name in probe}

    def of_kept(parts: Any) -> Tensor:
        return loss({**params, **parts})

    def slope(parts: Any) -> Tensor:
        return jvp(of_kept, (parts,), (dict(probe),))[1]

    return jvp(slope, (kept,), (dict(probe),))[1]
