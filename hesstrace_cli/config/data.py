"""Model, data and device: the settings that every command has."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hesstrace_cli.config.declared import task_names
from hesstrace_cli.config.fields import LARGEST_SHIFT, SMALLEST_SCALE, check_range, option
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
