"""Traces of the checkpoints that someone else's run left behind, with no part in that run.

python examples/loops/checkpoints.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesstrace_cli


def build() -> nn.Module:
    """The network of that run."""
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


def their_run(folder: Path, data: TensorDataset) -> None:
    """A run that knows nothing of this package, and saves state dicts."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(4):
        for X, y in DataLoader(data, 32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
        torch.save(model.state_dict(), folder / f"epoch{epoch}.pt")


def traces_of(folder: Path, data: TensorDataset) -> Iterator[tuple[str, float]]:
    """Of every checkpoint: exact for a ReLU network, in the time of a few passes."""
    model = build()
    for file in sorted(folder.glob("*.pt")):
        model.load_state_dict(torch.load(file, weights_only=True))
        found = hesstrace_cli.estimate_trace(model, DataLoader(data, 128))
        yield file.name, found.value
        print(f"{file.name}: tr(H) = {found.value:.4g} ({found.method})")


def main() -> dict[str, float]:
    """Their run, then its traces."""
    X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(X, X[:, :3].argmax(1))
    with tempfile.TemporaryDirectory() as folder:
        their_run(Path(folder), data)
        return dict(traces_of(Path(folder), data))


if __name__ == "__main__":
    main()
