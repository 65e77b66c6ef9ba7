"""The settings of `hesstrace train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hesstrace_cli.config.data import SEQ_LEN, WORD, DataConfig
from hesstrace_cli.config.fields import inherited, option
from hesstrace_cli.config.regularizers import REGULARIZERS
from hesstrace_cli.config.rows import Row, parse_row
from hesstrace_cli.errors import ConfigError


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
