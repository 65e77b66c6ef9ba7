"""Small networks for small images: seconds on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation_of(name: str) -> nn.Module:
    """A module by its name.

    Raises:
        ValueError: If none is called so.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm is {kind!r}, expected batch, group or none")


def small_cnn(
    num_classes: int,
    in_shape: Sequence[int],
    *,
    width: int = 16,
    norm: str = "batch",
    activation: str = "relu",
) -> nn.Module:
    """Three 3x3 convolutions and a linear layer: 15 thousand weights at width 16.

    Args:
        num_classes: The number of logits.
        in_shape: (channels, height, width) of an image.
        width: Channels of the first convolution; the others have twice as many.
        norm: "batch", "group" or "none".
        activation: "relu", "gelu", "silu" or "tanh".
    """
    if len(in_shape) != 3:
        raise ValueError(f"small-cnn takes images (C, H, W), not inputs of shape {tuple(in_shape)}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none")
        return [conv, _norm(norm, outputs), activation_of(activation)]

    # Adaptive pooling's backward on a GPU promises no order of summation; where the windows are
    # all equal it is not needed.
    height, breadth = (side // 2 for side in in_shape[1:])
    even = height % 2 == breadth % 2 == 0 < min(height, breadth)
    pool = nn.AvgPool2d((height // 2, breadth // 2)) if even else nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(
        *block(in_shape[0], width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        pool,
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


class MLP(nn.Module):
    """A multilayer perceptron on the flattened input."""

    def __init__(
        self,
        num_classes: int,
        in_shape: Sequence[int],
        *,
        width: int = 64,
        depth: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = [math.prod(in_shape), *[width] * depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation_of(activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, X: Tensor) -> Tensor:
        """Map inputs (N, ...) to logits (N, C)."""
        logits: Tensor = self.layers(X)
        return logits
