"""Train with, estimate and compare the trace of the loss Hessian.

    penalty = hesstrace_cli.TracePenalty(model, strength=0.01)
    with hesstrace_cli.differentiable():
        outputs = model(X)
    loss = criterion(outputs, y) + penalty(outputs, y)

`TracePenalty`, `differentiable`, `estimate_trace`, `spectrum`, `verify` and the records that they
return are imported when they are first asked for, and torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hesstrace_cli.analysis.estimation import TraceEstimate as TraceEstimate
    from hesstrace_cli.api.estimates import estimate_trace as estimate_trace
    from hesstrace_cli.api.estimates import spectrum as spectrum
    from hesstrace_cli.api.estimates import verify as verify
    from hesstrace_cli.api.penalty import TracePenalty as TracePenalty
    from hesstrace_cli.api.penalty import differentiable as differentiable
    from hesstrace_cli.records import ModelSpectrum as ModelSpectrum
    from hesstrace_cli.records import ModelVerification as ModelVerification

__version__ = "0.1.0"

_PLACES = {
    "TracePenalty": "api.penalty",
    "differentiable": "api.penalty",
    "estimate_trace": "api.estimates",
    "spectrum": "api.estimates",
    "verify": "api.estimates",
    "TraceEstimate": "analysis.estimation",
    "ModelSpectrum": "records",
    "ModelVerification": "records",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
