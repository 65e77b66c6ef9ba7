"""Noise stability optimization, with the two points that cancel the first order of the noise.

    min_w E[ (L(w + sigma z) + L(w - sigma z)) / 2 ] ~ L(w) + (sigma^2 / 2) tr(H),   z ~ N(0, I)

Source:
    Zhang, Li, Ju, "Noise stability optimization for finding flat minima", TMLR 2024.
"""

from __future__ import annotations

import torch

from hesstrace_cli.regularizers.base import Regularizer, Step, Term


class NoiseStability(Regularizer):
    """Trains on the mean loss at w + noise and w - noise, of standard deviation `strength`."""

    name = "nso"
    default = 0.01
    unit = "standard deviation of the noise"
    alone_to = "stand in the place of the loss"

    def gives_loss(self, index: int, progress: float) -> bool:
        """Its term stands in the place of the loss."""
        return True

    def term(self, step: Step) -> Term:
        """The mean of the two losses."""
        noise = {
            name: self.strength * torch.empty_like(p).normal_(generator=step.generator)
            for name, p in ((n, p.detach()) for n, p in step.objective.params.items())
        }
        above = step.loss_at(noise)
        below = step.loss_at({name: -z for name, z in noise.items()})
        return Term(1.0, (above + below) / 2, replaces=True)
