"""Where examples come from: the shipped digits, torchvision's files, folders, arrays, plug-ins."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from hesstrace_cli.config import did_you_mean, shortened
from hesstrace_cli.data.checks import count_of, inputs_of, targets_of
from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.paths import is_file, is_folder
from hesstrace_cli.plugins import call_factory, load_factory
from hesstrace_cli.tasks.base import shape_of

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Arrays:
    """Examples as tensors: inputs (N, ...) and targets (N, ...)."""

    inputs: Tensor
    targets: Tensor


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
    plain = spec.startswith(("imagefolder:", "text:")) or spec.endswith(".npz")
    return ":" in spec and not plain


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
    known = ["digits", *_TORCHVISION, "wikitext-2"]
    raise ConfigError(
        f"no data set is called {shortened(spec)}{_meant(spec, known)} Known: {', '.join(known)}, "
        "imagefolder:DIR, text:DIR, FILE.npz, FILE.py:factory"
    )


def _meant(spec: str, known: Sequence[str]) -> str:
    """Half a sentence on a name that is not known."""
    if is_folder(spec):
        return (
            f"; for a folder of images write {shortened('imagefolder:' + spec)}, for one with a "
            f"text {shortened('text:' + spec)}."
        )
    if spec.endswith(".py"):
        return f"; a file's factory is named behind a colon: {shortened(spec + ':data')}."
    return did_you_mean(spec, known)


def _resized(inputs: Tensor, image_size: int | None) -> Tensor:
    if image_size is None:
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
        except Exception as problem:  # torchvision asserts, and raises many kinds
            if is_out_of_memory(problem):
                raise
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise DataError(
                f"{spec} is not in {data_dir!r}, or damaged ({reason[:200]}); give the folder with "
                "--data-dir, or allow --download"
            ) from problem
        labels = dataset.labels if known.by_split else dataset.targets
        name = f"{spec} in {data_dir!r} ({'train' if train else 'test'})"
        return _arrays(dataset.data, labels, name, image_size)

    return Source(load(True), load(False), known.num_classes, known.mean, known.std)


def _arrays(inputs: Any, targets: Any, name: str, image_size: int | None) -> Arrays:
    """Examples that stand in an array, checked; grey and channels-last images as (N, C, H, W).

    Raises:
        DataError: If they are none, or not as many as the targets.
    """
    targets = targets_of(targets, name)
    if len(targets) == 0:
        raise DataError(f"{name}: there are no examples")
    inputs = inputs_of(inputs, name)
    if inputs.dim() < 2 or len(inputs) != len(targets):
        raise DataError(
            f"{name}: inputs have shape {tuple(inputs.shape)} and there are {len(targets)} "
            "targets, expected an input a row and a target for each"
        )
    if inputs.dim() == 3 and inputs.dtype != torch.int64:
        inputs = inputs[:, None]
    elif (
        inputs.dim() == 4
        and inputs.dtype != torch.int64
        and inputs.shape[-1] in (1, 3)
        and inputs.shape[1] not in (1, 3)
    ):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    if image_size is not None and (
        inputs.dim() != 4 or inputs.dtype == torch.int64 or targets.dim() > 2
    ):
        raise ConfigError(
            f"--image-size resizes images (N, C, H, W) with a target each; {name} has inputs of "
            f"{shape_of(inputs)} and targets of {shape_of(targets)}; resize them where they are "
            "made, or leave it out"
        )
    return Arrays(_resized(inputs, image_size), targets)


class Images(datasets.ImageFolder):  # type: ignore[misc]
    """The image files in a folder's folders, one a class, as uint8 tensors (3, H, W).

    Args:
        folder: With a folder a class.
        image_size: The shorter side is resized to it, and the centre cropped.
    """

    def __init__(self, folder: Path, image_size: int | None) -> None:
        steps: list[Any] = [v2.PILToTensor()]
        if image_size is not None:
            steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
        super().__init__(str(folder), v2.Compose(steps), loader=_open_image)


def _open_image(path: str) -> Image.Image:
    """Decode an image file.

    Raises:
        DataError: If it is none, or too large, damaged, or of more than 8 bits a channel.
    """
    if not is_file(path):
        raise DataError(f"{path!r} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode, decoded = image.mode, image.convert("RGB")
    except Exception as problem:  # Pillow raises many kinds for a damaged file
        if is_out_of_memory(problem):
            raise
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{path!r} cannot be read as an image: {reason[:200]}") from problem
    if mode in _DEEP:
        raise DataError(f"{path!r} has pixels of mode {mode}, which 8 bits a channel would cut off")
    return decoded


def _image_folder(folder: Path, image_size: int | None) -> Source:
    test_folder = next((folder / n for n in ("val", "test") if is_folder(folder / n)), None)
    if not is_folder(folder / "train") or test_folder is None:
        raise DataError(f"{str(folder)!r} has no folders train/ and val/ or test/ with images")
    try:
        train, test = Images(folder / "train", image_size), Images(test_folder, image_size)
    except OSError as problem:
        raise DataError(f"{str(folder)!r}: {' '.join(str(problem).split())}") from problem
    if train.classes != test.classes:
        raise DataError(
            f"{str(folder)!r}: train/ has the classes {train.classes[:5]}..., "
            f"{test_folder.name}/ has {test.classes[:5]}..., expected the same"
        )
    return Source(train, test, len(train.classes), IMAGENET_MEAN, IMAGENET_STD)


def _npz(path: Path, image_size: int | None) -> Source:
    if not is_file(path):
        raise DataError(f"{str(path)!r} {'is a folder' if is_folder(path) else 'does not exist'}")
    try:
        with zipfile.ZipFile(path) as archive:
            present = {name.removesuffix(".npy"): name for name in archive.namelist()}
            missing = [key for key in _KEYS if key not in present]
            if missing:
                raise DataError(
                    f"{str(path)!r} lacks {', '.join(missing)}; it has {shortened(list(present))}"
                )
            members = [_open_member(archive, present[key]) for key in _KEYS]
            x_train, y_train, x_test, y_test = [read() for read in members]
    except DataError:
        raise
    except Exception as problem:  # numpy and zipfile raise many kinds for a damaged archive
        if is_out_of_memory(problem):
            raise
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{str(path)!r} is not a readable .npz file: {reason[:200]}") from problem
    return Source(
        _arrays(x_train, y_train, f"{str(path)!r}, train", image_size),
        _arrays(x_test, y_test, f"{str(path)!r}, test", image_size),
        num_classes=None,
    )


def _open_member(archive: zipfile.ZipFile, name: str) -> Callable[[], Any]:
    """Read what a member of the archive says of its array, before memory is taken for it.

    Returns:
        A function that reads the array.

    Raises:
        DataError: If it is no array, or not the size that it says.
    """
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = _HEADERS[version](file)
        size, held = math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size
    if dtype.hasobject:
        raise DataError(f"{archive.filename!r}: {name} holds Python objects, expected numbers")
    if size > held:
        raise DataError(
            f"{archive.filename!r} is damaged: {name} says that it is an array of {size} bytes, "
            f"and has {held}"
        )

    def read() -> Any:
        with archive.open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return read


def _plugin(spec: str) -> Source:
    factory = load_factory(spec, DataError)
    made = call_factory(factory, {}, spec, DataError)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise DataError(f"{spec!r} gave a {type(made).__name__}, expected train and test Dataset")
    train, test = made
    for part in made:
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise DataError(
                f"{spec!r} gave a {type(part).__name__}, expected a Dataset with a length and "
                "numbered examples"
            )
    num_classes = getattr(train, "num_classes", None)
    if num_classes is not None:
        num_classes = count_of(num_classes, f"{spec!r}, num_classes")
    return Source(train, test, num_classes)
