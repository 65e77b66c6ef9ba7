"""Adaptive sharpness-aware minimization: distances are measured in units of each weight's size.

    min_w L(w + e),   e = rho T^2 grad L(w) / ||T grad L(w)||_2, held constant,
    T = diag(|w| + eta), eta = 0.01

which is the worst point, to first order, of ||T^-1 e||_2 <= rho. That ball does not change where
one layer is scaled up and the next one down, so that eta is all that keeps the step from being
scale-invariant; with it a weight of 0 moves too.

Source:
    Kwon, Kim, Park, Choi, "ASAM: Adaptive sharpness-aware minimization for scale-invariant
    learning of deep neural networks", ICML 2021, the element-wise form, of every parameter.
"""

from __future__ import annotations

from torch import Tensor

from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.regularizers.sam import SharpnessAware

_ETA = 0.01  # the paper's


class AdaptiveSharpnessAware(SharpnessAware):
    """Trains on the loss at the adaptive distance `strength` up the gradient."""

    name = "asam"
    default = 0.5
    unit = "radius rho, in units of each weight's size"
    alone_to = "stand in the place of the loss"

    def ascent(self, grad: Params, params: Params) -> dict[str, Tensor]:
        """T times SAM's way for the gradient T grad L."""
        sizes = {name: params[name].detach().abs() + _ETA for name in grad}
        way = super().ascent({name: sizes[name] * g for name, g in grad.items()}, params)
        return {name: sizes[name] * e for name, e in way.items()}
