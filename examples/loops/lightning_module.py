"""The penalty in a LightningModule's `training_step`, and traces by a callback. Runs in seconds.

pip install "hesstrace[examples]"
python examples/loops/lightning_module.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesstrace_cli


class Penalised(lightning.LightningModule):
    """A classifier whose loss has the penalty."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.penalty = hesstrace_cli.TracePenalty(self.model, strength)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Loss and penalty."""
        X, y = batch
        with hesstrace_cli.differentiable():
            outputs = self.model(X)
        penalty = self.penalty(outputs, y)
        self.log("penalty", penalty.detach())
        return F.cross_entropy(outputs, y) + penalty

    def on_before_zero_grad(self, _optimizer: Any) -> None:
        """Once a step of the optimizer, however many batches it accumulates."""
        self.penalty.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Traces(lightning.Callback):
    """Estimates the trace after every epoch of anyone's run; its weights and modes stay.

    Args:
        batches: What the trace is of, the same each time.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.found = batches, list[hesstrace_cli.TraceEstimate]()

    def on_train_epoch_end(self, _trainer: Any, module: Any) -> None:
        """One estimate."""
        self.found.append(hesstrace_cli.estimate_trace(module.model, self.batches, rtol=0.1))


def main(strength: float = 0.01, epochs: int = 3) -> list[float]:
    """Train, and give the trace after every epoch."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 8, generator=generator)
    data = TensorDataset(X, X[:, :3].argmax(1))
    torch.manual_seed(0)
    traces = Traces(DataLoader(data, batch_size=64))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[traces],
        accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Penalised(strength), DataLoader(data, batch_size=32, shuffle=True))
    for epoch, found in enumerate(traces.found, start=1):
        print(f"epoch {epoch}: tr(H) = {found.value:.3g} ± {found.stderr:.2g} ({found.method})")
    return [found.value for found in traces.found]


if __name__ == "__main__":
    main()
