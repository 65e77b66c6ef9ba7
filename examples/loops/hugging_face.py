"""The penalty in Hugging Face's Trainer, on a tiny GPT-2 from a config: nothing is downloaded.

    pip install "hesstrace[examples]"
    python examples/loops/hugging_face.py

Trainer calls the model itself, so that its forward pass is put inside `differentiable()` by a
subclass of five lines. The loss comes from `compute_loss_func`, which gets `num_items_in_batch`:
the number of labels of all batches that are accumulated, of which a part has its share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hesstrace_cli


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count on from a random number."""

    def __init__(self, num_examples: int = 64, length: int = 12, vocabulary: int = 16) -> None:
        start = torch.randint(vocabulary, (num_examples, 1), generator=torch.manual_seed(0))
        self.ids = (start + torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class DifferentiableTrainer(Trainer):
    """Runs every training step's forward pass inside `differentiable()`, and counts the steps."""

    penalty: hesstrace_cli.TracePenalty

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """As ever, inside."""
        with hesstrace_cli.differentiable():
            return super().compute_loss(model, inputs, *rest, **more)

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """As ever; one step of the optimizer each `gradient_accumulation_steps`."""
        loss = super().training_step(*arguments, **more)
        if self.accelerator.sync_gradients:
            self.penalty.step()
        return loss


def loss_with(penalty: hesstrace_cli.TracePenalty) -> Callable[..., Tensor]:
    """The loss of next tokens, a sum over `num_items_in_batch`, with its share of the penalty."""

    def compute_loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]  # the next tokens; the last has none
        count = (targets != -100).sum()
        share = 1.0 if num_items_in_batch is None else count / num_items_in_batch
        plain = F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())
        return share * (plain + penalty(outputs, targets))

    return compute_loss


def main(strength: float = 0.001, max_steps: int = 6) -> tuple[float, float]:
    """Train a few steps; the last loss and the trace over the data."""
    data = Counting()
    config = GPT2Config(vocab_size=16, n_positions=12, n_embd=16, n_layer=2, n_head=2,
                        attn_implementation="eager")  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    penalty = hesstrace_cli.TracePenalty(model, strength, form="example")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            max_steps=max_steps, learning_rate=1e-3, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_steps=1, remove_unused_columns=False,
        )  # fmt: skip
        trainer = DifferentiableTrainer(
            model, arguments, train_dataset=data, compute_loss_func=loss_with(penalty)
        )
        trainer.penalty = penalty
        loss = trainer.train().training_loss
    batches = list(trainer.get_eval_dataloader(data))
    found = hesstrace_cli.estimate_trace(model, batches, curvature="ggn", max_passes=20)
    print(f"loss {loss:.3g}, tr(G) = {found.value:.3g} ± {found.stderr:.2g} by {found.method}")
    return loss, found.value


if __name__ == "__main__":
    main()
