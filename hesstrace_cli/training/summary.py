"""What a finished run is judged by: losses, metrics, the trace and what stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import cast

import torch
from torch import nn

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import data_loss, top_eigenvalue, trace_record
from hesstrace_cli.analysis.evaluation import evaluate, finite, input_jacobian
from hesstrace_cli.autodiff.calls import eval_mode
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.config import EstimateConfig, TrainConfig
from hesstrace_cli.curvature.trace.change import Change, trace_change
from hesstrace_cli.data import DataSet, Split, stratified_order
from hesstrace_cli.errors import HesstraceError, ModelError, NumericsError

_TERMS = 2000  # of the trace; more make no difference to a comparison,
_FEWEST, _MOST = 64, 2000  # nor do more examples, but terms of one are alike
_CHANGE_EXAMPLES, _CHANGE_BATCH, _CHANGE_PROBES = 32, 32, 4


@full_precision()
def summarize(
    model: nn.Module, data: DataSet, config: TrainConfig, checkpoint: Path,
    untrained: Callable[[], nn.Module],
) -> records.Figures:  # fmt: skip
    """The figures of the trained weights, in eval mode.

    Args:
        model: As trained.
        data: What it was trained on; all splits are evaluated.
        config: The run's.
        checkpoint: Where the weights are saved.
        untrained: Makes the model as it was before the first step.

    Raises:
        NumericsError: If a loss is not finite.
    """
    batch_size, traced = max(config.batch_size, 256), min(max(config.batch_size, 64), 250)
    if data.vocabulary is not None:  # logits of a large vocabulary are as large as training's
        batch_size = traced = config.batch_size
    train, test = (evaluate(model, split, batch_size) for split in (data.train, data.test))
    val = None if data.val is None else evaluate(model, data.val, batch_size)
    if not math.isfinite(train.loss + test.loss):
        raise NumericsError(
            f"the train loss is {train.loss:g} and the test loss {test.loss:g} after the last "
            f"step; the weights are in {checkpoint}"
        )
    some = for_a_trace(data.train)
    jacobian = input_jacobian(model, some, batch_size)
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "epochs": config.epochs,
        "task": data.task.name,
        "selection": data.task.selection.as_dict(),
        "num_terms": data.train.num_terms,
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "collapsed": data.task.collapse(train.loss, train.metrics, data.train.targets),
        "val_loss": None if val is None else finite(val.loss),
        "val_accuracy": None if val is None else val.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "calibration_error": test.metrics.get("calibration_error"),
        "metrics": test.finite_metrics(),
        "train_metrics": train.finite_metrics(),
        "val_metrics": None if val is None else val.finite_metrics(),
        "trace": _trace(model, some, len(data.train), traced, config, checkpoint),
        "trace_change": _trace_change(model, some, config.seed, untrained)
        if data.task.has_logit_scale
        else None,
        "input_jacobian": None if jacobian is None else finite(jacobian.value),
        "top_eigenvalue": _top_eigenvalue(model, some, batch_size, config.seed)
        if config.top_eigenvalue
        else None,
    }


def for_a_trace(split: Split) -> Split:
    """As many examples as a trace needs, of all classes."""
    wanted = math.ceil(_TERMS * len(split) / split.num_terms)
    wanted = min(max(wanted, _FEWEST), _MOST)
    if len(split) <= wanted:
        return split
    return split.subset(stratified_order(split.targets, 0)[:wanted])


def _trace_change(
    model: nn.Module, split: Split, seed: int, untrained: Callable[[], nn.Module]
) -> records.TraceChange:
    """Of a few examples: signs for each of them have little noise."""
    split = split.subset(torch.arange(min(len(split), _CHANGE_EXAMPLES)))
    found, reason = None, "a trace is not above 0"
    try:
        before = untrained()
        with eval_mode(before), eval_mode(model):
            losses = [data_loss(each, split, _CHANGE_BATCH) for each in (before, model)]
            found = trace_change(*losses, num_probes=_CHANGE_PROBES, seed=seed)
    except HesstraceError as problem:  # the training itself was fine
        reason = str(problem)
    known: dict[str, float | None] = dict.fromkeys(item.name for item in fields(Change))
    known |= {} if found is None else {n: finite(v) for n, v in asdict(found).items()}
    return cast(
        records.TraceChange,
        {**known, "num_examples": len(split), "reason": None if found is not None else reason},
    )


def _top_eigenvalue(model: nn.Module, split: Split, batch_size: int, seed: int) -> float | None:
    try:
        return top_eigenvalue(model, split, batch_size, seed)
    except (ModelError, NumericsError):  # the trace's reason says the same
        return None


def _trace(
    model: nn.Module,
    split: Split,
    population: int,
    batch_size: int,
    config: TrainConfig,
    checkpoint: Path,
) -> records.Trace | records.NoTrace:
    settings = EstimateConfig(
        model=config.model, dataset=config.dataset, seed=config.seed,
        batch_size=batch_size, max_seconds=60, per_layer=True,
    )  # fmt: skip
    try:
        record = trace_record(model, split, settings, population=population)
    except (ModelError, NumericsError) as problem:  # the training itself was fine
        return {
            "trace": None, "stderr": None, "ci95": None, "method": None, "reason": str(problem),
            "per_layer": [], "checkpoint": str(checkpoint), "model": config.model,
            "dataset": config.dataset,
        }  # fmt: skip
    record["checkpoint"] = str(checkpoint)
    record["model"], record["dataset"] = config.model, config.dataset
    return record
