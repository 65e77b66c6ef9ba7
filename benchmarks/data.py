"""Does the data keep up? Seconds to make a batch, beside those of a plain training step on it.

    python benchmarks/data.py --dataset imagefolder:DIR --model resnet18 --image-size 32
    python benchmarks/data.py --dataset imagefolder:DIR --model resnet18 --workers 0 2

Batches come in random order, cropped and flipped, as `hesstrace train --augment crop-flip` makes
them: with --image-size the whole set is held as one tensor on the device, without it the files are
read through worker processes. Workers read ahead while the device computes, so that what counts is
whether a batch takes them less than a step; a batch made on the device adds its share to each step.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Generator

from hesstrace_cli.config import DataConfig, TrainConfig
from hesstrace_cli.data import Split, load_data
from hesstrace_cli.data.augment import crop_flip
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.reporting.layout import markdown_table
from hesstrace_cli.training.cost import seconds_of_steps
from hesstrace_cli.training.trainer import Trainer


def seconds_a_batch(split: Split, batch_size: int) -> float:
    """Over one pass in random order, the start of the workers included."""
    device = next(split.batches(1))[0].device
    generator = Generator(device).manual_seed(0)
    order = torch.randperm(len(split), generator=Generator().manual_seed(0)).split(batch_size)
    begin = time.perf_counter()
    for X, _ in split.parts(order):
        crop_flip(X, generator=generator)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / len(order)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = {
        "dataset": arguments.dataset, "data_dir": arguments.data_dir, "model": arguments.model,
        "image_size": arguments.image_size, "batch_size": arguments.batch_size, "val_fraction": 0.0,
    }  # fmt: skip
    trainer = Trainer.of(TrainConfig(**shared, train_examples=arguments.batch_size * 4))
    step, device = seconds_of_steps(trainer, 5) / 5, trainer.device
    rows = []
    for workers in arguments.workers:
        split = load_data(DataConfig(**shared, num_workers=workers), device).train
        kind = "one tensor" if isinstance(split, TensorSplit) else f"files, {workers} workers"
        seconds = seconds_a_batch(split, arguments.batch_size)
        rows.append([kind, f"{arguments.batch_size / seconds:.0f}", f"{seconds / step:.3f}"])
        if isinstance(split, TensorSplit):
            break
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{arguments.model} on {name}: {arguments.batch_size / step:.0f} examples a second\n")
    print(markdown_table(("data", "examples a second", "a batch over a step"), rows))


if __name__ == "__main__":
    main()
