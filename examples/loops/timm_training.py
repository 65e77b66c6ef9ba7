"""A timm model with timm's loss, optimizer, schedule, scaler and weight average, and the penalty.

    pip install "hesstrace[examples]"
    python examples/loops/timm_training.py

The scaler takes `create_graph=False` as ever: the penalty has its graph already.
"""

from __future__ import annotations

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler
from torch import nn

import hesstrace_cli
from hesstrace_cli.tasks import Classification


def main(strength: float = 0.001, steps: int = 4) -> tuple[float, nn.Module]:
    """Train a few steps on random images; the mean loss and the averaged model."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, pretrained=False)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=steps)
    criterion, scaler, losses = (
        LabelSmoothingCrossEntropy(0.1),
        NativeScaler(device="cpu"),
        AverageMeter(),
    )
    # The curvature of the smoothed loss is that of its logits, whatever the labels.
    penalty = hesstrace_cli.TracePenalty(model, strength, task=Classification(label_smoothing=0.1))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for step in range(steps):
        with hesstrace_cli.differentiable():
            outputs = model(images)
        loss = criterion(outputs, labels) + penalty(outputs, labels)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        penalty.step()
        ema.update(model)
        schedule.step(step + 1)
        losses.update(loss.item(), len(images))
        print(f"step {step + 1}: loss {loss.item():.3f}, sampled trace {penalty.trace:.3g}")
    return losses.avg, ema.module


if __name__ == "__main__":
    main()
