"""The settings of every command: one dataclass each, the same names in flags and in YAML."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hesstrace_cli.config.declared import task_names
from hesstrace_cli.config.fields import (
    LARGEST_SHIFT,
    SMALLEST_SCALE,
    check_range,
    inherited,
    option,
    whole_number,
)
from hesstrace_cli.config.regularizers import (
    REGULARIZERS,
    UNUSED_LAMBDA,
    parse_range,
    parse_terms,
    takes_lambda,
    usual_range,
)
from hesstrace_cli.config.rows import Row, open_names, parse_row, parse_tune, split, tuned_rows
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError

TASK_NAMES = task_names()
SEQ_LEN = 35
"""Tokens of a window of a text where `--seq-len` does not say it."""
WORD = "word"
"""What `--tokens` is where it is not given."""
WIKITEXT, TEXT = "wikitext-2", "text:"
"""The data sets that are texts: that one, and what begins with the other."""


def is_text(dataset: str) -> bool:
    """Whether a data set is a text."""
    return dataset == WIKITEXT or dataset.startswith(TEXT)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Model, data and device: the settings that every command has."""

    model: str | None = option(
        None,
        "small-cnn, mlp, resnet18, resnet50, wrn-16-4, wrn-28-10, lstm, gpt, torchvision:NAME, "
        "hf:DIR, hf:CONFIG.json, FILE.py:factory or package.module:factory",
        panel="Model and data",
    )
    model_arg: dict[str, Any] = option(
        {}, "key=value for the model's factory; may be repeated", panel="Model and data",
        metavar="KEY=VALUE",
    )  # fmt: skip
    num_classes: int | None = option(
        None, "number of classes, where the data may lack some", panel="Model and data", minimum=1
    )
    task: str | None = option(
        None, "what outputs and targets are for; auto goes by the targets (default: auto, or as "
        "the checkpoint says)", panel="Model and data", choices=("auto", *TASK_NAMES),
    )  # fmt: skip
    class_weights: str | None = option(
        None, "balanced, or a weight for each class in the mean loss", panel="Model and data",
        metavar="balanced|W,W,...",
    )  # fmt: skip
    ignore_index: int = option(
        -100, "the target of tokens and pixels that do not count", panel="Model and data"
    )
    dataset: str | None = option(
        None,
        "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, wikitext-2, text:DIR, "
        "imagefolder:DIR, FILE.npz or FILE.py:factory",
        panel="Model and data",
    )
    data_dir: str | None = option(
        None, "folder with torchvision's data files, or with the folder wikitext-2 (default: data)",
        panel="Model and data",
    )  # fmt: skip
    download: bool = option(False, "allow torchvision to fetch the data", panel="Model and data")
    mean: list[float] | None = option(
        None, "means to subtract, one or one a channel (0.5,0.5,0.5)", panel="Model and data",
        minimum=-LARGEST_SHIFT, maximum=LARGEST_SHIFT,
    )  # fmt: skip
    std: list[float] | None = option(
        None, "standard deviations to divide by", panel="Model and data",
        minimum=SMALLEST_SCALE, maximum=LARGEST_SHIFT,
    )  # fmt: skip
    image_size: int | None = option(
        None, "resize the shorter side to this and crop the centre", panel="Model and data",
        minimum=1, maximum=2**16,
    )  # fmt: skip
    train_examples: int | None = option(
        None, "train on a fixed stratified subset of N examples; of a text on its first N windows",
        panel="Model and data", minimum=1,
    )  # fmt: skip
    tokens: str | None = option(
        None, "of a text: words, characters, bytes, or those of the tokenizer in a folder "
        "(default: word)", panel="Model and data", metavar="word|char|byte|DIR",
    )  # fmt: skip
    vocab_size: int | None = option(
        None, "keep the most frequent words or characters, so many with <unk>, which stands for "
        "the others (default: all)", panel="Model and data", minimum=2,
    )  # fmt: skip
    seq_len: int | None = option(
        None, f"tokens of a window of a text (default: {SEQ_LEN})", panel="Model and data",
        minimum=1,
    )  # fmt: skip
    train_tokens: int | None = option(
        None, "train on the first N tokens of a text, and count these for the vocabulary",
        panel="Model and data", minimum=2,
    )  # fmt: skip
    val_fraction: float | None = option(
        None,
        "share of the training data held out for validation (default: 0.1); a text has a file "
        "for it, which 0 leaves out",
        panel="Model and data",
        minimum=0,
        maximum=0.9,
    )
    label_noise: float | None = option(
        None,
        "share of the training labels, the same for every seed, replaced by other classes; those "
        "held out and of the test stay clean",
        panel="Model and data",
        minimum=0,
        maximum=1,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", panel="Machine")
    seed: int = option(0, "seed of all randomness", panel="Machine", minimum=0)
    batch_size: int = option(64, "examples per batch", panel="Machine", minimum=1)
    num_workers: int = option(0, "processes that load image files", panel="Machine", minimum=0)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_range(item, getattr(self, item.name))
        if (self.mean is None) != (self.std is None):
            raise ConfigError("--mean and --std go together; one of them is missing")
        self.class_weights_given()

    def class_weights_given(self) -> tuple[float, ...] | None:
        """The weights that were given as numbers; None for none and for `balanced` ones.

        Raises:
            ConfigError: If they are no numbers from 0.
        """
        if self.class_weights in (None, "balanced"):
            return None
        try:
            weights = tuple(float(part) for part in str(self.class_weights).split(","))
        except ValueError:
            weights = (-1.0,)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ConfigError(
                f"--class-weights is {shortened(self.class_weights)}, expected balanced, or "
                "numbers from 0 joined with commas, one a class"
            )
        return weights


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Settings of `hesstrace train`, complete enough to repeat the run."""

    model: str = inherited(DataConfig, "model", "small-cnn")
    dataset: str = inherited(DataConfig, "dataset", "digits")
    task: str = inherited(DataConfig, "task", "auto")
    data_dir: str = inherited(DataConfig, "data_dir", "data")
    tokens: str = inherited(DataConfig, "tokens", WORD)
    seq_len: int = inherited(DataConfig, "seq_len", SEQ_LEN)
    val_fraction: float = inherited(DataConfig, "val_fraction", 0.1)
    batch_size: int = inherited(DataConfig, "batch_size", 32)
    epochs: int = option(60, "passes over the training data", panel="Training", minimum=1)
    lr: float = option(0.05, "learning rate", panel="Training", above=0)
    momentum: float = option(0.9, "momentum of SGD", panel="Training", minimum=0, maximum=1)
    nesterov: bool = option(False, "Nesterov's form of the momentum", panel="Training")
    weight_decay: float = option(5e-4, "weight decay", panel="Training", minimum=0)
    optimizer: str = option("sgd", "optimizer", panel="Training", choices=("sgd", "adamw"))
    weight_decay_on: str = option(
        "all", "what decays: all parameters, or those with two dimensions and more, without biases "
        "and norms", panel="Training", choices=("all", "matrices"),
    )  # fmt: skip
    schedule: str = option(
        "cosine",
        "learning rate over the run; step: times 0.2 at 30, 60 and 80 %; plateau: a quarter after "
        "each epoch that is not the best on validation so far",
        panel="Training",
        choices=("constant", "cosine", "step", "plateau"),
    )
    lr_warmup: float = option(
        0.0, "fraction of the run over which the learning rate rises from 0", panel="Training",
        minimum=0, maximum=1,
    )  # fmt: skip
    clip_grad: float | None = option(
        None, "scale the gradient, penalties' part included, down to this norm (default: never)",
        panel="Training", above=0,
    )  # fmt: skip
    augment: str = option(
        "none", "augmentation of images", panel="Training", choices=("none", "crop-flip")
    )
    reg: list[str] = option(
        ["none"],
        "regularizer, NAME or NAME=STRENGTH (none, " + ", ".join(REGULARIZERS) + "); repeat it, "
        "or join with commas, for several at once; SETTING=VALUE among them wins over --SETTING",
        panel="Regularization",
        metavar="NAME[=STRENGTH]",
    )
    lambda_: float | None = option(
        None, "strength of the one penalty given without its own", panel="Regularization",
        minimum=0,
    )  # fmt: skip
    estimator: str = option(
        "dropout",
        "of the trace penalty: dense probes (SEHT-H) or dropped ones (SEHT-D)",
        panel="Trace penalty",
        choices=("hutchinson", "dropout"),
    )
    dropout_scheme: str = option(
        "tensor",
        "drop whole parameter tensors (fast), all but a block of them that follow each other "
        "(faster), or single entries (the paper's)",
        panel="Trace penalty",
        choices=("tensor", "block", "entry"),
    )
    keep_prob: float = option(
        0.5, "probability that a tensor or entry is kept; divided out", panel="Trace penalty",
        above=0, maximum=1,
    )  # fmt: skip
    num_probes: int = option(1, "probes per step", panel="Trace penalty", minimum=1)
    every: int = option(
        1, "add the penalty on every k-th step only", panel="Trace penalty", minimum=1
    )
    warmup: float = option(
        0.5, "fraction of the run over which the strength rises from 0", panel="Trace penalty",
        minimum=0, maximum=1,
    )  # fmt: skip
    curvature: str = option(
        "auto",
        "of the trace penalty: the Hessian, its Gauss-Newton part, or what suits the model",
        panel="Trace penalty",
        choices=("auto", "hessian", "ggn"),
    )
    form: str = option(
        "auto",
        "of the penalty on tr(G): squared norms of every example's gradient (far less noise), or "
        "of the batch's",
        panel="Trace penalty",
        choices=("auto", "example", "batch"),
    )
    penalty_examples: float = option(
        1.0, "share of the batch, drawn anew each step, that the penalty is taken of",
        panel="Trace penalty", above=0, maximum=1,
    )  # fmt: skip
    draw: str = option(
        "signs",
        "of the penalty on tr(G) by the batch: random signs, or labels from the model's outputs "
        "(the Fisher penalty)",
        panel="Trace penalty",
        choices=("signs", "labels"),
    )
    fd_step: float = option(
        0.1, "of grad-norm-fd: the step epsilon along the gradient, in units of the gradient",
        panel="Regularization", above=0,
    )  # fmt: skip
    out: str | None = option(
        None, "run folder (default: runs/<data>-<model>-<regularizers>-seed<seed>)", panel="Output"
    )
    precision: str = option(
        "float32", "of the forward pass in training; weights stay in float32", panel="Machine",
        choices=("float32", "bf16", "fp16"),
    )  # fmt: skip
    compile: bool = option(
        False, "compile the model and the trace penalty (takes a minute at the start)",
        panel="Machine",
    )  # fmt: skip
    channels_last: bool = option(
        False, "memory layout of images that GPUs are fastest with", panel="Machine"
    )
    accumulate: int = option(
        1, "rounds that a batch is split into, to save memory", panel="Machine", minimum=1
    )
    sync_bn: bool = option(
        False, "BatchNorm over the examples of all of torchrun's processes, not of each",
        panel="Machine",
    )  # fmt: skip
    shard: bool = option(
        False, "split weights, gradients and optimizer's state over torchrun's processes (FSDP2)",
        panel="Machine",
    )  # fmt: skip
    monitor_trace: int = option(
        0, "estimate the trace every k epochs on 500 fixed examples", panel="Output", minimum=0
    )
    keep_checkpoints: int = option(
        0, "keep the checkpoints of the last k epochs too", panel="Output", minimum=0
    )
    tensorboard: bool = option(
        False, "write the figures of each epoch for TensorBoard too", panel="Output"
    )
    top_eigenvalue: bool = option(
        False, "put the largest eigenvalue of the Hessian into the summary", panel="Output"
    )
    init: str | None = option(None, "start from the weights of this checkpoint", panel="Output")
    resume: bool = option(False, "go on with the run in --out", panel="Output")
    resume_or_start: bool = option(
        False, "go on with the run in --out, or begin it where there is none", panel="Output"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_combinations()
        self.effective()

    def row(self) -> Row:
        """The regularizers with their strengths, and the settings given beside them.

        Raises:
            ConfigError: If a name is unknown, or a strength or value cannot be.
        """
        return parse_row(self.reg, self.lambda_, TrainConfig)

    def effective(self) -> TrainConfig:
        """The settings that the run has: those beside the regularizers win.

        Raises:
            ConfigError: If they cannot be, alone or together.
        """
        own = self.row().settings
        if all(getattr(self, name) == value for name, value in own.items()):
            return self
        return dataclasses.replace(self, **own)

    def _check_combinations(self) -> None:
        """Refuse what contradicts itself whatever the model and data are."""
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ConfigError("--nesterov is a form of SGD's momentum; --momentum is 0 or "
                              "--optimizer is not sgd")  # fmt: skip
        if self.schedule == "plateau" and not self.val_fraction:
            raise ConfigError("--schedule plateau goes by the validation; --val-fraction is 0")
        if self.sync_bn and (self.accumulate > 1 or self.compile):
            raise ConfigError("--sync-bn cannot be combined with --accumulate or --compile")
        if self.form == "example" and self.curvature == "hessian":
            raise ConfigError(
                "--form example is of tr(G), and --curvature is hessian; leave one of them out"
            )
        if self.draw == "labels" and (self.form == "example" or self.compile):
            given = "--compile" if self.compile else "--form example"
            raise ConfigError(f"--draw labels is of the batch's gradient, and {given} of another; "
                              "leave one of them out")  # fmt: skip
        if self.draw == "labels" and self.curvature == "hessian":
            raise ConfigError(
                "--draw labels is of tr(G), and --curvature is hessian; leave one of them out"
            )
        if self.form == "example" and self.compile:
            raise ConfigError(
                "--form example reads the graph of the forward pass, which --compile has none of; "
                "leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Settings of `hesstrace compare`: train's, each `reg` one row, times the seeds."""

    reg: list[str] = option(
        ["none", "trace"],
        "one row of the table: none, NAME[=STRENGTH], or SETTING=VALUE as weight-decay=0.001, "
        "several joined with commas; repeat it for more rows",
        panel="Regularization",
        metavar="NAME[=STRENGTH],...",
    )
    model: str = option(
        "small-cnn", "one model, or several joined with commas", panel="Model and data"
    )
    dataset: str = option(
        "digits", "one data set, or several joined with commas", panel="Model and data"
    )
    seeds: list[int] = option([0, 1, 2], "seeds, 0,1,2", panel="Comparison", minimum=0)
    tune: list[str] = option(
        [],
        "strengths, or values of a setting, to choose from on validation, for rows with NAME and "
        "no strength or value; as many for each NAME",
        panel="Comparison",
        metavar="NAME=V1:V2:...",
    )
    tune_by: str | None = option(
        None,
        "what --tune chooses by (default: the task's own: accuracy, perplexity, ...)",
        panel="Comparison",
        choices=("loss", "accuracy"),
    )
    tune_seeds: list[int] = option(
        [],
        "seeds that --tune chooses by (default: all); with the others, the chosen alone is trained",
        panel="Comparison",
        minimum=0,
    )
    equal: str = option(
        "epochs",
        "what all rows get: the same epochs, or the time of the slowest row's (measured before the "
        "first run, and kept in the folder)",
        panel="Comparison",
        choices=("epochs", "time"),
    )
    jobs: int = option(1, "runs at a time, over the GPUs there are", panel="Comparison", minimum=1)
    plan: bool = option(
        False, "print one complete command a line, and train nothing", panel="Comparison"
    )

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        self._check_combinations()
        self.candidates()
        if self.tune_by is not None and not self.tune:
            raise ConfigError("--tune-by says what --tune chooses by, and there is no --tune")
        if self.tune_seeds and not self.tune:
            raise ConfigError("--tune-seeds says what --tune chooses by, and there is no --tune")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"--seeds is {self.seeds}, expected different whole numbers")
        if set(self.tune_seeds) - set(self.seeds):
            raise ConfigError(f"--tune-seeds is {self.tune_seeds}, expected some of {self.seeds}")
        for key in ("dataset", "model"):
            names = getattr(self, key).split(",")
            if not all(names) or len(set(names)) < len(names):
                raise ConfigError(
                    f"--{key} is {shortened(getattr(self, key))}, expected different names, joined "
                    "with commas"
                )

    def candidates(self) -> list[list[Row]]:
        """For each row of the table what it is, or those to choose from.

        Raises:
            ConfigError: If a row cannot be understood, or two are the same.
        """
        takes = [takes_lambda(parse_terms([split(e, TrainConfig)[0]])) for e in self.reg]
        if self.lambda_ is not None and not any(takes):
            raise ConfigError(UNUSED_LAMBDA)
        choices = parse_tune(self.tune, TrainConfig)
        if choices and not self.val_fraction:
            raise ConfigError("--tune chooses on the validation split; --val-fraction is 0")
        rows = [
            tuned_rows(entry, self.lambda_ if taken else None, choices, TrainConfig)
            for entry, taken in zip(self.reg, takes, strict=True)
        ]
        tuned = {name for entry in self.reg for name in open_names(entry, TrainConfig)}
        if set(choices) - tuned:
            missing = ", ".join(sorted(set(choices) - tuned))
            raise ConfigError(f"--tune names {missing}, but no --reg has it without a strength")
        names = [row.name for candidates in rows for row in candidates]
        if len(set(names)) < len(names):
            raise ConfigError(f"two rows are the same: {', '.join(names)}")
        return rows


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Settings of `hesstrace tune`: train's, with one regularizer whose strength is looked for."""

    reg: list[str] = option(
        ["trace"],
        "the regularizer to tune, a NAME without strength; others beside it as NAME=STRENGTH",
        panel="Regularization",
        metavar="NAME[=STRENGTH]",
    )
    budget: float = option(
        5.0, "what all trials may take together, in plain runs' time by the measured cost of a "
        "step", panel="Search", above=0,
    )  # fmt: skip
    range: str | None = option(
        None, "strengths to look among (default: from a hundredth of the regularizer's own default "
        "to a hundred times it)", panel="Search", metavar="LOW:HIGH",
    )  # fmt: skip
    jobs: int = option(1, "runs at a time, over the GPUs there are", panel="Search", minimum=1)
    json: str | None = option(None, "write JSON to this file, - for stdout", panel="Output")

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        self._check_combinations()
        if self.lambda_ is not None:
            raise ConfigError("--lambda is a strength, and tune looks for one; leave it out")
        if not self.val_fraction:
            raise ConfigError("tune chooses on the validation split; --val-fraction is 0")
        self.bounds()

    def tuned(self) -> str:
        """The name of the regularizer whose strength is looked for.

        Raises:
            ConfigError: If there is not one alone.
        """
        names = [name for name, strength in parse_terms(self.reg) if strength is None]
        if len(names) != 1:
            given = ", ".join(names) or "none"
            raise ConfigError(
                f"tune looks for the strength of one regularizer, given without one; here {given}: "
                "write, say, --reg trace, or --reg trace --reg cutout=8"
            )
        return names[0]

    def bounds(self) -> tuple[float, float]:
        """The least and the largest strength to look among, both above 0.

        Raises:
            ConfigError: If the range cannot be read, or there is no default one.
        """
        name = self.tuned()
        if self.range is not None:
            return parse_range(name, self.range)
        return usual_range(name)


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
