"""Seconds to a trace with a 95 % interval of 5 %, of an LSTM over WikiText-2's whole vocabulary.

    pip install -e ".[bench]"
    python benchmarks/language_trace.py --data-dir data

Two layers of 512 and an output layer of its own over 33,278 words, trained for `--steps` steps. All
of it runs in one process, after one another, on the same tokens, in the same batches and dtype, on
one thread. Times are seconds of the processor, so that other work on the machine counts little;
the unit is an evaluation's forward and backward, the loss of every batch and its gradient. Ours run
to the tolerance. Of the peers' Hutchinson the time of a pass and the spread of its samples are
measured on the first `--peer-tokens`, and what the tolerance needs follows from them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.tasks import Tokens

RTOL = 0.05
LENGTH = 35
T = TypeVar("T")
Batches = list[tuple[Tensor, Tensor]]


class Lstm(nn.Module):
    """The paper's language model, its state from nothing in every window."""

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_words, width)
        self.cells = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, num_words)
        nn.init.uniform_(self.table.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.cells(self.table(X))[0])


def windows(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Windows of 35 words, the words that follow, and the size of the vocabulary."""
    folder = Path(arguments.data_dir) / "wikitext-2"
    words: dict[str, int] = {}
    streams = {}
    for part in ("train", "valid", "test"):
        lines = (folder / f"{part}.txt").read_text(encoding="utf-8").splitlines()
        streams[part] = [
            words.setdefault(w, len(words)) for line in lines for w in [*line.split(), "<eos>"]
        ]
    stream = torch.tensor(streams["train"])
    count = (len(stream) - 1) // LENGTH
    X = stream[: count * LENGTH].view(count, LENGTH)
    return X, stream[1 : count * LENGTH + 1].view(count, LENGTH), len(words)


def trained(X: Tensor, y: Tensor, num_words: int, arguments: argparse.Namespace) -> nn.Module:
    """The model after some steps on windows other than those measured; kept in `--cache`."""
    torch.manual_seed(0)
    model = Lstm(num_words, arguments.width)
    file = Path(arguments.cache) / f"lstm-{arguments.width}-{arguments.steps}.pt"
    if not file.is_file():
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        measured = math.ceil(arguments.tokens / LENGTH)
        draw = torch.Generator().manual_seed(0)
        order = torch.randperm(len(X) - measured, generator=draw) + measured
        for rows in order.split(arguments.batch_size)[: arguments.steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]).flatten(0, 1), y[rows].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def forward_and_backward(model: nn.Module, split: TensorSplit, batch_size: int) -> float:
    """The mean loss; gradients are made and dropped."""
    total = 0.0
    for X, y in split.batches(batch_size):
        loss = F.cross_entropy(model(X).flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        total += loss.item() * len(X) / len(split)
    model.zero_grad()
    return total


def timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


class Flat(nn.Module):
    """Rows of logits, in operations that can be differentiated twice, for the peers' loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: Tensor) -> Tensor:
        with differentiable_ops(order=2):
            return self.model(X).flatten(0, 1)


def by_pyhessian(model: nn.Module, batches: Batches, samples: int) -> list[float]:
    from pyhessian import hessian

    loader = [(X, y.flatten()) for X, y in batches]
    with warnings.catch_warnings():  # of a cycle that it makes
        warnings.simplefilter("ignore")
        computer = hessian(Flat(model), nn.CrossEntropyLoss(), dataloader=loader, cuda=False)
        return list(map(float, computer.trace(maxIter=samples, tol=0.0)))


def by_curvlinops(model: nn.Module, batches: Batches, samples: int) -> list[float]:
    import curvlinops

    flat = Flat(model)
    params = [p for p in flat.parameters() if p.requires_grad]
    data = [(X, y.flatten()) for X, y in batches]
    matrix = curvlinops.HessianLinearOperator(
        flat, nn.CrossEntropyLoss(), params, data, check_deterministic=False
    )
    return [curvlinops.hutchinson_trace(matrix, 1).item() for _ in range(samples)]


PEERS = {"pyhessian": by_pyhessian, "curvlinops": by_curvlinops}


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    """The Markdown table, a line at a time."""
    X, y, num_words = windows(arguments)
    model = trained(X, y, num_words, arguments)
    count = math.ceil(arguments.tokens / LENGTH)
    split = TensorSplit(X[:count], y[:count], Preprocess(), torch.float32, Tokens())
    size = arguments.batch_size
    forward_and_backward(model, split.subset(torch.arange(size)), size)
    unit, loss = timed(lambda: forward_and_backward(model, split, size))
    num_parameters = sum(p.numel() for p in model.parameters())
    yield (
        f"LSTM 2 x {arguments.width}, {num_words} words, {num_parameters} parameters, "
        f"{count * LENGTH} tokens in batches of {size} x {LENGTH}, loss {loss:.3f} after "
        f"{arguments.steps} steps; forward and backward: {unit:.1f} s\n"
    )
    yield "| method | time, in forward and backward passes | passes | estimate (95 %) |"
    yield "| --- | ---: | ---: | ---: |"
    yield f"| forward and backward | {timed_again(model, split, size) / unit:.2f} | 1 | |"
    wanted = arguments.methods.split(",")
    for curvature in (c for c in ("ggn", "hessian") if c in wanted):
        yield of_ours(model, split, EstimateConfig(curvature=curvature, rtol=RTOL, batch_size=size),
                      unit)  # fmt: skip
    few = math.ceil(arguments.peer_tokens / LENGTH)
    batches = [(X[i : i + size], y[i : i + size]) for i in range(0, few, size)]
    torch.manual_seed(0)
    for name in (name for name in PEERS if name in wanted):
        if find_spec(name) is None:
            yield f"| {name} | not installed | | |"
        else:
            yield of_peer(name, model, batches, arguments.samples, unit / count)


def of_ours(model: nn.Module, split: TensorSplit, config: EstimateConfig, unit: float) -> str:
    seconds, found = timed(lambda: estimate(model, split, config))
    assert found.interval is not None
    low, high = found.interval
    matrix = "G" if config.curvature == "ggn" else "H"
    return (
        f"| hesstrace, tr({matrix}) ({found.method}) | {seconds / unit:.2f} | {found.passes} | "
        f"{found.value:.1f} [{low:.1f}, {high:.1f}] |"
    )


def of_peer(
    name: str, model: nn.Module, batches: Batches, num_samples: int, unit_of_window: float
) -> str:
    seconds, samples = timed(lambda: PEERS[name](model, batches, num_samples))
    mean, spread = statistics.fmean(samples), statistics.stdev(samples)
    passes = (1.96 * spread / abs(mean) / RTOL) ** 2
    each = seconds / num_samples / (unit_of_window * sum(len(X) for X, _ in batches))
    half = 1.96 * spread / math.sqrt(num_samples)
    tokens = sum(X.numel() for X, _ in batches)
    return (
        f"| {name}, Hutchinson, tr(H) | ~{passes * each:.0f} ({each:.2f} a pass) | ~{passes:.0f} | "
        f"{mean:.1f} ± {half:.1f} by {num_samples} passes over {tokens} tokens |"
    )


def timed_again(model: nn.Module, split: TensorSplit, size: int) -> float:
    return timed(lambda: forward_and_backward(model, split, size))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--peer-tokens", type=int, default=1_400)
    parser.add_argument("--samples", type=int, default=8, help="passes of the peers")
    parser.add_argument("--methods", default="ggn,hessian," + ",".join(PEERS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--cache", default="benchmarks/.cache")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for line in rows(arguments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
