"""The trace of a model on a data split, and of a saved checkpoint, as a record."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import time
from collections.abc import Callable

import torch
from torch import Generator, nn

import hesstrace_cli
from hesstrace_cli import records
from hesstrace_cli.analysis.evaluation import evaluate, generalization_report
from hesstrace_cli.analysis.loading import describe, load_checkpoint, select_device
from hesstrace_cli.analysis.method_choice import DEFAULT_PROBES, choose_method
from hesstrace_cli.autodiff.calls import draws_random_numbers, eval_mode, trainable
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.checks.own_functions import check_own_functions
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.detached import Detached, check_attached
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import Unfit
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.spectrum.lanczos import Krylov, extreme_eigenvalues
from hesstrace_cli.curvature.statistics import Mean
from hesstrace_cli.curvature.trace.estimators import Stop, Traces, estimate_trace
from hesstrace_cli.curvature.trace.hutchpp import hutchpp
from hesstrace_cli.curvature.trace.xtrace import xtrace
from hesstrace_cli.data import DataSet, Examples, Split
from hesstrace_cli.distributed.parallel import ALONE, Ranks, join
from hesstrace_cli.errors import ConfigError, ModelError, NumericsError
from hesstrace_cli.randomness import stream_generator

SCHEMA = "hesstrace/trace/1"
_DEFAULT_RTOL = 0.05
_DEFAULT_PRODUCTS = 12
_EXAMPLES_TO_TRY = 8  # to see what the model executes
SKETCHES = {"hutch++": hutchpp, "xtrace": xtrace}
LEAST_DEGREES = 3.0  # twice the products between two looks at the interval, so that few do
_LEAST_PRODUCTS = {"hutch++": 3, "xtrace": 4}

OnPass = Callable[[int, Mean], None]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "hesstrace": hesstrace_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def data_loss(model: nn.Module, split: Examples, batch_size: int, ranks: Ranks = ALONE) -> DataLoss:
    """The mean loss over a split, in the model's own mode, over all trainable parameters."""
    return DataLoss(
        Objective(model, trainable(model), split.task),
        lambda: split.batches(batch_size, ranks.rank, ranks.size),
        len(split),
        split.num_terms,
        ranks,
    )


@full_precision()
def top_eigenvalue(model: nn.Module, split: Split, batch_size: int, seed: int) -> float:
    """The largest eigenvalue of H over a split, in eval mode, to a residual of .001 of it."""
    data = data_loss(model, split, batch_size)
    matrix = CurvatureMatrix(data, "hessian")
    like = next(iter(data.objective.params.values())).detach()
    generator = stream_generator(seed, like.device, "eigenvalues")
    start = rademacher(like.new_empty(matrix.size), generator=generator)
    with eval_mode(model):
        check_own_functions(data, "hessian", seed)
        return extreme_eigenvalues(Krylov(matrix, start), k=1).largest[0]


@dataclasses.dataclass(frozen=True, repr=False)
class TraceEstimate:
    """An estimate of a trace and how it was made.

    Attributes:
        result: The trace, its parts and errors.
        method: The name of the estimator used.
        reason: One clause that says why.
        num_probes: Probes per batch and pass; products altogether for the sketching methods.
    """

    result: Traces
    method: str
    reason: str
    num_probes: int

    def __repr__(self) -> str:
        error = "" if self.stderr is None else f", stderr={self.stderr:.4g}"
        return (
            f"TraceEstimate(value={self.value:.6g}{error}, method={self.method!r}, "
            f"passes={self.passes}, {len(self.result.tensors)} tensors)"
        )

    @property
    def value(self) -> float:
        """The trace over all trainable parameters."""
        return self.result.total.value

    @property
    def stderr(self) -> float | None:
        """Its standard error; 0 where it is exact, None where it is not known."""
        return self.result.total.stderr

    @property
    def interval(self) -> tuple[float, float] | None:
        """The two-sided 95 % interval; None where the standard error is not known."""
        return self.result.total.interval()

    @property
    def degrees(self) -> float:
        """The degrees of freedom that the interval takes."""
        return self.result.total.degrees

    @property
    def per_layer(self) -> dict[str, tuple[float, float | None]]:
        """By the name of each parameter tensor its diagonal block's trace and standard error."""
        return {name: (part.value, part.stderr) for name, part in self.result.tensors.items()}

    @property
    def passes(self) -> int:
        """Passes over the data; products altogether for the sketching methods."""
        return self.result.passes

    def to_dict(self) -> records.Estimate:
        """For JSON, by the names that `hesstrace estimate-trace --json` has."""
        blocks: list[records.Block] = [
            {"name": name, "trace": part.value, "stderr": part.stderr}
            for name, part in self.result.tensors.items()
        ]
        total = self.result.total
        return {
            "trace": total.value,
            "stderr": total.stderr,
            "ci95": _interval(total),
            "method": self.method,
            "reason": self.reason,
            "num_probes": self.num_probes,
            "passes": self.passes,
            "per_layer": blocks,
        }


def estimate(
    model: nn.Module,
    split: Examples,
    config: EstimateConfig,
    on_pass: OnPass | None = None,
    *,
    population: int | None = None,
    ranks: Ranks = ALONE,
) -> TraceEstimate:
    """Estimate the trace of the mean loss's Hessian over a split, in eval mode.

    H is taken over all trainable parameters, with no augmentation. The model's modes, gradients,
    buffers and the global random state are left as they were.

    What the model takes off autograd's graph (`detach`, `no_grad`, `.item()`, straight-through
    estimators) counts as constant: H is that of the function as autograd sees it. The reason says
    so where that matters, and "exact" is then refused.

    Args:
        model: Gives outputs as the split's task expects them.
        split: The examples.
        config: Method, probes, stopping rule, batch size and seed.
        on_pass: Told the estimate after every pass.
        population: The number of examples that the split stands for; its own by default.
        ranks: The processes that share the batches.

    Raises:
        ConfigError: If the method does not exist for this model.
        ModelError: If the model is random in eval mode, as with a Dropout left on.
        NumericsError: If a sample is not finite.
    """
    with eval_mode(model):
        X, _ = next(split.batches(min(config.batch_size, _EXAMPLES_TO_TRY)))
        if draws_random_numbers(model, X):
            raise ModelError(
                "the model draws random numbers in eval mode (an active Dropout?), so that its "
                "loss has no one Hessian"
            )
        data = data_loss(model, split, config.batch_size, ranks)
        unfit: list[Unfit] = []
        try:
            check_attached(data.objective, X)
        except Detached as problem:
            unfit.append(problem)

        @functools.cache
        def doubts() -> list[str]:
            """Of second derivatives, where these are taken."""
            if any(isinstance(problem, Detached) for problem in unfit):
                return []  # differences are of another function
            return check_own_functions(data, config.curvature, config.seed)

        if config.method in SKETCHES:
            doubts()
            sketch = stream_generator(config.seed, X.device, "sketch")  # one for all processes
            found = _by_sketch(data, config, sketch, on_pass)
            reason = "; ".join([found.reason, *map(str, unfit), *doubts()])
            return dataclasses.replace(found, reason=reason)
        while True:  # what one method finds out on a batch is told to the choice of the next
            try:
                method = choose_method(config, data.objective, X, unfit)
                reason = "; ".join([method.reason, *(doubts() if method.by_products else [])])
                num_probes = config.num_probes or DEFAULT_PROBES
                result = estimate_trace(
                    method.sampler,
                    data,
                    population=population,
                    num_probes=num_probes,
                    stop=_stop(config),
                    generator=stream_generator(config.seed, X.device, "probes", ranks.rank),
                    exact=method.exact,
                    inclusion=method.inclusion,
                    on_pass=on_pass,
                )
                return TraceEstimate(result, method.name, reason, 0 if method.exact else num_probes)
            except Unfit as problem:
                unfit.append(problem)


def _stop(config: EstimateConfig) -> Stop:
    """One pass where only the number of probes is given; else to a tolerance."""
    limits = (config.rtol, config.atol, config.max_passes)
    bounded = any(limit is not None for limit in limits) or math.isfinite(config.max_seconds)
    if not bounded and config.num_probes is not None:
        return Stop(None)
    default = 0.0 if config.atol is not None else _DEFAULT_RTOL
    rtol = default if config.rtol is None else config.rtol
    return Stop(rtol, config.atol or 0.0, config.max_passes or 100, config.max_seconds)


def _by_sketch(
    data: DataLoss,
    config: EstimateConfig,
    generator: Generator,
    on_pass: OnPass | None,
) -> TraceEstimate:
    """Hutch++ or XTrace, with twice the products until the stopping rule holds."""
    matrix = CurvatureMatrix(data, config.curvature)
    params, ranks = data.objective.params, data.ranks
    draw, stop, begin = SKETCHES[config.method], _stop(config), time.monotonic()
    num_products, passes = config.num_probes or _DEFAULT_PRODUCTS, 0
    if num_products < _LEAST_PRODUCTS[config.method]:
        raise ConfigError(
            f"--num-probes is {num_products}, --method {config.method} takes products with the "
            f"whole matrix, at least {_LEAST_PRODUCTS[config.method]}"
        )
    while True:
        like = next(iter(params.values()))
        found = draw(matrix, like, matrix.sizes, num_products=num_products, generator=generator)
        total, *parts = stop.judged(found)
        passes += num_products
        if not math.isfinite(total.value):
            raise NumericsError(f"the trace estimate is {total.value}")
        if on_pass is not None:
            on_pass(passes, total)
        seconds = time.monotonic() - begin
        if ranks.from_first(stop.reached(total, passes + num_products, seconds, LEAST_DEGREES)):
            names = dict(zip(params, parts, strict=True))
            whole = Traces(total, names, passes, None)
            return TraceEstimate(whole, config.method, "as asked for", num_products)
        num_products *= 2


@full_precision()
def trace_record(
    model: nn.Module,
    split: Split,
    config: EstimateConfig,
    on_pass: OnPass | None = None,
    *,
    population: int | None = None,
    ranks: Ranks = ALONE,
) -> records.Trace:
    """Estimate the trace and describe it: the JSON of the contract but for the checkpoint.

    Args:
        model: As for `estimate`, as are the others.
        split: The examples.
        config: The settings.
        on_pass: Told the estimate after every pass.
        population: The number of examples that the split stands for.
        ranks: The processes that share the batches.

    Raises:
        NumericsError: If the loss is not finite.
    """
    begin = time.monotonic()
    found = ranks.together(lambda: evaluate(model, split, config.batch_size, alone=True))
    if not math.isfinite(found.loss):
        raise NumericsError(f"the loss is {found.loss} on these {len(split)} examples")
    estimated = estimate(model, split, config, on_pass, population=population, ranks=ranks)
    made, params = estimated.to_dict(), trainable(model)
    device = next(iter(params.values())).device
    record: records.Trace = {
        "schema": SCHEMA,
        "trace": made["trace"],
        "stderr": made["stderr"],
        "ci95": made["ci95"],
        "method": made["method"],
        "reason": made["reason"],
        "num_probes": made["num_probes"],
        "passes": made["passes"],
        "curvature": config.curvature,
        "num_examples": len(split),
        "num_population": population or len(split),
        "subset_stderr": estimated.result.subset_stderr,
        "num_parameters": sum(p.numel() for p in params.values()),
        "loss": found.loss,
        "accuracy": found.accuracy,
        "collapsed": split.task.collapse(found.loss, found.metrics, split.targets),
        "task": split.task.name,
        "selection": split.task.selection.as_dict(),
        "loss_name": split.task.described_loss(),
        "num_terms": split.num_terms,
        "metrics": found.finite_metrics(),
        "split": config.split,
        "dtype": config.dtype,
        "device": str(device),
        "seed": config.seed,
        "seconds": time.monotonic() - begin,
        "versions": versions(),
    }
    if config.per_layer or config.plot is not None:
        record["per_layer"] = [
            {**layer, "num_parameters": params[layer["name"]].numel()}
            for layer in made["per_layer"]
        ]
    return record


def _interval(mean: Mean) -> list[float] | None:
    interval = mean.interval()
    if interval is None or not all(map(math.isfinite, interval)):
        return None
    return list(interval)


@full_precision()
def estimate_checkpoint(
    path: str,
    config: EstimateConfig,
    on_pass: OnPass | None = None,
    on_loaded: Callable[[DataSet], None] = lambda _: None,
) -> tuple[records.Trace, list[str]]:
    """The trace record of one checkpoint, and warnings; `on_loaded` gets its data at once.

    Raises:
        HesstraceError: As `load_checkpoint` and `trace_record`.
    """
    ranks = join(select_device(config.device))
    loaded = ranks.together(lambda: load_checkpoint(path, config))
    on_loaded(loaded.data)
    record = trace_record(
        loaded.model, loaded.split, config, on_pass, population=loaded.population, ranks=ranks
    )
    if config.report:
        model, data = loaded.model, loaded.data
        batch_size, trace = config.batch_size, record["trace"]
        record["report"] = generalization_report(model, data, loaded.split, batch_size, trace)
    whole: records.Trace = {**record, **describe(path, loaded)}
    return whole, loaded.warnings
