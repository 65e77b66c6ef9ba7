"""Real data for tasks other than classes of whole images, and a network for pixels.

    python examples/tasks.py DATA_DIR FOLDER

makes from torchvision's files in DATA_DIR, in FOLDER:

    one-hot.npz   Fashion-MNIST, the class as ten numbers, 0 or 1: regression, or multilabel
    canvas.npz    three MNIST digits on a canvas of 40 x 40; every pixel's class is its digit's, 10
                  on the ground; pixels at a digit's rim (grey) do not count: segmentation
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets

GROUND, IGNORED = 10, -100
SIDE, DIGIT, DIGITS = 40, 20, 3


def one_hot(data_dir: Path, train: bool, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 28, 28) in uint8, and targets (N, 10) in float32."""
    data = datasets.FashionMNIST(data_dir, train=train)
    targets = F.one_hot(data.targets[:number], 10).float()
    return data.data[:number, None].numpy(), targets.numpy()


def canvas(data_dir: Path, train: bool, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 40, 40) in uint8, and targets (N, 40, 40)."""
    data = datasets.MNIST(data_dir, train=train)
    small = F.interpolate(data.data[: DIGITS * number, None].float(), DIGIT, mode="area")[:, 0]
    generator = torch.Generator().manual_seed(int(train))
    places = torch.randint(0, SIDE - DIGIT + 1, (len(small), 2), generator=generator).tolist()
    X = torch.zeros(number, SIDE, SIDE)
    y = torch.full((number, SIDE, SIDE), GROUND)
    for index, (digit, (top, left)) in enumerate(zip(small, places, strict=True)):
        at = (index // DIGITS, slice(top, top + DIGIT), slice(left, left + DIGIT))
        X[at] = torch.maximum(X[at], digit)
        rim, ink = (digit > 25) & (digit < 100), digit >= 100
        own = torch.where(rim, IGNORED, y[at])
        y[at] = torch.where(ink, data.targets[index], own)
    return X[:, None].byte().numpy(), y.numpy()


class Pixels(nn.Module):
    """Convolutions over the whole image, and logits (N, C, H, W)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=4, dilation=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=8, dilation=4), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, num_classes, 1),
        )  # fmt: skip

    def forward(self, X: Tensor) -> Tensor:
        """Logits of images (N, 1, H, W)."""
        return self.layers(X)


def pixels(num_classes: int, width: int = 16) -> Pixels:
    """A factory for `--model`."""
    return Pixels(num_classes, width)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=2000)
    args = parser.parse_args()
    for name, make in (("one-hot", one_hot), ("canvas", canvas)):
        number = args.examples if make is one_hot else args.examples // 4
        x_train, y_train = make(args.data_dir, True, number)
        x_test, y_test = make(args.data_dir, False, number)
        np.savez(args.folder / f"{name}.npz", x_train=x_train, y_train=y_train,
                 x_test=x_test, y_test=y_test)  # fmt: skip


if __name__ == "__main__":
    main()
