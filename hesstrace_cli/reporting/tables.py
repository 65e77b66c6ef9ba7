"""What the tables say: heads and rows of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hesstrace_cli.config import TrainConfig, key_of
from hesstrace_cli.reporting.apart import differing, settings_text
from hesstrace_cli.reporting.layout import Strong, Table, Words
from hesstrace_cli.storage.records import measure_of, metrics_of, selection_metric

Rows = Sequence[Sequence[str]]


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits; a dash for none."""
    if not value:
        return "-" if value is None else "0"
    return f"{value:#.{digits}g}".rstrip(".")


def with_error(value: float | None, error: float | None) -> str:
    """A value and its standard error, the error to two digits."""
    if value is None:
        return "not known"
    if error is None:
        return f"{number(value)} (error unknown)"
    return f"{number(value)} ± {number(error, 2)}" if error else f"{number(value)} (exact)"


def _is_subset(record: Mapping[str, Any]) -> bool:
    return bool(record["num_examples"] < record["num_population"])


def _trace(record: Mapping[str, Any]) -> str:
    """The trace with its error, which is that on the examples it was taken on."""
    text = with_error(record["trace"], record["stderr"])
    if record["stderr"] == 0 and _is_subset(record):
        return text.replace("(exact)", f"(exact on {record['num_examples']})")
    return text


def share(value: float | None) -> str:
    """A number between 0 and 1 to four places; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def _change(change: Mapping[str, Any]) -> str:
    parts = (f"times {math.exp(change[key]):.3g} by {what}" for key, what in (
        ("of_curvature", "the curvature in the outputs"), ("of_jacobian", "the Jacobian"),
    ))  # fmt: skip
    return f"{change['before']:.4g} to {change['after']:.4g}: {', '.join(parts)}"


def summary_table(title: str, summary: Mapping[str, Any]) -> Table:
    """What a finished run shows."""
    trace, penalty = summary["trace"], summary["trace_penalty"]
    rows = [
        ["regularizers", Words(summary["regularizers"])],
        *_metric_rows("test", summary["test_loss"], metrics_of(summary)),
        *_metric_rows("train", summary["train_loss"], metrics_of(summary, "train")),
        *_metric_rows("validation", summary.get("val_loss"), metrics_of(summary, "val")),
    ]
    if trace["trace"] is None:
        rows.append(["tr(H), training data, eval mode", Words(f"not known: {trace['reason']}")])
    else:
        rows.append(["tr(H), training data, eval mode", _trace(trace)])
        note = subset_note(trace)
        if note is not None:
            rows.append(["", Words(note)])
    change = summary.get("trace_change")
    if change is not None and change["before"] is not None:
        rows.append(["tr(G) over the run", Words(_change(change))])
    if summary.get("collapsed"):
        rows.append(["collapsed", Words(summary["collapsed"])])
    if penalty is not None:
        matrix = "G" if penalty["curvature"] == "ggn" else "H"
        rows.append(["penalty on", Words(f"tr({matrix}): {penalty['reason']}")])
    rows.append(["seconds of training", f"{summary['seconds']:.1f}"])
    return Table(title, ("quantity", "value"), rows)


_BESIDE = ("balanced_accuracy", "calibration_error")  # in the records alone


def _metric_rows(
    split: str, loss: float | None, metrics: Mapping[str, float | None]
) -> list[list[str]]:
    rows = [
        [f"{split} {_title(name)}", _metric(name, value)]
        for name, value in metrics.items()
        if name not in _BESIDE
    ]
    return rows if loss is None else [*rows, [f"{split} loss", number(loss)]]


def _metric(name: str, value: float | None) -> str:
    return share(value) if name == "accuracy" else number(value)


def _telling(record: Mapping[str, Any]) -> str:
    """The metric that tells most of a trace's record beside the loss."""
    metric = selection_metric(record)
    return metric if metric in record["metrics"] else next(iter(record["metrics"]))


def trace_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A row a checkpoint, with a column for the metric of each task among them."""
    metrics = list(dict.fromkeys(map(_telling, records)))
    rows = []
    for r in records:
        interval = "-" if r["ci95"] is None else f"[{number(r['ci95'][0])}, {number(r['ci95'][1])}]"
        per_batch = r["num_probes"] and r["method"] not in ("hutch++", "xtrace")
        passes = f"{r['passes']} x {r['num_probes']}" if per_batch else str(r["passes"])
        rows.append([
            r["checkpoint"], _trace(r),
            "-" if r["stderr"] == 0 else interval, number(r["loss"]),
            *(_metric(m, r["metrics"].get(m)) for m in metrics), r["method"], passes,
        ])  # fmt: skip
    title = "trace of the Hessian" if records[0]["curvature"] == "hessian" else "trace of G"
    head = ("checkpoint", "trace", "95 % interval", "loss", *map(_title, metrics), "method",
            "passes")  # fmt: skip
    return Table(title, head, rows)


def subset_note(record: Mapping[str, Any]) -> str | None:
    """What the examples' being a subset adds to the error; None where they are all."""
    if not _is_subset(record):
        return None
    share = f"{record['num_examples']} of {record['num_population']} examples"
    if not record["subset_stderr"]:
        return f"{share}: how far they are from all of them is not known"
    return f"{share}: as an estimate for all of them, ± {number(record['subset_stderr'], 2)} more"


LAYER_HEAD = ("parameter", "weights", "trace", "± stderr", "per weight", "share", "")
_BAR_WIDTH = 20


def layer_table(record: Mapping[str, Any]) -> Table:
    """A row a parameter tensor, with a bar for its share of the trace."""
    layers = record["per_layer"]
    total = sum(layer["trace"] for layer in layers)
    largest = max(abs(layer["trace"]) for layer in layers)
    rows = []
    for layer in layers:
        trace, error = layer["trace"], layer["stderr"]
        bar = "█" * round(_BAR_WIDTH * abs(trace) / largest) if largest else ""
        rows.append([
            layer["name"], str(layer["num_parameters"]), number(trace),
            "?" if error is None else "exact" if error == 0 else number(error, 2),
            number(trace / layer["num_parameters"], 3),
            f"{trace / total:.1%}" if total else "-", Words(("-" if trace < 0 else "") + bar),
        ])  # fmt: skip
    return Table(record["checkpoint"], LAYER_HEAD, rows)


READING = (
    "Read with care: tr(H) falls with the train loss, whatever the generalization, and rescaling "
    "layers changes it but not the function; compare runs of one architecture at similar train "
    "losses. A small trace or Jacobian suggests a small gap and proves none."
)

REPORT_HEAD = ("quantity", "training data", "test data", "gap")


def report_table(record: Mapping[str, Any]) -> Table:
    """The quantities that generalization bounds by flatness combine, of one checkpoint."""
    report, matrix = record["report"], "H" if record["curvature"] == "hessian" else "G"
    jacobian = with_error(report["input_jacobian"], report["input_jacobian_stderr"])
    rows = [["loss", number(report["train_loss"]), number(report["test_loss"]),
             number(report["generalization_gap"])]]  # fmt: skip
    for name, value in report["metrics"].items():
        if name not in _BESIDE:
            gap = number(report["accuracy_gap"]) if name == "accuracy" else "-"
            rows.append([_title(name), number(report["train_metrics"][name]), number(value), gap])
    for name, value in ((f"tr({matrix})", _trace(record)),
                        ("input Jacobian, mean ||df/dx||^2", jacobian)):  # fmt: skip
        rows.append([name, *([value, ""] if record["split"] == "train" else ["", value]), ""])
    return Table(record["checkpoint"], REPORT_HEAD, rows)


def spectrum_table(record: Mapping[str, Any]) -> Table:
    """The eigenvalues, the density's figures and the stability of one checkpoint."""
    rows = [
        [f"eigenvalue {i}", number(value), f"± {number(residual, 2)}"]
        for i, (value, residual) in enumerate(
            zip(record["eigenvalues"], record["residuals"], strict=True), start=1
        )
    ]

    def add(name: str, value: float | None, error: float | None = None) -> None:
        text = "" if error is None else f"± {number(error, 2)}"
        rows.append([name, number(value), text])

    add("smallest eigenvalue", record["smallest"], record["smallest_residual"])
    add("trace (standard error)", record["trace"], record["trace_stderr"])
    add(
        "Frobenius norm (standard error)", record["frobenius_norm"], record["frobenius_norm_stderr"]
    )
    low, high = record["negative_share_bounds"]
    between = f"estimated, {low:.1%} to {high:.1%}"
    rows.append(["share of negative eigenvalues", f"{record['negative_share']:.1%}", between])
    add("effective dimension, trace^2 / norm^2", record["effective_dimension"])
    add("bulk edge, 99 % of eigenvalues below", record["bulk_edge"])
    add("largest eigenvalue / bulk edge", record["largest_over_bulk_edge"])
    stability = record["stability"]
    if stability is not None:
        kind = "Nesterov momentum" if stability["nesterov"] else "momentum"
        name = f"threshold at lr {stability['lr']:g}, {kind} {stability['momentum']:g}"
        add(name, stability["threshold"])
        add("largest eigenvalue / threshold", stability["largest_over_threshold"])
        add("largest learning rate below the threshold", stability["largest_stable_lr"])
        unstable = str(stability["num_unstable"])
        more = " or more" if stability["num_unstable_is_lower_bound"] else ""
        rows.append(["directions above the threshold", unstable + more, ""])
        low, high = stability["flow_unstable_bounds"]
        flow, between = str(stability["flow_unstable_directions"]), f"estimated, {low} to {high}"
        rows.append(["unstable directions of gradient flow", flow, between])
        add("fastest time constant of gradient flow", stability["fastest_time_constant"])
        slowest = stability["slowest_time_constant"]
        name = "slowest time constant of gradient flow"
        rows.append([name, "none: it never decays" if slowest is None else number(slowest), ""])
    flatness = record["flatness"]
    for kind, name in (("plain", "distance"), ("filter_normalized", "share of filter norms")):
        own, at = flatness[kind], f"sharpness at {flatness['radius']:g}, {name}"
        add(f"{at}: average", own["average"], own["average_stderr"])
        rows.append([f"{at}: worst found", number(own["worst"]), "a lower bound"])
    rows.append(["train loss" if record["split"] == "train" else "test loss",
                 number(record["loss"]), ""])  # fmt: skip
    matrix = "Hessian" if record["curvature"] == "hessian" else "Gauss-Newton matrix"
    return Table(f"{matrix} of {record['checkpoint']}", ("quantity", "value", "error"), rows)


def verdict_table(title: str, record: Mapping[str, Any]) -> Table:
    """A row a check."""
    rows = [[row["check"], Words(row["verdict"]), Words(row["detail"])] for row in record["rows"]]
    return Table(title, ("check", "verdict", "detail"), rows)


_CURVATURE = ("train_loss", "generalization_gap", "trace", "input_jacobian", "top_eigenvalue")


def comparison_tables(comparison: Mapping[str, Any], *, several: bool) -> list[Table]:
    """Two tables for the rows of each task and of the settings that set groups apart.

    The first is on how well they generalize, the second on their curvature and cost.

    Args:
        comparison: The comparison's record.
        several: Whether there is more than one data set or model, to be named in each row.
    """
    apart: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for row in comparison["rows"]:  # those of which no run is finished tell no task
        apart.setdefault((row["task"], settings_text(row["settings"])), []).append(row)
    spread = "mean ± standard deviation over seeds, of the last epoch"
    if comparison["num_unfinished"]:
        ended = comparison["num_runs"] - comparison["num_unfinished"]
        spread = f"{ended} of {comparison['num_runs']} runs: {spread}"
    tasks = {task for task, _ in apart}
    found = []
    for (task, settings), rows in apart.items():
        title = f"{task}: {spread}" if len(tasks) > 1 and task is not None else spread
        title = f"{settings}: {title}" if settings else title
        names = [f"{row['dataset']} {row['model']} {row['regularizer']}" if several
                 else row["regularizer"] for row in rows]  # fmt: skip
        found += [_generalization(title, names, rows), _curvature(title, names, rows)]
    return found


_ALWAYS = ("dataset", "model", "epochs", "lr", "optimizer", "batch-size", "weight-decay")


def settings_lines(comparison: Mapping[str, Any]) -> list[str]:
    """What all runs share, but the defaults of what few people set; in what groups differ."""
    groups = [g for g in comparison["settings"] if g]
    if not groups:
        return []
    differ = differing(groups)
    usual = {key_of(item.name): getattr(TrainConfig(), item.name) for item in fields(TrainConfig)}
    shared = {
        k: v for k, v in groups[0].items()
        if k not in differ and (k in _ALWAYS or v != usual[k])
    }  # fmt: skip
    lines = [f"Settings of all runs, the other ones at their defaults: {settings_text(shared)}."]
    if differ:
        lines.append(
            f"{len(groups)} groups of runs differ in {', '.join(differ)}; rows are compared within "
            "a group alone."
        )
    return lines


def _generalization(spread: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """The task's metrics and the loss on test data, and how they differ from none's."""
    metrics = [m for m in rows[0]["metrics"] or ("accuracy",) if m not in _BESIDE]
    columns = {f"test {_title(m)}": m for m in metrics} | {"test loss": "test_loss"}
    if not rows[0]["metrics"] or "calibration_error" in rows[0]["metrics"]:
        columns["calibration error"] = "calibration_error"
    main = rows[0]["selection"]["metric"] if rows[0]["selection"] else "accuracy"
    compared = {} if main == "loss" else {f"{_title(main)} - none": main}
    compared["loss - none"] = "test_loss"
    cells = [
        [
            name, _seeds(row), *(_winning(row, m) for m in columns.values()),
            *(_difference(row, m) for m in compared.values()),
        ]
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    head = ["regularizers", "seeds", *columns, *compared]
    return Table(f"{spread}; differences with 95 % interval and Holm's p", head, cells)


def _curvature(spread: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was measured of each row beside how it generalizes, and what a step costs."""
    measured = [m for m in _CURVATURE if any(row[m]["mean"] is not None for row in rows)]
    cells = [
        [name, *(_spread(row[m]) for m in measured),
         "-" if row["step_cost"] is None else f"{row['step_cost']:.2f}"]
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    head = ["regularizers", *map(_title, measured), "step cost"]
    return Table(f"{spread}; step cost over none's", head, cells)


def _title(measure: str) -> str:
    return measure.replace("_", " ")


def _seeds(row: Mapping[str, Any]) -> str:
    total = row["num_seeds"] + row["num_diverged"] + row["num_unfinished"]
    count = f"{row['num_seeds']} of {total}" if row["num_unfinished"] else str(row["num_seeds"])
    notes = [f"{row[f'num_{k}']} {k}" for k in ("diverged", "collapsed") if row[f"num_{k}"]]
    return f"{count} ({', '.join(notes)})" if notes else count


def _named(measures: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A measure, or a metric of the task, of a row or of its differences."""
    name = measure_of(name)
    return measures[name] if name in measures else measures["metrics"][name]


def _winning(row: Mapping[str, Any], measure: str) -> str:
    text = _spread(_named(row, measure))
    return Strong(text) if measure_of(measure) in row["wins"] else text


def _spread(measure: Mapping[str, Any]) -> str:
    if measure["mean"] is None:
        return "-"
    if measure["std"] is None:
        return number(measure["mean"])
    return f"{number(measure['mean'])} ± {number(measure['std'], 2)}"


_SMALL = 1e-3  # what four places show little of


def _difference(row: Mapping[str, Any], measure: str) -> str:
    if row["difference_to_none"] is None:
        return "-"
    difference = _named(row["difference_to_none"], measure)
    if difference["mean"] is None:
        return "-"
    low, high = difference["ci95"] or (difference["mean"], difference["mean"])
    form = "+.2g" if 0 < max(abs(low), abs(high)) < _SMALL else "+.4f"
    text = f"{difference['mean']:{form}}"
    if difference["ci95"] is None:
        return text
    p = difference["p_holm"]
    return f"{text} [{low:{form}}, {high:{form}}]" + ("" if p is None else f" p={p:.2g}")


def tuning_table(record: Mapping[str, Any]) -> Table:
    """A row a strength that was tried, the chosen one marked."""
    rows = []
    for trial in record["trials"]:
        name, loss = f"{trial['strength']:g}", number(trial["val_loss"])
        chosen = trial["strength"] == record["strength"]
        above = with_error(trial["above_best"], trial["stderr"]) if trial["above_best"] else ""
        fate = "chosen" if chosen else "diverged" if trial["pruned"] else ""
        rows.append([name, Strong(loss) if chosen else loss, above, Words(fate)])
    title = (
        f"{record['regularizer']}: {record['spent']:.1f} of {record['budget']:g} plain runs' time"
    )
    return Table(title, ("strength", "validation loss", "above the best", ""), rows)
