"""The penalty in a plain loop, and the trace of what came out. Runs in seconds on a CPU.

python examples/loops/plain.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesstrace_cli


def make_data(num_examples: int = 512) -> TensorDataset:
    """Points on two rings, labelled by the ring."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(num_examples, generator=generator) * 6.283
    label = torch.arange(num_examples) % 2
    radius = 1 + label + 0.3 * torch.randn(num_examples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label)


def train(strength: float, epochs: int = 20) -> nn.Module:
    """A usual loop; the penalty is four of its lines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(make_data(), batch_size=64, shuffle=True)
    penalty = hesstrace_cli.TracePenalty(model, strength)  # 1
    for _ in range(epochs):
        for X, y in loader:
            with hesstrace_cli.differentiable():  # 2
                outputs = model(X)
            loss = criterion(outputs, y) + penalty(outputs, y)  # 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            penalty.step()  # 4
    return model


def main() -> None:
    """Train without and with the penalty, and compare traces."""
    data = DataLoader(make_data(), batch_size=128)
    for strength in (0.0, 0.01):
        found = hesstrace_cli.estimate_trace(train(strength), data)
        print(f"strength {strength:g}: tr(H) = {found.value:.3g} ± {found.stderr:.2g}")


if __name__ == "__main__":
    main()
