"""Networks of the benchmarks that are not built in: `--model benchmarks/networks.py:NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models


class Transformer(nn.Module):
    """A pre-norm encoder on patches of 4 x 4 pixels; of 32 x 32 images 64 tokens."""

    def __init__(
        self, num_classes: int, in_shape: Sequence[int], width: int = 192, layers: int = 6
    ) -> None:
        super().__init__()
        channels, height, breadth = in_shape
        self.embed = nn.Linear(16 * channels, width)
        self.position = nn.Parameter(torch.randn(1, height * breadth // 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, X: Tensor) -> Tensor:
        """The logits."""
        patches = F.unfold(X, 4, stride=4).mT
        output: Tensor = self.head(self.encoder(self.embed(patches) + self.position).mean(1))
        return output


def resnet18_group_norm(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """ResNet-18 in its CIFAR form, group norm of 32 groups in place of batch norm."""
    network = models.resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 32))
    network.conv1 = nn.Conv2d(in_shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return network
