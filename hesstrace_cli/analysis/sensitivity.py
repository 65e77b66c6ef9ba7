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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.analysis.allocation import Table, allocate, flips
from hesstrace_cli.analysis.estimation import data_loss, estimate, versions
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.analysis.loading import describe, load_checkpoint
from hesstrace_cli.analysis.quantization import (
    SCALE_BITS,
    Groups,
    Scaling,
    megabytes,
    quantize,
    squared_error,
)
from hesstrace_cli.autodiff.calls import eval_mode, trainable
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import EstimateConfig, SensitivityConfig
from hesstrace_cli.curvature.flatness import Landscape
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean, t_quantile
from hesstrace_cli.data import DataSet, Split
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.randomness import stream_generator

SCHEMA = "hesstrace/sensitivity/1"
LARGE = 0.05
"""Of the weights' squared norm: an error above it is no small step, and the model a guess."""

_PLAIN_BITS = 32
_RANDOM = 10
_PROBES = 2

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight that is to be rounded.

    Attributes:
        name: Of the parameter.
        value: w, of n entries.
        trace: tr of its block.
        errors: ||Q(w) - w||^2 by bits.
        rises: The predicted rise by bits, with its standard deviation.
        slopes: g^T d by bits.
        num_scales: That rounding it takes.
    """

    name: str
    value: Tensor
    trace: Mean
    errors: dict[int, float]
    rises: dict[int, Mean]
    slopes: dict[int, float]
    num_scales: int

    @property
    def size(self) -> int:
        """N."""
        return self.value.numel()


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
    record |= {"seconds": time.monotonic() - begin, **describe(path, loaded)}
    return cast(records.Sensitivity, record), [*loaded.warnings, *_left_out(model)]


def _left_out(model: nn.Module) -> list[str]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    if not frozen:
        return []
    number = sum(p.numel() for p in frozen)
    return [f"{number} weights that do not train are left out; --all-weights takes them too"]


def sensitivity(
    model: nn.Module, split: Split, config: SensitivityConfig, say: Say = lambda _: None
) -> dict[str, Any]:
    """What rounding each weight of a model costs on a split, and an allocation where asked for."""
    groups = Groups(cast(Any, config.per.partition(":")[0]), config.group_size())
    found = evaluate(model, split, config.batch_size)
    if not math.isfinite(found.loss):
        raise NumericsError(f"the loss is {found.loss} on these {len(split)} examples")
    weights, method = _weights(model, split, config, groups)
    bits = sorted(config.bits)
    record: dict[str, Any] = {
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
    budget = _Budget.of(config, weights, model)
    if budget is not None:
        record |= budget.chosen()
    if config.check:
        check = _Check(model, split, config, groups, weights, found.loss, say)
        record["measured"] = check.measured(budget)
    return record


def _weights(
    model: nn.Module, split: Split, config: SensitivityConfig, groups: Groups
) -> tuple[list[_Weight], dict[str, Any]]:
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
        weights.append(_Weight(name, value, trace, errors, rises, slopes, groups.number(value)))
    method = {"method": estimated.method, "reason": estimated.reason}
    return weights, method


def _chosen_names(model: nn.Module, config: SensitivityConfig) -> list[str]:
    """Of parameters of two dimensions and more, a tied one once, as the globs say."""
    all_names = [name for name, p in trainable(model).items() if p.dim() > 1]
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


def _record_of(weight: _Weight) -> records.Weight:
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
        "large": [b for b in sorted(weight.errors) if _is_large(weight, b)],
    }


def _is_large(weight: _Weight, bits: int) -> bool:
    return weight.errors[bits] > LARGE * weight.value.double().square().sum().item()


@dataclasses.dataclass(frozen=True)
class _Budget:
    """What all choices of bits cost and take, and what they may take.

    Attributes:
        weights: To choose for.
        bits: To choose from.
        limit: Of the sum of sizes, in bits.
        per_scale: What a scale counts, in bits.
        rest: The bits of what is not rounded; for the size in megabytes.
    """

    weights: Sequence[_Weight]
    bits: list[int]
    limit: float
    per_scale: int
    rest: float

    @classmethod
    def of(
        cls, config: SensitivityConfig, weights: Sequence[_Weight], model: nn.Module
    ) -> _Budget | None:
        """As the flags say; None where they say none."""
        number = sum(w.size for w in weights)
        rest = float(_PLAIN_BITS * (sum(p.numel() for p in model.parameters()) - number))
        bits = sorted(config.bits)
        if config.average_bits is not None:
            return cls(weights, bits, config.average_bits * number, 0, rest)
        if config.size_mb is not None:
            limit = config.size_mb * 8e6 - rest
            if limit <= 0:
                raise ConfigError(
                    f"--size-mb is {config.size_mb:g}, but what is not quantized takes "
                    f"{megabytes(rest):.4g} already"
                )
            return cls(weights, bits, limit, SCALE_BITS, rest)
        return None

    @property
    def sizes(self) -> Table:
        """In bits, shape (L, B)."""
        return np.array([[w.size * b + self.per_scale * w.num_scales for b in self.bits]
                         for w in self.weights], dtype=float)  # fmt: skip

    def costs(self, of: Callable[[_Weight, int], float]) -> Table:
        """Of every choice, shape (L, B)."""
        return np.array([[of(w, b) for b in self.bits] for w in self.weights])

    def allocated(self, costs: Table) -> dict[str, int]:
        """The bits by name that cost least."""
        chosen = allocate(costs, self.sizes, self.limit)
        return {w.name: self.bits[k] for w, k in zip(self.weights, chosen, strict=True)}

    def by_chance(self, generator: torch.Generator) -> dict[str, int]:
        """An allocation for weights whose worth is drawn, over two orders of magnitude or so."""
        worth = torch.randn(len(self.weights), generator=generator).mul(2).exp().tolist()
        by_name = {w.name: x * w.size for w, x in zip(self.weights, worth, strict=True)}
        return self.allocated(self.costs(lambda w, b: by_name[w.name] * 4.0**-b))

    def uniform(self) -> dict[str, int] | None:
        """The most bits that all may have alike; None where even the fewest are too many."""
        fitting = [b for k, b in enumerate(self.bits) if self.sizes[:, k].sum() <= self.limit]
        return {w.name: fitting[-1] for w in self.weights} if fitting else None

    def described(self, allocation: Mapping[str, int]) -> dict[str, Any]:
        """The figures of an allocation."""
        number = sum(w.size for w in self.weights)
        bits = sum(w.size * allocation[w.name] for w in self.weights)
        scales = SCALE_BITS * sum(w.num_scales for w in self.weights)
        rises = [w.rises[allocation[w.name]] for w in self.weights]
        errors = [rise.stderr for rise in rises]
        known = [error for error in errors if error is not None]
        return {
            "allocation": dict(allocation),
            "average_bits": bits / number,
            "size_mb": megabytes(bits + scales + self.rest),
            "predicted_rise": {
                "value": sum(rise.value for rise in rises),
                "stderr": math.hypot(*known) if len(known) == len(errors) else None,
            },
        }

    def chosen(self) -> dict[str, Any]:
        """The allocation by traces, and which of its decisions hang on their errors."""
        costs = self.costs(lambda w, b: w.rises[b].value)
        allocation = self.allocated(costs)
        ends = [self._ends(w) for w in self.weights]
        others = flips(costs, self.sizes, self.limit, *zip(*ends, strict=True))
        return {
            **self.described(allocation),
            "flips": {
                w.name: [self.bits[k] for k in own]
                for w, own in zip(self.weights, others, strict=True)
                if own
            },
        }

    @staticmethod
    def _ends(weight: _Weight) -> tuple[float, float]:
        """The ends of the trace's 95 % interval over the trace."""
        trace = weight.trace
        if not trace.stderr or trace.value <= 0:
            return 1.0, 1.0
        half = t_quantile(0.975, trace.degrees) * trace.stderr / trace.value
        return 1 - half, 1 + half


@dataclasses.dataclass(frozen=True)
class _Check:
    """Measures losses with rounded weights."""

    model: nn.Module
    split: Split
    config: SensitivityConfig
    groups: Groups
    weights: Sequence[_Weight]
    loss: float
    say: Say

    def measured(self, budget: _Budget | None) -> records.Measured:
        """The rise with each weight alone, and with whole allocations by several rules."""
        alone: list[records.Alone] = []
        for weight in self.weights:
            self.say(f"measuring {weight.name}")
            for b in sorted(self.config.bits):
                rise = weight.rises[b]
                alone.append({
                    "name": weight.name, "bits": b, "rise": self._rise({weight.name: b}),
                    "predicted": rise.value, "stderr": rise.stderr, "slope": weight.slopes[b],
                    "large": _is_large(weight, b),
                })  # fmt: skip
        return {
            "alone": alone,
            "by_bits": [self._by_bits(alone, b) for b in sorted(self.config.bits)],
            "allocations": [] if budget is None else list(self._allocations(budget)),
        }

    @staticmethod
    def _by_bits(alone: Sequence[records.Alone], bits: int) -> records.ByBits:
        """How prediction and measurement go together over the weights."""
        own = [row for row in alone if row["bits"] == bits]
        pairs = [(r, rise) for r in own if (rise := r["rise"]) is not None]
        measured = [rise for _, rise in pairs]
        inside = [
            abs(rise - r["predicted"]) <= 1.96 * error
            for r, rise in pairs
            if (error := r["stderr"]) is not None
        ]
        return {
            "bits": bits,
            "rank_correlation": _correlation([r["predicted"] for r, _ in pairs], measured),
            "rank_correlation_with_slope": _correlation(
                [r["predicted"] + r["slope"] for r, _ in pairs], measured
            ),
            "within_interval": sum(inside) / len(inside) if inside else None,
            "num_large": sum(r["large"] for r in own),
        }

    def _allocations(self, budget: _Budget) -> Iterator[records.Allocation]:
        """By traces, and of the same size by other rules."""
        uniform = budget.uniform()
        rules: list[tuple[str, dict[str, int] | None]] = [
            ("trace", budget.allocated(budget.costs(lambda w, b: w.rises[b].value))),
            (
                "trace and slope",
                budget.allocated(budget.costs(lambda w, b: w.rises[b].value + w.slopes[b])),
            ),
            ("uniform", uniform),
            ("size", budget.allocated(budget.costs(lambda _, b: 4.0**-b))),
            ("magnitude", budget.allocated(budget.costs(lambda w, b: w.errors[b]))),
        ]
        for rule, allocation in rules:
            if allocation is not None:
                self.say(f"measuring the allocation by {rule}")
                described = budget.described(allocation)
                yield cast(
                    records.Allocation,
                    {"rule": rule, **described, "rise": self._rise(allocation), "spread": None},
                )
        generator = stream_generator(self.config.seed, torch.device("cpu"), "quantization", 1)
        rises = [self._rise(budget.by_chance(generator)) for _ in range(_RANDOM)]
        known = [rise for rise in rises if rise is not None]
        yield {
            "rule": f"random, mean of {_RANDOM}", "allocation": None, "average_bits": None,
            "size_mb": None, "predicted_rise": None,
            "rise": float(np.mean(known)) if len(known) == len(rises) else None,
            "spread": [min(known), max(known)] if known else None,
        }  # fmt: skip

    def _rise(self, bits: Mapping[str, int]) -> float | None:
        """L with these weights rounded, less L; None where it is not finite."""
        scaling = cast(Scaling, self.config.scale)
        values = {w.name: w.value for w in self.weights}
        rounded = {n: quantize(values[n], b, self.groups, scaling) for n, b in bits.items()}
        with replaced(self.model, rounded):
            rise = evaluate(self.model, self.split, self.config.batch_size).loss - self.loss
        return rise if math.isfinite(rise) else None


def _correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's; None of fewer than three, or where all are alike."""
    if len(measured) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None
    return float(spearmanr(predicted, measured).statistic)


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some parameters, and in all that share their memory; back afterwards."""
    params = dict(model.named_parameters())
    before = {name: params[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                params[name].copy_(value)
