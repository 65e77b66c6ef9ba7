"""What rounding each weight to few bits costs, and the bits that cost least under a budget.

Rounding a weight tensor w_l moves it by d_l = Q(w_l) - w_l. With errors of its n_l entries that are
independent and of mean zero the loss rises, to second order, by

    E[L(w + d) - L(w)] = tr(H_l) / n_l * ||d_l||^2 / 2,

H_l being its block of the Hessian of the mean loss. Its own standard deviation around that comes
from three sources: the error of the trace; the gradient g, by which a rise is g^T d at first order;
and the second order, d^T H d / 2, of which it is ||H_l||_F ||d_l||^2 / n_l / sqrt(2). For the last
the norm of the rows of H that belong to w_l stands in, as two products give it for all weights at
once: the deviation is no smaller than it is said to be. As d_l is known, so is g^T d_l: it stands
beside the rise, for where the training has not ended at a minimum.

Source:
    Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer, "HAWQ-V2: Hessian aware trace-weighted
    quantization of neural networks", NeurIPS 2020.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.analysis.budget import Budget, Weight
from hesstrace_cli.analysis.estimation import data_loss, estimate, versions
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.analysis.loading import describe, load_checkpoint
from hesstrace_cli.analysis.quantization import (
    Groups,
    Scaling,
    quantize,
    squared_error,
)
from hesstrace_cli.analysis.rounding import Check, Say
from hesstrace_cli.autodiff.calls import eval_mode, trainable
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import EstimateConfig, SensitivityConfig
from hesstrace_cli.curvature.flatness import Landscape
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean
from hesstrace_cli.data import DataSet, Split
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.randomness import stream_generator

SCHEMA = "hesstrace/sensitivity/1"
_PROBES = 2


@full_precision()
def sensitivity_of_checkpoint(
    path: str,
    config: SensitivityConfig,
    on_loaded: Callable[[DataSet], None] = lambda _: None,
    say: Say = lambda _: None,
) -> tuple[records.Sensitivity, list[str]]:
    """The sensitivity record of one checkpoint, and warnings.

    H or G is that of the task's mean loss over the chosen examples, in eval mode.

    Args:
        path: The checkpoint.
        config: The settings.
        on_loaded: Gets its data at once.
        say: Told what is measured.

    Raises:
        HesstraceError: If the checkpoint cannot be read or does not fit, no weight is to be
            rounded, or the budget is too small.
    """
    begin = time.monotonic()
    loaded = load_checkpoint(path, config)
    on_loaded(loaded.data)
    if config.all_weights:
        for p in loaded.model.parameters():
            p.requires_grad_(p.is_floating_point())
    model, split = loaded.model, loaded.split
    record = sensitivity(model, split, config, say)
    whole: records.Sensitivity = {
        **record, **describe(path, loaded), "seconds": time.monotonic() - begin
    }  # fmt: skip
    return whole, [*loaded.warnings, *_left_out(model)]


def _left_out(model: nn.Module) -> list[str]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    if not frozen:
        return []
    number = sum(p.numel() for p in frozen)
    return [f"{number} weights that do not train are left out; --all-weights takes them too"]


def sensitivity(
    model: nn.Module, split: Split, config: SensitivityConfig, say: Say = lambda _: None
) -> records.ModelSensitivity:
    """What rounding each weight of a model costs on a split, and an allocation where asked for."""
    groups = Groups(cast(Any, config.per.partition(":")[0]), config.group_size())
    found = evaluate(model, split, config.batch_size)
    if not math.isfinite(found.loss):
        raise NumericsError(f"the loss is {found.loss} on these {len(split)} examples")
    weights, method = _weights(model, split, config, groups)
    bits = sorted(config.bits)
    record: records.ModelSensitivity = {
        "schema": SCHEMA,
        "weights": [_record_of(weight) for weight in weights],
        "bits": bits,
        "per": config.per,
        "scale": config.scale,
        "curvature": config.curvature,
        **method,
        "loss": found.loss,
        "metrics": found.finite_metrics(),
        "task": split.task.name,
        "loss_name": split.task.described_loss(),
        "split": config.split,
        "num_examples": len(split),
        "num_terms": split.num_terms,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": config.dtype,
        "device": str(weights[0].value.device),
        "seed": config.seed,
        "versions": versions(),
        "allocation": None,
        "average_bits": None,
        "size_mb": None,
        "predicted_rise": None,
        "flips": None,
        "measured": None,
    }
    budget = Budget.of(config, weights, model)
    if budget is not None:
        chosen = budget.chosen()
        record["allocation"], record["flips"] = chosen["allocation"], chosen["flips"]
        record["average_bits"], record["size_mb"] = chosen["average_bits"], chosen["size_mb"]
        record["predicted_rise"] = chosen["predicted_rise"]
    if config.check:
        check = Check(model, split, config, groups, weights, found.loss, say)
        record["measured"] = check.measured(budget)
    return record


def _weights(
    model: nn.Module, split: Split, config: SensitivityConfig, groups: Groups
) -> tuple[list[Weight], records.EstimatedBy]:
    """The weights to be rounded, and what the record says of how their traces were estimated."""
    names = _chosen_names(model, config)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(EstimateConfig)
              if hasattr(config, f.name)}  # fmt: skip
    estimated = estimate(model, split, EstimateConfig(**shared))
    with eval_mode(model):
        data = data_loss(model, split, config.batch_size)
        _, grad = Landscape(data).gradient({})
        matrix = CurvatureMatrix(data, config.curvature)
        like = next(iter(data.objective.params.values())).detach()
        generator = stream_generator(config.seed, like.device, "quantization")
        V = rademacher(like.new_empty(matrix.size, _PROBES), generator=generator)
        norms = [part.double().square().sum().item() / _PROBES
                 for part in (matrix @ V).split(matrix.sizes)]  # fmt: skip
    rows = dict(zip(data.objective.params, norms, strict=True))
    weights = []
    for name in names:
        value = data.objective.params[name].detach()
        rounded = {b: quantize(value, b, groups, cast(Scaling, config.scale)) for b in config.bits}
        trace, g = estimated.result.tensors[name], grad[name].double()
        errors = {b: squared_error(value, q) for b, q in rounded.items()}
        moves = {b: (q - value).double() for b, q in rounded.items()}
        rises = {b: _rise(d, trace, g, rows[name]) for b, d in moves.items()}
        slopes = {b: (d * g).sum().item() for b, d in moves.items()}
        weight = Weight(name, value, trace, errors, rises, slopes, groups.number(value))
        _check_finite(weight)
        weights.append(weight)
    return weights, {"method": estimated.method, "reason": estimated.reason}


def _check_finite(weight: Weight) -> None:
    deviations = [rise.stderr for rise in weight.rises.values() if rise.stderr is not None]
    means = [rise.value for rise in weight.rises.values()]
    if not all(map(math.isfinite, (*weight.slopes.values(), *means, *deviations))):
        raise NumericsError(
            f"what rounding {weight.name!r} costs is infinite or not a number, as the loss's "
            "derivatives are at these weights"
        )


def _chosen_names(model: nn.Module, config: SensitivityConfig) -> list[str]:
    """Of parameters of two dimensions and more, a tied one once, as the globs say."""
    all_names = [name for name, p in trainable(model).items() if p.dim() > 1 and p.numel()]
    for flag, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in all_names):
                raise ConfigError(
                    f"--{flag} {pattern!r} names no weight; there are {', '.join(all_names[:4])}"
                    + (", ..." if len(all_names) > 4 else "")
                )
    names = [
        name for name in all_names
        if (not config.include or any(fnmatchcase(name, p) for p in config.include))
        and not any(fnmatchcase(name, p) for p in config.exclude)
    ]  # fmt: skip
    if not names:
        raise ConfigError(
            "there is no weight to be rounded: a parameter that trains, has two dimensions or "
            "more, and is not excluded; --all-weights takes those that do not train too"
        )
    return names


def _rise(moved: Tensor, trace: Mean, grad: Tensor, rows: float) -> Mean:
    """The predicted rise of the loss, with its standard deviation.

    Args:
        moved: d.
        trace: tr of the block.
        grad: g in these weights.
        rows: The squared Frobenius norm of their rows of the whole matrix.
    """
    each = moved.square().mean().item()
    first = (moved * grad).square().sum().item()
    second = each * each * rows / 2
    sampling = None if trace.stderr is None else (each * trace.stderr / 2) ** 2
    deviation = None if sampling is None else math.sqrt(first + second + sampling)
    return Mean(each * trace.value / 2, deviation)


def _record_of(weight: Weight) -> records.Weight:
    trace, size = weight.trace, weight.size
    return {
        "name": weight.name,
        "shape": list(weight.value.shape),
        "num_parameters": size,
        "trace": trace.value,
        "stderr": trace.stderr,
        "mean_trace": trace.value / size,
        "mean_trace_stderr": None if trace.stderr is None else trace.stderr / size,
        "num_scales": weight.num_scales,
        "error": {str(b): error for b, error in sorted(weight.errors.items())},
        "rise": {
            str(b): {"value": rise.value, "stderr": rise.stderr}
            for b, rise in sorted(weight.rises.items())
        },
        "slope": {str(b): slope for b, slope in sorted(weight.slopes.items())},
        "large": [b for b in sorted(weight.errors) if weight.is_large(b)],
    }
