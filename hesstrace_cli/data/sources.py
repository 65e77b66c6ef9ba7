"""Where examples come from: the shipped digits, torchvision's files, folders, arrays, plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.plugins import call_factory, load_factory

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Arrays:
    """Examples as tensors: inputs (N, ...) and labels (N,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """A training and a test part, with the preprocessing usual for them.

    Attributes:
        train: Tensors, or a Dataset of (input tensor, label).
        test: Likewise.
        num_classes: As the source knows it; None to count the labels.
        mean: Usual mean of the inputs, after scaling to [0, 1].
        std: Usual standard deviation.
        scale: Largest value of uint8 inputs.
    """

    train: Arrays | Dataset[Any]
    test: Arrays | Dataset[Any]
    num_classes: int | None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0


@dataclass(frozen=True)
class _Known:
    build: Callable[..., Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    by_split: bool = False


_TORCHVISION = {
    "mnist": _Known(datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "fashion-mnist": _Known(datasets.FashionMNIST, 10, (0.2860,), (0.3530,)),
    "cifar10": _Known(datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Known(datasets.CIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _Known(
        datasets.SVHN, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), by_split=True
    ),
}


def is_data_plugin(spec: str) -> bool:
    """Whether opening this data set imports code of the user's."""
    return ":" in spec and not spec.startswith("imagefolder:") and not spec.endswith(".npz")


def open_source(
    spec: str, *, data_dir: str = "data", download: bool = False, image_size: int | None = None
) -> Source:
    """Open the data set that `spec` names.

    Raises:
        DataError: If it is not known, or its files are missing or damaged.
    """
    if spec == "digits":
        return _digits(image_size)
    if spec in _TORCHVISION:
        return _torchvision(spec, data_dir, download, image_size)
    if spec.startswith("imagefolder:"):
        return _image_folder(Path(spec.removeprefix("imagefolder:")), image_size)
    if spec.endswith(".npz"):
        return _npz(Path(spec), image_size)
    if is_data_plugin(spec):
        if image_size is not None:
            raise ConfigError(
                f"--image-size does not resize what {spec!r} gives; resize there, or leave it out"
            )
        return _plugin(spec)
    known = ", ".join(["digits", *_TORCHVISION])
    raise ConfigError(
        f"no data set is called {spec!r}. Known: {known}, imagefolder:DIR, FILE.npz, "
        "FILE.py:factory"
    )


def _resized(inputs: Tensor, image_size: int | None) -> Tensor:
    if image_size is None or inputs.dim() != 4:
        return inputs
    transform = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    resized: Tensor = transform(inputs)
    return resized


def _digits(image_size: int | None) -> Source:
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        content = np.load(file)
        images = torch.from_numpy(content["images"])[:, None]
        labels = torch.from_numpy(content["labels"]).long()
    images = _resized(images, image_size)
    # In the order of the file, in which a writer's digits stand near each other: a random split
    # would train on every writer that it tests.
    split = 2 * len(labels) // 3
    return Source(
        Arrays(images[:split], labels[:split]), Arrays(images[split:], labels[split:]),
        num_classes=10, mean=(0.3053,), std=(0.3760,), scale=16.0,
    )  # fmt: skip


def _torchvision(spec: str, data_dir: str, download: bool, image_size: int | None) -> Source:
    known = _TORCHVISION[spec]

    def load(train: bool) -> Arrays:
        part = {"split": "train" if train else "test"} if known.by_split else {"train": train}
        try:
            dataset = known.build(data_dir, download=download, **part)
        except (RuntimeError, OSError, ValueError) as problem:
            if is_out_of_memory(problem):
                raise
            raise DataError(
                f"{spec} is not in {data_dir!r} ({' '.join(str(problem).split())}); give the "
                "folder with --data-dir, or allow --download"
            ) from problem
        images = torch.as_tensor(dataset.data)
        labels = dataset.labels if known.by_split else dataset.targets
        if images.dim() == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        return Arrays(_resized(images, image_size), torch.as_tensor(labels).long())

    return Source(load(True), load(False), known.num_classes, known.mean, known.std)


def _image_folder(folder: Path, image_size: int | None) -> Source:
    test_folder = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
    if not (folder / "train").is_dir() or test_folder is None:
        raise DataError(f"{str(folder)!r} has no folders train/ and val/ or test/ with images")
    steps: list[Any] = [v2.PILToTensor()]
    if image_size is not None:
        steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    transform = v2.Compose(steps)
    try:
        train = datasets.ImageFolder(str(folder / "train"), transform)
        test = datasets.ImageFolder(str(test_folder), transform)
    except (FileNotFoundError, OSError) as problem:
        raise DataError(f"{str(folder)!r}: {' '.join(str(problem).split())}") from problem
    if train.classes != test.classes:
        raise DataError(
            f"{str(folder)!r}: train/ has the classes {train.classes[:5]}..., "
            f"{test_folder.name}/ has {test.classes[:5]}..., expected the same"
        )
    return Source(train, test, len(train.classes), IMAGENET_MEAN, IMAGENET_STD)


def _npz(path: Path, image_size: int | None) -> Source:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            missing = [key for key in keys if key not in content]
            if missing:
                raise DataError(
                    f"{str(path)!r} lacks {', '.join(missing)}; it has {', '.join(content.files)}"
                )
            arrays = {key: content[key] for key in keys}
    except DataError:
        raise
    except FileNotFoundError as problem:
        raise DataError(f"{str(path)!r} does not exist") from problem
    except Exception as problem:  # numpy raises many kinds for a damaged archive
        raise DataError(f"{str(path)!r} is not a readable .npz file: {problem}") from problem
    train = _npz_part(path, arrays["x_train"], arrays["y_train"], "train", image_size)
    test = _npz_part(path, arrays["x_test"], arrays["y_test"], "test", image_size)
    return Source(train, test, num_classes=None)


def _npz_part(path: Path, x: Any, y: Any, part: str, image_size: int | None) -> Arrays:
    where = f"{str(path)!r}, {part}"
    plain = x.ndim > 1 and x.dtype.itemsize <= 8 and x.dtype.isnative
    if not plain or x.dtype.kind not in "fu" or (x.dtype.kind == "u" and x.dtype != np.uint8):
        raise DataError(
            f"{where}: x has type {x.dtype} and shape {x.shape}, expected uint8 or native "
            "floating point, an example a row"
        )
    if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu":
        raise DataError(
            f"{where}: y has type {y.dtype} and shape {y.shape}, expected whole numbers ({len(x)},)"
        )
    inputs = torch.from_numpy(np.ascontiguousarray(x))
    if inputs.dim() == 3:
        inputs = inputs[:, None]
    elif inputs.dim() == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    return Arrays(_resized(inputs, image_size), torch.from_numpy(y.astype(np.int64)))


def _plugin(spec: str) -> Source:
    factory = load_factory(spec, DataError)
    made = call_factory(factory, {}, spec, DataError)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise DataError(f"{spec!r} gave a {type(made).__name__}, expected train and test Dataset")
    train, test = made
    for part in made:
        _check_dataset(part, spec)
    return Source(train, test, num_classes=getattr(train, "num_classes", None))


def _check_dataset(part: Any, spec: str) -> None:
    """Look at the first example.

    Raises:
        DataError: If the part is no Dataset of pairs of a tensor and a class number.
    """
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise DataError(
            f"{spec!r} gave a {type(part).__name__}, expected a Dataset with a length and numbered "
            "examples"
        )
    if len(part) == 0:
        return  # said later, with its name
    example = part[0]
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError(
            f"{spec!r}: an example is a {type(example).__name__}, expected an input and a label"
        )
    inputs, label = example
    if not isinstance(inputs, (Tensor, np.ndarray)):
        raise DataError(
            f"{spec!r}: an input is a {type(inputs).__name__}, expected a tensor; torchvision's "
            "v2.PILToTensor makes one of an image"
        )
    try:
        int(label)
    except (TypeError, ValueError) as problem:
        raise DataError(f"{spec!r}: a label is {label!r}, expected a class number") from problem
