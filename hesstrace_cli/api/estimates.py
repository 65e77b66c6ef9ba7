"""Traces, spectra and checks of anyone's model on anyone's batches.

They are what the commands compute, by the same functions: `analysis.estimation.estimate`,
`analysis.spectrum.spectrum_record` and `analysis.verify.rows_of_modes`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import OnPass, TraceEstimate, estimate, versions
from hesstrace_cli.analysis.spectrum import spectrum_record
from hesstrace_cli.analysis.verify import rows_of_modes
from hesstrace_cli.api.batches import as_batch, open_loader
from hesstrace_cli.api.models import apart, device_of, eager, unwrapped
from hesstrace_cli.api.tasks import resolve_task
from hesstrace_cli.api.wording import as_arguments, naming_arguments
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import LARGEST, EstimateConfig, SpectrumConfig
from hesstrace_cli.curvature.checks.verdicts import GOOD
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ModelError
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.tasks import Task

_WHOLE = LARGEST  # batches come as the loader gives them


@contextmanager
def _measuring() -> Iterator[None]:
    """In full precision, with gradients, whatever the loop around has on; errors name arguments.

    The random state is kept as a whole: a loader draws from it whenever it is read.
    """
    with ExitStack() as stack:
        for context in (naming_arguments(), random_state_kept(), full_precision(), eager(),
                        torch.inference_mode(False), torch.enable_grad()):  # fmt: skip
            stack.enter_context(context)
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _measured(model: nn.Module) -> nn.Module:
    """What is to be measured of a model that the user gives.

    Raises:
        ModelError: If its parameters are in half precision.
    """
    inner = unwrapped(model)
    half = [p.dtype for p in inner.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise ModelError(
            f"the model's parameters are {half[0]}, in which curvature is good to two digits; give "
            "copy.deepcopy(model).float(), and inputs in float32"
        )
    return apart(inner)


@_measuring()
def estimate_trace(
    model: nn.Module,
    data: Iterable[Any],
    *,
    task: str | Task = "auto",
    method: str = "auto",
    curvature: str = "hessian",
    rtol: float | None = None,
    atol: float | None = None,
    num_probes: int | None = None,
    dropout_scheme: str = "tensor",
    keep_prob: float = 0.3,
    max_passes: int | None = None,
    max_seconds: float = math.inf,
    seed: int = 0,
    on_pass: OnPass | None = None,
) -> TraceEstimate:
    """Estimate tr(H) or tr(G) of the mean loss over data, in eval mode.

        L(w) = (1/M) sum_m l(f_m(w), y_m),   tr(H) = sum_i d2 L / dw_i^2

    over all parameters that need a gradient, M the terms of all batches together. The model's
    modes, gradients, buffers and the global random state are left as found. What it takes off
    autograd's graph counts as constant.

    Args:
        model: Gives outputs as the task expects them, or a dict or object with `logits`.
        data: Batches (X, y), X a tensor, a tuple or a dict of arguments; or dicts of arguments
            with `labels`. Read in several passes, with the same batches each time.
        task: "auto" goes by the targets; or classification, multilabel, regression, segmentation,
            tokens, or a task with settings of its own (`hesstrace_cli.tasks.Tokens(...)`).
        method: "auto" takes the exact one where there is one; or exact, hutchinson, dropout,
            hutch++, xtrace.
        curvature: "hessian", or "ggn" for its Gauss-Newton part G.
        rtol: Stop when the 95 % interval is within this fraction of the trace; 0.05, or one pass
            where only num_probes is given.
        atol: Or within this absolute width.
        num_probes: Fresh probes per batch in each pass; of hutch++ and xtrace products.
        dropout_scheme: What method "dropout" drops: tensor, block or entry.
        keep_prob: With which probability it keeps them, in (0, 1].
        max_passes: Stop after this many passes; 100.
        max_seconds: Stop after the pass in which this time is over.
        seed: Of all probes.
        on_pass: Called as `on_pass(passes, mean)` after every pass; mean has value and stderr.

    Raises:
        ConfigError: If an argument is wrong, or the method does not exist for this model.
        DataError: If data is no batches, or differs in its second pass.
        ModelError: If the model is random in eval mode, or its outputs do not fit.
        NumericsError: If a sample is not finite.

    Returns:
        `.value`, `.stderr`, `.interval` (95 %), `.degrees`, `.per_layer`, `.method`, `.reason`,
        `.passes` and `.to_dict()`.
    """
    config = EstimateConfig(
        method=method, curvature=curvature, rtol=rtol, atol=atol, num_probes=num_probes,
        dropout_scheme=dropout_scheme, keep_prob=keep_prob, max_passes=max_passes,
        max_seconds=max_seconds, seed=seed, batch_size=_WHOLE,
    )  # fmt: skip
    inner = _measured(model)
    return estimate(inner, open_loader(inner, data, task), config, on_pass)


@_measuring()
def spectrum(
    model: nn.Module,
    data: Iterable[Any],
    *,
    task: str | Task = "auto",
    curvature: str = "hessian",
    top: int = 10,
    num_probes: int = 4,
    steps: int = 30,
    max_products: int = 200,
    lr: float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    radius: float = 0.05,
    num_directions: int = 10,
    seed: int = 0,
) -> records.ModelSpectrum:
    """Largest eigenvalues, spectral density, stability and flatness of the mean loss over data.

    Of H or G over all parameters that need a gradient, in eval mode. The model, its gradients and
    the global random state are left as found.

    Args:
        model: As for `estimate_trace`.
        data: As for `estimate_trace`.
        task: As for `estimate_trace`.
        curvature: "hessian" or "ggn".
        top: Eigenvalues to find.
        num_probes: Random vectors for the density.
        steps: Lanczos steps from each of them.
        max_products: For the eigenvalues, at most.
        lr: The learning rate of SGD whose stability is judged; None for no verdict.
        momentum: Of SGD.
        nesterov: Whether it is Nesterov's.
        weight_decay: Of SGD.
        radius: Of the sharpness.
        num_directions: Of the average sharpness.
        seed: Of all random vectors.

    Raises:
        HesstraceError: As `estimate_trace`.
    """
    config = SpectrumConfig(
        curvature=curvature, top=top, num_probes=num_probes, steps=steps,
        max_products=max_products, lr=lr, momentum=momentum, nesterov=nesterov, radius=radius,
        num_directions=num_directions, seed=seed, batch_size=_WHOLE,
    )  # fmt: skip
    inner = _measured(model)
    run = {"lr": lr, "weight_decay": weight_decay}
    record, doubts = spectrum_record(inner, open_loader(inner, data, task), config, run)
    for doubt in doubts:
        warnings.warn(as_arguments(doubt), stacklevel=2)
    return record


@_measuring()
def verify(
    model: nn.Module, X: Any, y: Tensor, *, task: str | Task = "auto", seed: int = 0
) -> records.ModelVerification:
    """Hold every derivative that penalties and estimates take of a model against differences of it.

    In training and in eval mode, in float64, or in the model's own precision where it cannot run
    in that. The model, its gradients, its buffers and the global random state are left as found.

    Args:
        model: As for `estimate_trace`.
        X: Inputs of some 8 to 32 examples: a tensor, a tuple or a dict of arguments.
        y: Their targets.
        task: As for `estimate_trace`.
        seed: Of the directions looked along.

    Raises:
        HesstraceError: As `estimate_trace`.

    Returns:
        `right`, and `rows` with a `check`, a `verdict` and a `detail` each.
    """
    inner = apart(unwrapped(model))
    device = device_of(inner)
    X, y = (each.to(device) for each in as_batch(X, y, "the batch"))
    found = resolve_task(task, y)
    found.check_targets(y, "y")
    rows = rows_of_modes(Objective(inner, trainable(inner), found), X, y, seed)
    return {
        "task": found.name,
        "right": all(row.verdict in GOOD for row in rows),
        "rows": [row.as_record() for row in rows],
        "device": str(device),
        "seed": seed,
        "versions": versions(),
    }
