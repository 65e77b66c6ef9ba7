"""Gradient regularization by a finite difference along the gradient, with first derivatives alone.

    loss + (lambda / 2) ||grad L(w)||_2^2,
    its gradient H g, g = grad L(w), taken as (grad L(w + epsilon g) - grad L(w)) / epsilon

`epsilon` is `--fd-step`. For epsilon to 0 this is the exact gradient; larger ones are a method of
their own, which the source finds to do better than the exact one.

Source:
    Karakida, Takase, Hayase, Osawa, "Understanding gradient regularization in deep learning:
    efficient finite-difference computation and implicit bias", ICML 2023, the forward form (F-GR).
"""

from __future__ import annotations

import torch

from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.base import Regularizer, Setting, Step, Term


class FiniteDifferenceGradientNorm(Regularizer):
    """Penalizes half the squared norm of the batch's gradient."""

    name = "grad-norm-fd"
    default = 0.01
    unit = "weight of ||grad L||^2 / 2"
    is_penalty = True
    settings = ("fd_step",)

    in_parts = False

    def prepare(self, setting: Setting) -> None:
        """Refuse a step that is lost in rounding.

        Raises:
            ConfigError: If it is.
        """
        dtype = next(iter(setting.objective.params.values())).dtype
        least = torch.finfo(dtype).eps ** 0.5 / 10
        if self.config.fd_step < least:
            raise ConfigError(
                f"--fd-step is {self.config.fd_step:g}: a difference over less than {least:.1g} is "
                f"lost in the rounding of {str(dtype).removeprefix('torch.')}; the usual one is 0.1"
            )

    def term(self, step: Step) -> Term:
        """(L(w + epsilon g) - L(w)) / epsilon, g held constant; its value is about ||g||^2."""
        epsilon = self.config.fd_step
        grad = gradient(step.loss, step.objective.params)
        above = step.loss_at({name: epsilon * g for name, g in grad.items()})
        return Term(self.strength, (above - step.loss) / epsilon)
