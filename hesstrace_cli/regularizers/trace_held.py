"""The penalty on tr(G) that a network can lower by its Jacobian alone.

    loss + lambda(t) * t(w),   E[t(w)] = (1/M) sum_m tr(J_m(w)^T A_m J_m(w)),   A_m constant

The value is that of tr(G); its gradient is that of J alone. A language model can lower tr(G) by its
logits' scale, A = diag(p) - p p^T being small where p is sharp, and be no flatter for it.

Source:
    The same trap of sharpness-aware minimization is in Singh et al., "Avoiding spurious sharpness
    minimization broadens applicability of SAM", arXiv 2502.02407.
"""

from __future__ import annotations

from typing import ClassVar

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.trace import TraceRegularizer


class HeldTraceRegularizer(TraceRegularizer):
    """lambda tr(G) with A, the curvature of the loss in the outputs, held constant.

    Args:
        strength: lambda at full strength, in units of loss per trace.
        config: As of `TraceRegularizer`.

    Raises:
        ConfigError: If the penalty is to be on tr(H).
    """

    name = "trace-held"
    default = 0.01
    unit = "weight of tr(G), the curvature of the loss in the outputs held constant"
    is_penalty = True
    alone_to = "penalize the trace"

    settings = (
        "estimator", "dropout_scheme", "keep_prob", "num_probes", "every", "warmup", "curvature",
        "form", "penalty_examples", "draw",
    )  # fmt: skip
    holds: ClassVar[bool] = True

    def __init__(self, strength: float, config: TrainConfig) -> None:
        if config.curvature == "hessian":
            raise ConfigError(
                "--reg trace-held holds the curvature A of tr(G), and --curvature is hessian; "
                "leave one of them out"
            )
        super().__init__(strength, config)
