"""Seconds and passes over the data to a trace with 1 % relative standard error, by method.

    pip install -e ".[bench]"
    python benchmarks/trace_to_tolerance.py --data-dir data

Three networks are trained on Fashion-MNIST to a low loss. Every method then runs in a process of
its own on the same examples, batch size, dtype and number of threads. The truth is XTrace in
float64, with its own error printed beside it. Hutchinson's method needs (sd / 1 %)^2 passes, sd
being the relative standard deviation of one pass: its passes follow from the sd measured over
`--samples` of them; XTrace of the peers is run at several numbers of products, and the number at
which its root mean square error is 1 % is interpolated. Our own methods are run to the tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesstrace_cli.analysis.estimation import data_loss, estimate
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import DataConfig, EstimateConfig
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.trace.xtrace import xtrace
from hesstrace_cli.data import load_data
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.models.small import small_cnn

RTOL = 0.01
PRODUCTS = (10, 20, 30)


class Transformer(nn.Module):
    """A pre-norm encoder on 7 x 7 patches of 4 x 4 pixels; 69 thousand weights."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.position = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, X: Tensor) -> Tensor:
        patches = F.unfold(X, 4, stride=4).mT
        return self.head(self.encoder(self.embed(patches) + self.position).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu-cnn-bn": lambda: small_cnn(10, (1, 28, 28), width=16),
    "gelu-cnn-gn": lambda: small_cnn(10, (1, 28, 28), width=16, norm="group", activation="gelu"),
    "transformer": Transformer,
}


def data_of(arguments: argparse.Namespace, dtype: torch.dtype = torch.float32) -> TensorSplit:
    config = DataConfig(
        dataset="fashion-mnist", data_dir=arguments.data_dir, download=arguments.download,
        train_examples=arguments.examples, val_fraction=0.0, model="small-cnn",
    )  # fmt: skip
    split = load_data(config, torch.device(arguments.device), dtype=dtype).train
    assert isinstance(split, TensorSplit)
    return split


def trained(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """The network, trained once and kept in `--cache`."""
    file = Path(arguments.cache) / f"{name}-{arguments.examples}-{arguments.epochs}.pt"
    torch.manual_seed(0)
    model = NETWORKS[name]().to(arguments.device)
    if not file.is_file():
        split = data_of(arguments)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
        steps = arguments.epochs * math.ceil(len(split) / 50)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(arguments.epochs):
            for X, y in split.parts(torch.randperm(len(split)).split(50)):
                optimizer.zero_grad()
                F.cross_entropy(model(X), y).backward()
                optimizer.step()
                schedule.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, map_location=arguments.device, weights_only=True))
    return model.to(dtype).eval()


def truth_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """tr(H) in float64, computed once and kept in `--cache`."""
    label = f"truth-{name}-{arguments.examples}-{arguments.epochs}-{arguments.truth_products}"
    file = Path(arguments.cache) / f"{label}.json"
    if not file.is_file():
        record = computed_truth(name, arguments)
        file.write_text(json.dumps(record))
    return json.loads(file.read_text())


def computed_truth(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model, split = trained(name, arguments, torch.float64), data_of(arguments, torch.float64)
    data = data_loss(model, split, arguments.batch_size)
    matrix = CurvatureMatrix(data, "hessian")
    like = next(iter(data.objective.params.values()))
    generator = torch.Generator(like.device).manual_seed(1)
    total, *_ = xtrace(
        matrix, like, matrix.sizes, num_products=arguments.truth_products, generator=generator
    )
    found = evaluate(model, split, 256)
    return {
        "trace": total.value,
        "stderr": total.stderr,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "num_parameters": matrix.size,
    }


def ours(flags: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def measure(model: nn.Module, split: TensorSplit, arguments: argparse.Namespace) -> Any:
        # rtol is of the half-width of the 95 % interval
        settings = {"rtol": 1.96 * RTOL, "max_passes": 100_000, "max_seconds": arguments.seconds}
        config = EstimateConfig(batch_size=arguments.batch_size, **{**settings, **flags})
        begin = time.perf_counter()
        result = estimate(model, split, config)
        seconds = time.perf_counter() - begin
        total = result.result.total
        interval = total.interval()
        assert total.stderr is not None
        assert interval is not None
        error = total.stderr / abs(total.value)
        factor = max(1.0, (error / RTOL) ** 2)  # where --seconds ended it before
        return {
            "method": result.method,
            "seconds": seconds * factor,
            "passes": result.result.passes * max(1, result.num_probes) * factor
            if result.method not in ("xtrace", "hutch++") else result.result.passes,
            "error": error / math.sqrt(factor),
            "extrapolated": factor > 1,
            "estimate": total.value,
            "interval": interval,
        }  # fmt: skip

    return measure


class Primitive(nn.Module):
    """A network with norms that PyTorch can differentiate in forward mode, as curvlinops does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: Tensor) -> Tensor:
        with differentiable_ops():
            return self.model(X)


def operator(model: nn.Module, split: TensorSplit, arguments: argparse.Namespace) -> Any:
    from curvlinops import HessianLinearOperator

    if any(isinstance(m, (nn.GroupNorm, nn.LayerNorm)) for m in model.modules()):
        model = Primitive(model)  # group norm fails else, and layer norm may be wrong
    params = [p for p in model.parameters() if p.requires_grad]
    data = list(split.batches(arguments.batch_size))
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), params, data, check_deterministic=False
    )


def interpolated(draw: Callable[[int, int], float], truth: float, repeats: int) -> dict[str, Any]:
    """The products, and their seconds, at which a peer's root mean square error is 1 %."""
    errors, seconds = [], []
    for products in PRODUCTS:
        squares, begin = [], time.perf_counter()
        for seed in range(repeats):
            squares.append((draw(products, seed) / truth - 1) ** 2)
        seconds.append((time.perf_counter() - begin) / repeats)
        errors.append(math.sqrt(statistics.fmean(squares)))
    logs = [(math.log(m), math.log(max(e, 1e-9))) for m, e in zip(PRODUCTS, errors, strict=True)]
    slope = (logs[-1][1] - logs[0][1]) / (logs[-1][0] - logs[0][0])
    middle = [statistics.fmean(column) for column in zip(*logs, strict=True)]
    needed = math.exp(middle[0] + (math.log(RTOL) - middle[1]) / slope)
    per_product = seconds[-1] / PRODUCTS[-1]
    return {
        "passes": needed,
        "seconds": needed * per_product,
        "error": RTOL,
        "errors": dict(zip(PRODUCTS, errors, strict=True)),
        "extrapolated": True,
    }


def peer_xtrace(
    model: nn.Module, split: TensorSplit, arguments: argparse.Namespace
) -> dict[str, Any]:
    import curvlinops

    matrix = operator(model, split, arguments)

    def draw(products: int, seed: int) -> float:
        torch.manual_seed(seed)
        return curvlinops.xtrace(matrix, products).item()

    return interpolated(draw, arguments.truth, arguments.repeats)


def peer_skerch(
    model: nn.Module, split: TensorSplit, arguments: argparse.Namespace
) -> dict[str, Any]:
    from skerch.algorithms import xhutchpp

    matrix = operator(model, split, arguments)

    class Wrapped:
        shape = tuple(matrix.shape)

        def __matmul__(self, V: Tensor) -> Tensor:
            return matrix @ V

        def __rmatmul__(self, V: Tensor) -> Tensor:
            return (matrix @ V.mT).mT if V.dim() == 2 else matrix @ V

    def draw(products: int, seed: int) -> float:
        result = xhutchpp(
            Wrapped(), arguments.device, torch.float32, x_dims=products // 2,
            gh_meas=0, seed=seed * 1_000_003 + 17, return_diag=False,
        )  # fmt: skip
        value = result["tr"]
        value = value[0] if isinstance(value, tuple) else value
        return float(value)

    return interpolated(draw, arguments.truth, 1)  # the same estimator on the same matrix


def peer_pyhessian(
    model: nn.Module, split: TensorSplit, arguments: argparse.Namespace
) -> dict[str, Any]:
    from pyhessian import hessian

    loader = list(split.batches(arguments.batch_size))
    computer = hessian(
        model, nn.CrossEntropyLoss(), dataloader=loader, cuda=arguments.device == "cuda"
    )
    torch.manual_seed(0)
    begin = time.perf_counter()
    samples = computer.trace(maxIter=arguments.samples, tol=0.0)
    per_pass = (time.perf_counter() - begin) / len(samples)
    passes = (statistics.stdev(samples) / arguments.truth / RTOL) ** 2
    return {
        "passes": passes,
        "seconds": passes * per_pass,
        "error": RTOL,
        "extrapolated": True,
        "estimate": statistics.fmean(samples),
    }


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "hesstrace auto": ours({"method": "auto"}),
    "hesstrace hutchinson": ours({"method": "hutchinson"}),
    "curvlinops xtrace": peer_xtrace,
    "skerch xhutchpp": peer_skerch,
    "pyhessian": peer_pyhessian,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One method on one network, in this process."""
    model, split = trained(arguments.one[0], arguments, torch.float32), data_of(arguments)
    evaluate(model, split, arguments.batch_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with sdpa_kernel(SDPBackend.MATH):  # the peers cannot differentiate any other
        result = METHODS[arguments.one[1]](model, split, arguments)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_gpu = arguments.device == "cuda"
    result["megabytes"] = (
        torch.cuda.max_memory_allocated() / 2**20 if on_gpu else (after - before) / 1024
    )
    return result


def child(*flags: str) -> dict[str, Any] | None:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *flags],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    """The Markdown table, a line at a time."""
    for name in arguments.networks.split(","):
        truth = child("--truth-of", name)
        assert truth is not None
        yield (
            f"\n**{name}**: {truth['num_parameters']} parameters, train loss {truth['loss']:.4f}, "
            f"tr(H) = {truth['trace']:.3f} ± {truth['stderr']:.3f} (XTrace, float64, "
            f"{arguments.truth_products} products)\n"
        )
        yield "| method | seconds to 1 % | passes | memory, MB | estimate (95 %) | truth in it |"
        yield "| --- | ---: | ---: | ---: | ---: | --- |"
        for method in METHODS:
            package = method.split()[0]
            if package != "hesstrace" and find_spec(package) is None:
                yield f"| {method} | not installed | | | | |"
                continue
            r = child("--one", name, method, "--truth", str(truth["trace"]))
            if r is None:
                yield f"| {method} | not possible | | | | |"
                continue
            label = f"{method} ({r['method']})" if "method" in r else method
            mark = "~" if r["extrapolated"] else ""
            interval = inside = ""
            if "interval" in r:
                low, high = r["interval"]
                interval = f"{r['estimate']:.3f} [{low:.3f}, {high:.3f}]"
                slack = 3 * truth["stderr"] + 1e-5 * abs(truth["trace"])
                inside = "yes" if low - slack <= truth["trace"] <= high + slack else "no"
            yield (
                f"| {label} | {mark}{r['seconds']:.1f} | {mark}{r['passes']:.0f} | "
                f"{r['megabytes']:.0f} | {interval} | {inside} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=12, help="of Hutchinson's method")
    parser.add_argument("--repeats", type=int, default=3, help="of XTrace")
    parser.add_argument("--truth-products", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120, help="at most, for one of our own")
    parser.add_argument("--cache", default="benchmarks/.cache")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--truth", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--truth-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments)))
    elif arguments.truth_of:
        print(json.dumps(truth_of(arguments.truth_of, arguments)))
    else:
        print(
            f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s), "
            f"{arguments.examples} examples, batches of {arguments.batch_size}",
            flush=True,
        )
        for line in rows(arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
