"""Time, memory and noise of a penalised training step, over the plain step of the same network.

    python benchmarks/step_cost.py                       # ResNet-18, batch 8: minutes on a CPU
    python benchmarks/step_cost.py --model small-cnn --image 8 --channels 1 --batch-size 64
    python benchmarks/step_cost.py --forms --model benchmarks/networks.py:Transformer
    python benchmarks/step_cost.py --grid --batch-size 128 --rounds 20      # a GPU: everything

Steps are those of `hesstrace train` at full strength, on made images; all rows are timed in turn,
in one run, so that a busy machine slows them alike. Memory is the peak of a step, weights and
momentum included. The variance is that of the penalty's gradient over `--draws` draws on one
batch, in units of its squared mean, with `--forms` and without batch norm that of the row by
example; every k-th step it is k times that, as k times the strength gives the same mean. The last
column multiplies it with the extra time of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesstrace_cli.analysis.loading import select_device
from hesstrace_cli.autodiff.calls import uses_batch_statistics
from hesstrace_cli.autodiff.graph import gradient, inner
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.hessian import quadratic_form
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.errors import HesstraceError
from hesstrace_cli.regularizers import Regularizer, Step, Term
from hesstrace_cli.reporting.layout import markdown_table
from hesstrace_cli.storage.state import EpochSums
from hesstrace_cli.training.cost import seconds_of_steps
from hesstrace_cli.training.trainer import Trainer

_DRAWS_TIMED = 10
TRACE: dict[str, Any] = {"reg": ["trace=0.001"], "warmup": 0.0}
SOME = {**TRACE, "form": "batch"}
ALL = {**SOME, "estimator": "hutchinson"}
G, H = {"curvature": "ggn"}, {"curvature": "hessian"}


class TripleReverse(Regularizer):
    """The penalty as most scripts would write it: reverse mode three times."""

    order = 3

    def term(self, step: Step) -> Term:
        """v^T H v, differentiated by two more backward passes."""
        params = step.objective.params
        v = {n: rademacher(p, generator=step.generator) for n, p in params.items()}
        grad = gradient(step.loss, params, create_graph=True)
        product = gradient(inner(grad, v), params, create_graph=True)
        return Term(self.strength, inner(product, v))


class NestedForward(Regularizer):
    """The penalty by forward mode inside forward mode, differentiated by one backward pass."""

    def term(self, step: Step) -> Term:
        """v^T H v."""
        objective = step.objective
        v = {n: rademacher(p, generator=step.generator) for n, p in objective.params.items()}
        form = quadratic_form(
            lambda p: objective.loss(p, step.X, step.targets), objective.params, v, mode="forward"
        )
        return Term(self.strength, form)


def rows_on_a_cpu() -> dict[str, dict[str, Any]]:
    """One factor varied at a time."""
    rows: dict[str, dict[str, Any]] = {"none": {"reg": ["none"]}}
    for name, matrix in (("G", G), ("H", H)):
        rows[f"{name}, all tensors"] = {**ALL, **matrix}
        for keep_prob in (0.5, 0.3, 0.1):
            rows[f"{name}, tensors kept with {keep_prob}"] = {
                **SOME, **matrix, "keep_prob": keep_prob
            }  # fmt: skip
            rows[f"{name}, a block of tensors kept with {keep_prob}"] = {
                **SOME, **matrix, "keep_prob": keep_prob, "dropout_scheme": "block"
            }  # fmt: skip
        rows[f"{name}, entries kept with 0.3"] = {
            **SOME, **matrix, "keep_prob": 0.3, "dropout_scheme": "entry"
        }  # fmt: skip
        rows[f"{name}, all tensors, every 10th step"] = {**ALL, **matrix, "every": 10}
        rows[f"{name}, all tensors, bf16"] = {**ALL, **matrix, "precision": "bf16"}
    rows["none, bf16"] = {"reg": ["none"], "precision": "bf16"}
    rows["SAM"] = {"reg": ["sam=0.05"]}
    rows["H, nested forward mode"] = {"reg": [f"{__file__}:NestedForward=0.001"]}
    rows["H, reverse mode three times"] = {"reg": [f"{__file__}:TripleReverse=0.001"]}
    return rows


def rows_of_forms() -> dict[str, dict[str, Any]]:
    """The penalty on tr(G) by example, of all of the batch and of parts, beside that of its sum."""
    of_all = {**TRACE, **G, "estimator": "hutchinson", "form": "example"}
    dropped = {**of_all, "estimator": "dropout"}
    return {
        "none": {"reg": ["none"]},
        "by example": of_all,
        "G, all tensors": {**ALL, **G},
        "G, tensors kept with 0.5": {**SOME, **G},
        "by example, half the examples": {**of_all, "penalty_examples": 0.5},
        "by example, a quarter": {**of_all, "penalty_examples": 0.25},
        "by example, an eighth": {**of_all, "penalty_examples": 0.125},
        "by example, every 4th step": {**of_all, "every": 4},
        "by example, every 10th step": {**of_all, "every": 10},
        "by example, a quarter, every 2nd step": {
            **of_all, "penalty_examples": 0.25, "every": 2
        },
        "by example, tensors kept with 0.5": {**dropped, "keep_prob": 0.5},
        "by example, tensors kept with 0.1": {**dropped, "keep_prob": 0.1},
        "by example, a quarter, tensors kept with 0.5": {
            **dropped, "penalty_examples": 0.25, "keep_prob": 0.5
        },
        "by example, in two parts": {**of_all, "accumulate": 2},
        "SAM": {"reg": ["sam=0.05"]},
    }  # fmt: skip


def rows_compiled() -> dict[str, dict[str, Any]]:
    """Those that can be compiled."""
    return {
        "none, compiled": {"reg": ["none"], "compile": True},
        "G, all tensors, compiled": {**ALL, **G, "compile": True},
        "H, all tensors, compiled": {**ALL, **H, "compile": True},
    }


def rows_of_grid() -> dict[str, dict[str, Any]]:
    """Every engine, scheme, keep-probability, interval and precision."""
    rows = rows_on_a_cpu()
    for matrix, scheme, q, every, precision in itertools.product(
        ("ggn", "hessian"),
        ("tensor", "block", "entry"),
        (1.0, 0.3, 0.1),
        (1, 10),
        ("float32", "bf16"),
    ):
        rows[f"{matrix} {scheme} q={q} every={every} {precision}"] = {
            **SOME, "curvature": matrix, "dropout_scheme": scheme, "keep_prob": q,
            "every": every, "precision": precision,
        }  # fmt: skip
    return rows


def made_images(folder: Path, arguments: argparse.Namespace) -> str:
    generator = np.random.default_rng(0)
    count = 2 * arguments.batch_size + 20
    shape = (count, arguments.channels, arguments.image, arguments.image)
    X = generator.standard_normal(shape).astype(np.float32)
    y = np.arange(count) % 10
    file = folder / "images.npz"
    np.savez(file, x_train=X, y_train=y, x_test=X[:20], y_test=y[:20])
    return str(file)


def peak_bytes(config: TrainConfig) -> float:
    """The most that one step of a run holds at a time, with weights, gradients and momentum.

    The run is built for this alone, and what others hold on the GPU meanwhile does not count.
    """
    device = select_device(config.device)
    gc.collect()
    held_by_others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    trainer = Trainer.of(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        seconds_of_steps(trainer, 0)
        return float(torch.cuda.max_memory_allocated(device) - held_by_others)
    kept = 3 * sum(p.nbytes for p in trainer.model.parameters())
    trainer.optimizer.zero_grad()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        seconds_of_steps(trainer, 0)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = itertools.accumulate(e.nbytes() for e in events)
    return kept + max(held, default=0)


def noise_and_signal(trainer: Trainer, draws: int) -> tuple[float, float] | None:
    """sum Var(g) and ||E g||^2 of the penalty's gradient g over the draws, unbiased.

    Steps at learning rate 0 on one batch: their gradients differ by the penalty's alone, and
    that of the plain loss, the penalty's strength set to 0, is taken off.
    """
    if [r.name for r in trainer.regularizers] != ["trace"] or draws < 2:
        return None
    (penalty,) = trainer.regularizers
    (examples,) = trainer.examples([torch.arange(trainer.config.batch_size)])

    def sample(number: int, strength: float) -> Tensor:
        penalty.strength = strength
        sums = EpochSums.zero(trainer.device)
        trainer.stepper.step(examples, number * trainer.config.every, 0.9, 0.0, sums)
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads]).double().cpu()

    plain = sample(0, 0.0)
    stacked = torch.stack([sample(number, 1.0) - plain for number in range(draws)])
    mean = stacked.mean(0)
    spread = (stacked - mean).square().sum().item() / (draws - 1)
    square = mean.square().sum().item() - spread / draws
    return spread, square


def sample(trainer: Trainer) -> Tensor:
    """Two examples."""
    (((X, _, _),),) = trainer.examples([torch.arange(2)])
    return X


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", default=[""], help="rows, by name or a part of it")
    parser.add_argument("--compile", action="store_true", help="the compiled rows too")
    parser.add_argument("--forms", action="store_true", help="the rows by example instead")
    parser.add_argument("--grid", action="store_true", help="every combination")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = rows_of_grid() if arguments.grid else rows_on_a_cpu()
    if arguments.forms:
        rows = rows_of_forms()
    if arguments.compile or arguments.grid:
        rows |= rows_compiled()
    rows = {
        name: row
        for name, row in rows.items()
        if any(part == name if part in rows else part in name for part in arguments.only)
    }
    with tempfile.TemporaryDirectory() as folder:
        base = TrainConfig(
            model=arguments.model, dataset=made_images(Path(folder), arguments), epochs=100,
            batch_size=arguments.batch_size, device=arguments.device, lr=1e-4, val_fraction=0.0,
        )  # fmt: skip
        print(table(rows, base, arguments))


def table(rows: dict[str, dict[str, Any]], base: TrainConfig, arguments: argparse.Namespace) -> str:
    """A row at a time is measured between two measurements of the plain step."""
    config = dataclasses.replace(base, reg=["none"])
    memory = peak_bytes(config)
    plain = Trainer.of(config)
    lines = []
    signal = None  # of the row by example: without batch statistics that of all samples of tr(G)
    for name, settings in rows.items():
        config = dataclasses.replace(base, **settings)
        try:
            trainer = Trainer.of(config)
            # What is kept differs from step to step, and with it the time.
            penalized = [r.name for r in trainer.regularizers] == ["trace"]
            drops = penalized and config.estimator == "dropout"
            steps = _DRAWS_TIMED if drops else config.every
            own_memory = peak_bytes(dataclasses.replace(config, every=1)) / memory
            ratios = []
            for _ in range(arguments.rounds):
                before = seconds_of_steps(plain, 2) / 2
                own = seconds_of_steps(trainer, steps) / steps
                after = seconds_of_steps(plain, 2) / 2
                ratios.append(own / ((before + after) / 2))
            found = noise_and_signal(trainer, arguments.draws)
        except HesstraceError as problem:
            lines.append([name, "-", "-", "-", str(problem)[:60]])
            continue
        ratio = statistics.median(ratios)
        noise = None
        if found is not None:
            if name == "by example" and not uses_batch_statistics(trainer.model, sample(trainer)):
                signal = found[1]
            square = found[1] if signal is None else signal
            # Every k-th step, the mean over k steps is k times one penalised step's noise.
            noise = config.every * found[0] / square if square > 0 else float("inf")
        cost = None if noise is None else noise * (ratio - 1)
        lines.append([name, f"{ratio:.2f}", f"{own_memory:.2f}",
                      "" if noise is None else f"{noise:.3g}",
                      "" if cost is None else f"{cost:.3g}"])  # fmt: skip
        print("|", " | ".join(lines[-1]), "|", flush=True)
        del trainer
    size = sum(p.numel() for p in plain.model.parameters())
    device = torch.cuda.get_device_name() if plain.device.type == "cuda" else "cpu"
    seconds = seconds_of_steps(plain, 3) / 3
    head = ("step", "time", "memory", "relative variance", "variance x extra time")
    return (
        f"\n{base.model}, {size} parameters, batch {base.batch_size}, {device}, torch "
        f"{torch.__version__}, plain step {seconds:.3f} s, {time.strftime('%Y-%m-%d')}\n\n"
        + markdown_table(head, lines)
    )


if __name__ == "__main__":
    main()
