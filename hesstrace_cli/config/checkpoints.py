"""The settings of the commands that look at networks: estimates, spectra, bits and proofs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hesstrace_cli.config.data import DataConfig
from hesstrace_cli.config.fields import inherited, option, whole_number
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(DataConfig):
    """What every command that looks at checkpoints has."""

    curvature: str = option(
        "hessian", "of the mean loss: the Hessian or its Gauss-Newton part", panel="Estimate",
        choices=("hessian", "ggn"),
    )  # fmt: skip
    split: str = option("train", "examples", panel="Estimate", choices=("train", "test"))
    num_examples: int | None = option(
        None, "estimate on a stratified subset of this many examples", panel="Estimate", minimum=1
    )
    dtype: str = option(
        "float32", "precision of the computation", panel="Estimate", choices=("float32", "float64")
    )
    json: str | None = option(None, "write JSON to this file, - for stdout", panel="Output")
    plot: str | None = option(None, "draw to this file (.png, .pdf, .svg)", panel="Output")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(DataConfig):
    """Settings of `hesstrace verify`."""

    model: str = inherited(DataConfig, "model", "small-cnn")
    dataset: str = inherited(DataConfig, "dataset", "digits")
    task: str = inherited(DataConfig, "task", "auto")
    val_fraction: float = inherited(DataConfig, "val_fraction", 0.0)
    batch_size: int = inherited(DataConfig, "batch_size", 8)
    dtype: str = option("float64", "precision", panel="Estimate", choices=("float64",))
    json: str | None = option(None, "write JSON to this file, - for stdout", panel="Output")


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(CheckpointConfig):
    """Settings of `hesstrace spectrum`."""

    top: int = option(10, "eigenvalues to find, the largest", panel="Estimate", minimum=1)
    num_probes: int = option(4, "random vectors for the density", panel="Estimate", minimum=1)
    steps: int = option(30, "Lanczos steps from each of them", panel="Estimate", minimum=2)
    max_products: int = option(
        200, "products with the matrix for the eigenvalues, at most", panel="Estimate", minimum=2
    )
    lr: float | None = option(
        None, "learning rate to judge (default: the run's)", panel="Stability", above=0
    )
    momentum: float | None = option(
        None,
        "momentum to judge (default: the run's)",
        panel="Stability",
        minimum=0,
        maximum=0.99999,
    )
    nesterov: bool | None = option(
        None, "whether it is Nesterov's (default: as in the run)", panel="Stability"
    )
    radius: float = option(
        0.05,
        "radius of the sharpness: a Euclidean distance, and a share of every filter's norm",
        panel="Flatness",
        above=0,
    )
    num_directions: int = option(
        10, "random directions of the average sharpness", panel="Flatness", minimum=1
    )
    slice: int = option(
        0,
        "take the loss along 1 or 2 random filter-normalized directions, for --plot and --json",
        panel="Flatness",
        minimum=0,
        maximum=2,
    )
    slice_radius: float = option(
        1.0, "how far, as a share of every filter's norm", panel="Flatness", above=0
    )
    slice_points: int = option(
        21, "points of each direction, an odd number", panel="Flatness", minimum=3
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slice and self.plot is None and self.json is None:
            raise ConfigError("--slice shows in --plot FILE and --json FILE; give one of them")
        if self.slice_points % 2 == 0:
            raise ConfigError(f"--slice-points is {self.slice_points}, expected an odd number")


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig(CheckpointConfig):
    """How a trace is estimated, and to what error."""

    method: str = option(
        "auto", "estimator of the trace", panel="Estimate",
        choices=("auto", "exact", "hutchinson", "dropout", "hutch++", "xtrace"),
    )  # fmt: skip
    num_probes: int | None = option(
        None,
        "fresh probes per batch in each pass (default: 2); for hutch++ and xtrace, products with "
        "the whole matrix (default: 12)",
        panel="Estimate",
        minimum=1,
    )
    dropout_scheme: str = option(
        "tensor", "what --method dropout drops", panel="Estimate",
        choices=("tensor", "block", "entry"),
    )  # fmt: skip
    keep_prob: float = option(
        0.3, "probability that --method dropout keeps a tensor or entry", panel="Estimate",
        above=0, maximum=1,
    )  # fmt: skip
    rtol: float | None = option(
        None,
        "stop when the 95 % interval is within this fraction of the trace (default: 0.05, or one "
        "pass where only --num-probes is given)",
        panel="Estimate",
        minimum=0,
    )
    atol: float | None = option(None, "or within this absolute width", panel="Estimate", minimum=0)
    max_passes: int | None = option(
        None, "stop after this many passes (default: 100)", panel="Estimate", minimum=1
    )
    max_seconds: float = option(
        math.inf, "stop after the pass in which this time is over", panel="Estimate", above=0
    )


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(EstimatorConfig):
    """Settings of `hesstrace estimate-trace`."""

    per_layer: bool = option(False, "the trace of every parameter tensor too", panel="Estimate")
    report: bool = option(
        False,
        "losses on training and test data, their gap and the input Jacobian beside the trace",
        panel="Output",
    )
    plot: str | None = option(
        None,
        "draw to this file (.png, .pdf, .svg): the trace of every layer, or of several "
        "checkpoints against the epoch",
        panel="Output",
    )


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(EstimatorConfig):
    """Settings of `hesstrace sensitivity`."""

    bits: list[int] = option(
        [2, 3, 4, 8], "bit widths to choose from", panel="Quantization", minimum=2, maximum=16
    )
    average_bits: float | None = option(
        None, "bits a quantized weight may take on average", panel="Quantization", above=0
    )
    size_mb: float | None = option(
        None, "megabytes that all parameters may take, scales (16 bits) and those that are not "
        "quantized (32 bits) included", panel="Quantization", above=0,
    )  # fmt: skip
    per: str = option(
        "channel", "what shares a scale", panel="Quantization", metavar="tensor|channel|group:N"
    )
    scale: str = option(
        "max", "of a group: its largest absolute value on the last level, or least squares",
        panel="Quantization", choices=("max", "least-squares"),
    )  # fmt: skip
    include: list[str] = option(
        [], "quantize only weights with such a name; may be repeated", panel="Quantization",
        metavar="GLOB",
    )  # fmt: skip
    exclude: list[str] = option(
        [], "leave out weights with such a name; may be repeated", panel="Quantization",
        metavar="GLOB",
    )  # fmt: skip
    all_weights: bool = option(
        False, "those that do not train too, as under LoRA", panel="Quantization"
    )
    check: bool = option(
        False, "measure the loss with each weight rounded alone, and with whole allocations, by "
        "traces and by other rules of the same size", panel="Quantization",
    )  # fmt: skip
    csv: str | None = option(None, "write a line a weight to this file", panel="Output")
    export: str | None = option(
        None, "write the allocation to FILE.yaml, a name and its bits a line, or to FILE.json, "
        "which torchao reads", panel="Output",
    )  # fmt: skip
    plot: str | None = option(
        None, "draw to this file (.png, .pdf, .svg): each weight's predicted rise, by bits",
        panel="Output",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.bits)) < len(self.bits) or not self.bits:
            raise ConfigError(f"--bits is {self.bits}, expected different whole numbers")
        if self.average_bits is not None and self.size_mb is not None:
            raise ConfigError("--average-bits and --size-mb are two budgets; give one of them")
        if self.export is not None and self.average_bits is None and self.size_mb is None:
            raise ConfigError("--export writes an allocation; give --average-bits or --size-mb")
        if self.export is not None and not self.export.endswith((".yaml", ".yml", ".json")):
            raise ConfigError(
                f"--export is {shortened(self.export)}, expected a name ending with .yaml or .json"
            )
        self.group_size()

    def group_size(self) -> int:
        """N of `--per group:N`; 0 for a tensor and a channel.

        Raises:
            ConfigError: If it is neither of these.
        """
        if self.per in ("tensor", "channel"):
            return 0
        kind, _, number = self.per.partition(":")
        size = whole_number(number)
        if kind != "group" or not size:
            raise ConfigError(
                f"--per is {shortened(self.per)}, expected tensor, channel or group:N, as group:128"
            )
        return size
