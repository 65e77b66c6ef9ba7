"""Eigenvalues, spectral density, stability and flatness of a checkpoint, as a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import data_loss, versions
from hesstrace_cli.analysis.evaluation import evaluate, finite
from hesstrace_cli.analysis.loading import describe, load_checkpoint
from hesstrace_cli.autodiff.calls import draws_random_numbers, eval_mode
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import SpectrumConfig
from hesstrace_cli.curvature.checks.own_functions import check_own_functions
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.detached import Detached, check_attached
from hesstrace_cli.curvature.flatness import (
    Landscape,
    average_sharpness,
    random_direction,
    slice_losses,
    worst_sharpness,
)
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.spectrum.density import Density, spectral_density
from hesstrace_cli.curvature.spectrum.lanczos import Extremes, Krylov, extreme_eigenvalues
from hesstrace_cli.curvature.spectrum.stability import sentence, stability
from hesstrace_cli.curvature.statistics import Mean
from hesstrace_cli.data import DataSet, Examples
from hesstrace_cli.errors import ModelError, NumericsError
from hesstrace_cli.randomness import stream_generator

SCHEMA = "hesstrace/spectrum/1"
_ASCENT_STEPS = 10
_CONVERGED = 1e-3  # of the largest, as asked of the residuals
_BULK = 0.99  # share of the eigenvalues that count as the bulk


@full_precision()
def spectrum_of_checkpoint(
    path: str, config: SpectrumConfig, on_loaded: Callable[[DataSet], None] = lambda _: None
) -> tuple[records.Spectrum, list[str]]:
    """The spectrum record of one checkpoint, and warnings; `on_loaded` gets its data at once.

    H or G is that of the task's mean loss over the chosen examples, all trainable parameters,
    in eval mode.

    Raises:
        HesstraceError: If the checkpoint cannot be read, does not fit, is random in eval mode,
            or has a loss that is not finite.
    """
    loaded = load_checkpoint(path, config)
    on_loaded(loaded.data)
    record, doubts = spectrum_record(loaded.model, loaded.split, config, loaded.run)
    whole = {**record, "split": config.split, "dtype": config.dtype, **describe(path, loaded)}
    return cast(records.Spectrum, whole), [*loaded.warnings, *doubts]


@full_precision()
def spectrum_record(
    model: nn.Module, split: Examples, config: SpectrumConfig, run: Mapping[str, Any]
) -> tuple[records.ModelSpectrum, list[str]]:
    """Spectrum, stability and flatness of a model in eval mode as a record, and warnings.

    H or G is that of the task's mean loss over the examples, all trainable parameters.

    Args:
        model: Left as it is.
        split: The examples.
        config: What to find, and how.
        run: The optimizer's settings, where they are known: lr, momentum, weight_decay, ...

    Raises:
        ModelError: If the model is random in eval mode.
        NumericsError: If its loss is not finite.
    """
    with eval_mode(model):
        return _spectrum_record(model, split, config, run)


def _spectrum_record(
    model: nn.Module, split: Examples, config: SpectrumConfig, run: Mapping[str, Any]
) -> tuple[records.ModelSpectrum, list[str]]:
    begin = time.monotonic()
    if draws_random_numbers(model, next(split.batches(2))[0]):
        raise ModelError("the model draws random numbers in eval mode (an active Dropout?)")
    found = evaluate(model, split, config.batch_size)
    if not math.isfinite(found.loss):
        raise NumericsError(f"the loss is {found.loss} on these {len(split)} examples")
    data = data_loss(model, split, config.batch_size)
    doubts = _check_derivatives(data, config)
    matrix = CurvatureMatrix(data, config.curvature)
    like = next(iter(data.objective.params.values())).detach().new_empty(matrix.size)
    generator = stream_generator(config.seed, like.device, "eigenvalues")
    first = Krylov(matrix, rademacher(like, generator=generator))
    first.extend(min(config.steps, config.max_products))  # the density takes them anyway
    extremes = extreme_eigenvalues(first, k=config.top, max_products=config.max_products)
    others = (rademacher(like, generator=generator) for _ in range(config.num_probes - 1))
    density = spectral_density(matrix, others, steps=config.steps, first=first)
    landscape = Landscape(data)
    record: records.ModelSpectrum = {
        "schema": SCHEMA,
        **_spectrum(extremes, density),
        "stability": _stability(extremes, density, config, run),
        "flatness": _flatness(landscape, config),
        "slice": _slice(landscape, like.device, config),
        "curvature": config.curvature,
        "num_examples": len(split),
        "num_parameters": matrix.size,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "task": split.task.name,
        "selection": split.task.selection.as_dict(),
        "loss_name": split.task.described_loss(),
        "num_terms": split.num_terms,
        "metrics": found.finite_metrics(),
        "device": str(like.device),
        "seed": config.seed,
        "seconds": time.monotonic() - begin,
        "versions": versions(),
    }
    return record, [*doubts, *_doubts(extremes, config)]


def _check_derivatives(data: DataLoss, config: SpectrumConfig) -> list[str]:
    X, _ = next(iter(data.batches()))
    try:
        check_attached(data.objective, X)
    except Detached as problem:
        return [str(problem)]
    return check_own_functions(data, config.curvature, config.seed)


def _doubts(extremes: Extremes, config: SpectrumConfig) -> Iterator[str]:
    found = [*extremes.largest, extremes.smallest]
    residuals = [*extremes.residuals, extremes.smallest_residual]
    size = max(map(abs, found))
    if max(residuals) > _CONVERGED * size:
        yield (
            f"after {extremes.products} products some eigenvalues have residuals of up to "
            f"{max(residuals):.2g}; --max-products raises their number"
        )
    if len(extremes.largest) < config.top:
        yield (
            f"{len(extremes.largest)} of --top {config.top} eigenvalues were found after "
            f"{extremes.products} products"
        )


def _spectrum(extremes: Extremes, density: Density) -> records.Eigenvalues:
    trace, squares = density.moment(1), density.moment(2)
    frobenius = math.sqrt(max(0.0, squares.value))
    grid, values = density.on_grid()
    edge, negative = density.quantile(_BULK), density.share_below(0.0)
    return {
        "eigenvalues": extremes.largest,
        "residuals": extremes.residuals,
        "smallest": extremes.smallest,
        "smallest_residual": extremes.smallest_residual,
        "products": sum(len(nodes) for nodes in density.nodes),
        "density": {"grid": grid, "values": values},
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "frobenius_norm": frobenius,
        "frobenius_norm_stderr": _root_error(squares, frobenius),
        "negative_share": negative.value,
        "negative_share_bounds": [negative.low, negative.high],
        "effective_dimension": trace.value**2 / squares.value if squares.value > 0 else None,
        "bulk_edge": edge,
        "largest_over_bulk_edge": extremes.largest[0] / edge if edge > 0 else None,
    }


def _root_error(squares: Mean, root: float) -> float | None:
    return squares.stderr / (2 * root) if squares.stderr is not None and root > 0 else None


def _flatness(landscape: Landscape, config: SpectrumConfig) -> records.Flatness:
    return {
        "radius": config.radius,
        "num_directions": config.num_directions,
        "plain": _sharpness(landscape, config, normalized=False),
        "filter_normalized": _sharpness(landscape, config, normalized=True),
    }


def _sharpness(
    landscape: Landscape, config: SpectrumConfig, *, normalized: bool
) -> records.Sharpness:
    device = next(iter(landscape.objective.params.values())).device
    generator = stream_generator(config.seed, device, "directions")
    average = average_sharpness(
        landscape, num_directions=config.num_directions, radius=config.radius,
        normalized=normalized, generator=generator,
    )  # fmt: skip
    worst = worst_sharpness(
        landscape, steps=_ASCENT_STEPS, radius=config.radius, normalized=normalized,
        generator=generator,
    )  # fmt: skip
    return {
        "average": finite(average.value),
        "average_stderr": finite(average.stderr),
        "worst": finite(worst),
    }


def _slice(
    landscape: Landscape, device: torch.device, config: SpectrumConfig
) -> records.Slice | None:
    if not config.slice:
        return None
    generator = stream_generator(config.seed, device, "slice")
    params = landscape.objective.params
    directions = [
        random_direction(params, normalized=True, generator=generator) for _ in range(config.slice)
    ]
    half = config.slice_points // 2  # the checkpoint itself is the middle one
    grid = [config.slice_radius * i / half for i in range(-half, half + 1)]
    rows = slice_losses(landscape, directions, grid)
    losses = [[finite(x) for x in r] if isinstance(r, list) else finite(r) for r in rows]
    return cast(records.Slice, {"dimensions": config.slice, "grid": grid, "losses": losses})


def _stability(
    extremes: Extremes, density: Density, config: SpectrumConfig, run: Mapping[str, Any]
) -> records.Stability | None:
    """None where neither the flags nor the checkpoint give a learning rate of SGD."""
    # What another optimizer calls so is something else.
    run = run if run.get("optimizer", "sgd") == "sgd" else {}
    lr = config.lr if config.lr is not None else run.get("lr")
    if lr is None:
        return None
    momentum = config.momentum if config.momentum is not None else run.get("momentum", 0.0)
    nesterov = config.nesterov if config.nesterov is not None else run.get("nesterov", False)
    weight_decay = run.get("weight_decay", 0.0)
    report = stability(
        extremes.largest,
        smallest=extremes.smallest,
        smallest_residual=extremes.smallest_residual,
        negative=density.share_below(-weight_decay),
        size=density.size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    numbers = {k: finite(v) if isinstance(v, float) else v for k, v in report.items()}
    matrix = "Hessian" if config.curvature == "hessian" else "Gauss-Newton matrix"
    own = config.lr is None and run.get("schedule", "constant") != "constant"
    said = sentence(report, matrix, "the run's initial" if own else "a")
    return cast(records.Stability, {**numbers, "sentence": said})
