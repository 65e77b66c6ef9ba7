"""Small networks, one for each layer whose derivatives PyTorch may get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Image(nn.Sequential):
    def forward(self, X):
        return super().forward(X.reshape(len(X), 2, 2, 2))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, X):
        return self.head(self.cell(X.reshape(len(X), 2, 4))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, batch_first=True, dropout=0.0, activation="gelu"
        )
        self.head = nn.Linear(4, 3)

    def forward(self, X):
        return self.head(self.layer(X.reshape(len(X), 2, 4)).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, X):
        q, k, v = self.project(X.reshape(len(X), 1, 2, 4)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1, 2).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, X):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(X)))))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, X):
        return self.head(torch.tanh(self.table((X.abs() * 10).long() % 5).mean(1)))


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(8, 4), nn.Linear(2, 2), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, X):
        return self.frozen(torch.tanh(self.used(X)))


def dense(*middle, width=4):
    return nn.Sequential(nn.Linear(8, width), *middle, nn.Linear(width, 3))


def image(*middle, features):
    return Image(nn.Conv2d(2, 4, 2, padding=1), *middle, nn.Flatten(), nn.Linear(features, 3))


CASES = {
    "batch_norm_1d": lambda: dense(nn.BatchNorm1d(4), nn.Tanh()),
    "batch_norm_2d": lambda: image(nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), features=4),
    "instance_norm": lambda: image(nn.InstanceNorm2d(4, affine=True), nn.GELU(), features=36),
    "instance_norm_running": lambda: image(
        nn.InstanceNorm2d(4, track_running_stats=True), nn.GELU(), features=36
    ),
    "layer_norm": lambda: dense(nn.LayerNorm(4), nn.GELU()),
    "group_norm": lambda: image(nn.GroupNorm(2, 4), nn.SiLU(), features=36),
    "rms_norm": lambda: dense(nn.RMSNorm(4), nn.SiLU()),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
    "hardsigmoid": lambda: dense(nn.Hardsigmoid(), nn.Linear(4, 4), nn.Hardswish()),
    "relu": lambda: dense(nn.ReLU()),
    "gelu": lambda: dense(nn.GELU()),
    "max_pool": lambda: image(nn.Tanh(), nn.MaxPool2d(2), features=4),
    "adaptive_pool": lambda: image(nn.Softplus(), nn.AdaptiveAvgPool2d(2), features=16),
    "depthwise": lambda: image(
        nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4), nn.ConvTranspose2d(4, 2, 2), features=18
    ),
    "embedding": Embedded,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "transformer": Transformer,
    "tied": Tied,
    "unused_and_frozen": WithUnused,
}


# Finite differences need weights with no kink of the network within their reach.
SMOOTH_SEEDS = {"relu": 1, "max_pool": 2}


def make(name, *, train):
    """The model, inputs and labels of a case, in float64."""
    seed = SMOOTH_SEEDS.get(name, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CASES[name]().double().train(train)
        X, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
        for module in model.modules():  # statistics that differ from those of a fresh module
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model, X, y
