"""The forms of residual networks that are used on 32x32 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models


def cifar_resnet(
    build: Callable[..., models.ResNet], num_classes: int, in_shape: Sequence[int]
) -> nn.Module:
    """A torchvision ResNet with a 3x3 stem of stride 1 and no max-pool (He et al. 2016, CIFAR)."""
    network = build(num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return network


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, X: Tensor) -> Tensor:
        active = F.relu(self.norm1(X))
        skip = X if self.shortcut is None else self.shortcut(active)
        hidden = self.dropout(F.relu(self.norm2(self.conv1(active))))
        output: Tensor = skip + self.conv2(hidden)
        return output


class WideResNet(nn.Module):
    """A wide residual network WRN-depth-widen (Zagoruyko and Komodakis 2016).

    Args:
        num_classes: The number of logits.
        in_shape: (channels, height, width) of an image.
        depth: 6 n + 4 layers, n blocks in each of the three groups.
        widen: The factor on the widths 16, 32, 64.
        dropout: Drop probability inside the blocks; refused when curvature is estimated
            in a mode in which it is active.
    """

    def __init__(
        self,
        num_classes: int,
        in_shape: Sequence[int],
        *,
        depth: int,
        widen: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, expected 6 n + 4")
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(in_shape[0], widths[0], 3, padding=1, bias=False)
        groups: list[nn.Module] = []
        for group, (inputs, outputs) in enumerate(pairwise(widths)):
            for index in range(blocks):
                stride = 2 if group > 0 and index == 0 else 1
                groups.append(
                    _WideBlock(inputs if index == 0 else outputs, outputs, stride, dropout)
                )
        self.groups = nn.Sequential(*groups)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, X: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        hidden = F.relu(self.norm(self.groups(self.stem(X))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits
