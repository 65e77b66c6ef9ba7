"""Eigenvalues, spectral density and stability of a checkpoint, as a record."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Generator

from hesstrace_cli.config import SpectrumConfig
from hesstrace_cli.curvature.density import Density, spectral_density
from hesstrace_cli.curvature.lanczos import Extremes, extreme_eigenvalues
from hesstrace_cli.curvature.objective import Objective, draws_random_numbers, trainable
from hesstrace_cli.curvature.operator import CurvatureMatrix
from hesstrace_cli.curvature.statistics import Mean
from hesstrace_cli.errors import ModelError, NumericsError
from hesstrace_cli.estimation import evaluate, versions
from hesstrace_cli.loading import Loaded, describe, load_checkpoint
from hesstrace_cli.stability import sentence, stability

SCHEMA = "hesstrace/spectrum/1"
_BULK = 0.99  # share of the eigenvalues that count as the bulk


def spectrum_of_checkpoint(path: str, config: SpectrumConfig) -> tuple[dict[str, Any], list[str]]:
    """The spectrum record of one checkpoint, and warnings.

    H or G is that of the mean cross-entropy over the chosen examples, all trainable parameters,
    in eval mode.

    Raises:
        HesstraceError: If the checkpoint cannot be read, does not fit, is random in eval mode,
            or has a loss that is not finite.
    """
    begin = time.monotonic()
    loaded = load_checkpoint(path, config)
    model, split = loaded.model.eval(), loaded.split
    if draws_random_numbers(model, next(split.batches(2))[0]):
        raise ModelError("the model draws random numbers in eval mode (an active Dropout?)")
    loss, accuracy = evaluate(model, split, config.batch_size)
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is {loss} on these {len(split)} examples")
    objective = Objective(model, trainable(model))
    matrix = CurvatureMatrix(
        objective, lambda: split.batches(config.batch_size), len(split), config.curvature
    )
    like = next(iter(objective.params.values())).detach()
    generator = Generator(like.device).manual_seed(config.seed)
    start = torch.randn(
        matrix.size, generator=generator, device=like.device, dtype=like.dtype
    )  # fmt: skip
    extremes = extreme_eigenvalues(matrix, start, k=config.top, max_products=config.max_products)
    density = spectral_density(
        matrix, like, matrix.size, num_probes=config.num_probes, steps=config.steps,
        generator=generator,
    )  # fmt: skip
    record = {
        "schema": SCHEMA,
        **_spectrum(extremes, density),
        "stability": _stability(extremes, density, config, loaded),
        "curvature": config.curvature,
        "num_examples": len(split),
        "num_parameters": matrix.size,
        "loss": loss,
        "accuracy": accuracy,
        "split": config.split,
        "dtype": config.dtype,
        "device": str(like.device),
        "seed": config.seed,
        "seconds": time.monotonic() - begin,
        "versions": versions(),
    }
    return {**record, **describe(path, loaded)}, loaded.warnings


def _spectrum(extremes: Extremes, density: Density) -> dict[str, Any]:
    trace, squares = density.moment(1), density.moment(2)
    frobenius = math.sqrt(max(0.0, squares.value))
    grid, values = density.on_grid()
    edge = density.quantile(_BULK)
    return {
        "eigenvalues": extremes.largest,
        "residuals": extremes.residuals,
        "smallest": extremes.smallest,
        "smallest_residual": extremes.smallest_residual,
        "products": extremes.products + sum(len(nodes) for nodes in density.nodes),
        "density": {"grid": grid, "values": values},
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "frobenius_norm": frobenius,
        "frobenius_norm_stderr": _root_error(squares, frobenius),
        "negative_share": density.share_below(-extremes.smallest_residual),
        "effective_dimension": trace.value**2 / squares.value if squares.value > 0 else None,
        "bulk_edge": edge,
        "largest_over_bulk_edge": extremes.largest[0] / edge if edge > 0 else None,
    }


def _root_error(squares: Mean, root: float) -> float | None:
    return squares.stderr / (2 * root) if squares.stderr is not None and root > 0 else None


def _stability(
    extremes: Extremes, density: Density, config: SpectrumConfig, loaded: Loaded
) -> dict[str, Any] | None:
    """None where neither the flags nor the checkpoint give a learning rate of SGD."""
    run = loaded.run
    adaptive = run.get("optimizer", "sgd") != "sgd"
    lr = config.lr if config.lr is not None or adaptive else run.get("lr")
    if lr is None:
        return None
    momentum = config.momentum if config.momentum is not None else run.get("momentum", 0.0)
    report = stability(
        extremes.largest,
        smallest=extremes.smallest,
        negative_share=density.share_below(-extremes.smallest_residual),
        size=density.size,
        lr=lr,
        momentum=momentum,
        weight_decay=run.get("weight_decay", 0.0),
    )
    return {**report, "sentence": sentence(report)}
