"""How sensitivity records look: tables, a plot, CSV, and the files that other tools read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hesstrace_cli.reporting.layout import Table
from hesstrace_cli.reporting.plots import Record, drawn, drawn_names
from hesstrace_cli.reporting.tables import number, with_error
from hesstrace_cli.reporting.text import for_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_DRAWN = 60
_MARKERS = "os^Dv<>PX*"


def weights_table(record: Record) -> Table:
    """A row a weight: its trace, the predicted rise by bits, and the bits that it gets."""
    allocation = record["allocation"]
    head = ["parameter", "weights", "trace", "mean trace",
            *(f"rise at {b}" for b in record["bits"])]  # fmt: skip
    rows = []
    for weight in record["weights"]:
        cells = [weight["name"], str(weight["num_parameters"]),
                 with_error(weight["trace"], weight["stderr"]), number(weight["mean_trace"], 3),
                 *(_rise(weight["rise"][str(b)]) for b in record["bits"])]  # fmt: skip
        rows.append([*cells, str(allocation[weight["name"]])] if allocation else cells)
    return Table(record["checkpoint"], [*head, "bits"] if allocation else head, rows)


def _rise(rise: Mapping[str, float | None]) -> str:
    error = rise["stderr"]
    return f"{number(rise['value'], 3)} ± {'?' if error is None else number(error, 2)}"


def remarks(record: Record) -> Iterator[str]:
    """What the numbers of a record mean, and where they mean little."""
    yield f"method {record['method']}: {record['reason']}"
    large = {b: [w["name"] for w in record["weights"] if b in w["large"]] for b in record["bits"]}
    for b, names in large.items():
        if names:
            yield (
                f"at {b} bits the error of {len(names)} of {len(record['weights'])} weights is "
                "over 5 % of their squared norm: no small step, the quadratic model is a guess"
            )
    if record["allocation"] is None:
        return
    yield (
        f"allocation: {number(record['average_bits'], 3)} bits on average, "
        f"{number(record['size_mb'])} MB, predicted rise {_rise(record['predicted_rise'])}"
    )
    flips = record["flips"]
    if flips:
        others = ", ".join(
            f"{name} (also {' or '.join(map(str, own))})" for name, own in flips.items()
        )
        yield f"within the traces' intervals {len(flips)} decisions flip: {others}"
    else:
        yield "no decision flips within the traces' intervals"


def alone_table(record: Record) -> Table:
    """A row a weight: the rise with it rounded alone, measured and, in brackets, predicted."""
    cells: dict[str, list[str]] = {}
    for each in record["measured"]["alone"]:
        text = f"{number(each['rise'], 3)} ({number(each['predicted'], 3)})"
        cells.setdefault(each["name"], []).append(text)
    head = ("parameter", *(f"at {b} bits" for b in record["bits"]))
    rows = [[name, *own] for name, own in cells.items()]
    return Table("each weight alone: measured rise (predicted)", head, rows)


def measured_table(record: Record) -> Table:
    """A row a bit width: how the rises of weights rounded alone agree with the prediction."""
    rows = [
        [str(by["bits"]), number(by["rank_correlation"], 2),
         number(by["rank_correlation_with_slope"], 2),
         "-" if by["within_interval"] is None else f"{by['within_interval']:.0%}",
         f"{by['num_large']} of {len(record['weights'])}"]
        for by in record["measured"]["by_bits"]
    ]  # fmt: skip
    head = ("bits", "rank correlation", "with the slope", "within the interval", "large errors")
    return Table("how the two agree over the weights", head, rows)


def rules_table(record: Record) -> Table:
    """A row a rule: the measured rise of its allocation, the least first."""
    own = sorted(
        record["measured"]["allocations"],
        key=lambda each: float("inf") if each["rise"] is None else each["rise"],
    )
    rows = []
    for each in own:
        predicted, spread = each["predicted_rise"], each["spread"]
        between = "" if spread is None else f" ({number(spread[0], 3)} to {number(spread[1], 3)})"
        rows.append([
            each["rule"], number(each["rise"], 3) + between,
            "-" if predicted is None else _rise(predicted), number(each["average_bits"], 3),
            number(each["size_mb"]),
        ])  # fmt: skip
    head = ("allocation by", "measured rise", "predicted", "average bits", "MB")
    return Table(f"loss {number(record['loss'])} unrounded", head, rows)


def csv_text(records: Sequence[Record]) -> str:
    """A line a weight of every checkpoint."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    bits = records[0]["bits"]
    by_bits = [f"{what}_{b}" for b in bits for what in ("error", "rise", "rise_stderr")]
    writer.writerow(["checkpoint", "name", "num_parameters", "trace", "stderr", "mean_trace",
                     *by_bits, "bits"])  # fmt: skip
    for record in records:
        for weight in record["weights"]:
            cells = [
                value
                for b in map(str, bits)
                for value in (weight["error"][b], weight["rise"][b]["value"],
                              weight["rise"][b]["stderr"])
            ]  # fmt: skip
            writer.writerow([
                for_csv(record["checkpoint"]), for_csv(weight["name"]), weight["num_parameters"],
                weight["trace"], weight["stderr"], weight["mean_trace"], *cells,
                (record["allocation"] or {}).get(weight["name"]),
            ])  # fmt: skip
    return text.getvalue()


def exported(record: Record, file: str) -> str:
    """The allocation as YAML, name to bits; as JSON in the form that torchao reads."""
    if Path(file).suffix == ".json":
        return json.dumps(_for_torchao(record), indent=2) + "\n"
    text: str = yaml.safe_dump(dict(record["allocation"]), sort_keys=False, allow_unicode=True)
    return text


def _for_torchao(record: Record) -> dict[str, Any]:
    """An `FqnToConfig` of integer weights, as torchao's `config_from_dict` reads it.

    torchao takes up to eight bits a weight, of modules it knows: linear maps and embeddings. The
    names are those of parameters' modules; of the others it finds none to change.
    """
    configs = {
        name.removesuffix(".weight"): _described("IntxWeightOnlyConfig", {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
            "granularity": _granularity(record["per"]),
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        })
        for name, bits in record["allocation"].items()
        if name.endswith(".weight") and bits <= 8
    }  # fmt: skip
    return _described("FqnToConfig", {"fqn_to_config": configs})


def _granularity(per: str) -> dict[str, Any]:
    kind, _, size = per.partition(":")
    if kind == "group":
        return _described("PerGroup", {"group_size": int(size)})
    return _described("PerAxis", {"axis": 0}) if kind == "channel" else _described("PerTensor", {})


_VERSIONS = {"IntxWeightOnlyConfig": 2}  # of torchao's forms of settings; else 1


def _described(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"_type": kind, "_version": _VERSIONS.get(kind, 1), "_data": data}


def plot_rises(records: Sequence[Record]) -> Figure:
    """The predicted rise of every weight by bits, the allocated ones filled."""
    from matplotlib.figure import Figure

    weights = sum(min(len(r["weights"]), _MOST_DRAWN) for r in records)
    figure = Figure(figsize=(6.4, 1.4 * len(records) + 0.22 * weights), layout="constrained")
    names = drawn_names([str(r["checkpoint"]) for r in records])
    panels = figure.subplots(len(records), 1, squeeze=False)[:, 0]
    for record, name, axes in zip(records, names, panels, strict=True):
        own = record["weights"]
        if len(own) > _MOST_DRAWN:
            own = sorted(own, key=lambda w: -abs(w["trace"]))[:_MOST_DRAWN]
        for k, b in enumerate(record["bits"]):
            chosen = [(record["allocation"] or {}).get(w["name"]) == b for w in own]
            rises = [w["rise"][str(b)]["value"] for w in own]
            for filled in (False, True):
                at = [i for i, c in enumerate(chosen) if c == filled and rises[i] > 0]
                axes.plot(
                    [rises[i] for i in at], at, linestyle="", marker=_MARKERS[k % len(_MARKERS)],
                    color=f"C{k}", markersize=6, fillstyle="full" if filled else "none",
                    label=f"{b} bits" if filled == (record["allocation"] is not None) else None,
                )  # fmt: skip
        axes.set_yticks(range(len(own)), [drawn(w["name"]) for w in own], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        legend = ", the allocated bits filled" if record["allocation"] else ""
        axes.set(xlabel=f"predicted rise of the loss{legend}", title=name)
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure
