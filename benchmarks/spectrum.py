"""Products and seconds to the top eigenvalue and a density, beside PyHessian and curvlinops.

    pip install -e ".[bench]"
    python benchmarks/spectrum.py --dataset imagefolder:DIR

ResNet-18 (CIFAR form) is trained for a few steps, so that its spectrum has outliers; then each tool
finds the largest eigenvalue of the Hessian to one relative residual ||H v - lambda v|| / lambda,
and a density of 64 bins by stochastic Lanczos quadrature with the same vectors and steps. Counts
are taken on `--count-examples`; the seconds of one product on `--examples`, the tools in turn.
After `--most` products a tool stops with the residual it has; hesstrace's Lanczos run serves the
density as well. The residual is each tool's own, in float32, ARPACK's from a product that is not
counted. Beside it stand the quotient and the residual of each tool's vector in float64, from one
product through PyTorch's own operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import DataConfig
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.spectrum.density import spectral_density
from hesstrace_cli.curvature.spectrum.lanczos import Krylov, inner_products, norm
from hesstrace_cli.data import Split, load_data
from hesstrace_cli.models import build_model
from hesstrace_cli.reporting.layout import markdown_table

PROBES, STEPS, BINS = 1, 30, 64
Product = Callable[[Tensor], Tensor]


class Counted:
    """A product with a vector of shape (P,), and how often it was taken."""

    def __init__(self, product: Product, size: int) -> None:
        self.product, self.size, self.count = product, size, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.product(v)

    def __matmul__(self, V: Tensor) -> Tensor:
        return self(V[:, 0])[:, None]


def products(model: nn.Module, split: Split, batch_size: int) -> dict[str, Product]:
    """Each tool's own product of the Hessian with a vector."""
    objective = Objective(model, trainable(model))
    batches = list(split.batches(batch_size))
    matrix = CurvatureMatrix(DataLoss.counted(objective, lambda: batches), "hessian")
    found: dict[str, Product] = {"hesstrace": lambda v: (matrix @ v[:, None])[:, 0]}
    peers = {"pyhessian": pyhessian_product, "curvlinops": curvlinops_product}
    for name, product_of in peers.items():
        if find_spec(name) is None:
            print(f"{name} is not installed: left out")
        else:
            found[name] = product_of(model, batches)
    return found


def pyhessian_product(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Product:
    from pyhessian import hessian

    on_gpu = batches[0][0].is_cuda
    computer = hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=on_gpu)
    params = list(model.parameters())
    sizes = [p.numel() for p in params]

    def pyhessian(v: Tensor) -> Tensor:
        parts = [x.view_as(p) for x, p in zip(v.split(sizes), params, strict=True)]
        with warnings.catch_warnings():  # of a cycle that it makes
            warnings.simplefilter("ignore")
            _, product = computer.dataloader_hv_product(parts)
        model.zero_grad()
        return torch.cat([x.flatten() for x in product]).detach()

    return pyhessian


def curvlinops_product(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Product:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches,
        check_deterministic=False,
    )  # fmt: skip
    return lambda v: operator @ v


@dataclass(frozen=True)
class Found:
    """A top eigenvalue and what it took.

    Attributes:
        vector: Its eigenvector, shape (P,).
        residual: ||H v - lambda v|| / |lambda| as the tool sees it.
        products: Products for it.
        more: Products for a density beside those.
    """

    vector: Tensor
    residual: float
    products: int
    more: int


def rayleigh(vector: Tensor, image: Tensor) -> tuple[float, float]:
    """The quotient v^T H v of a unit vector, and its relative residual."""
    value = inner_products(vector[None], image).item()
    return value, norm(image - value * vector).item() / abs(value)


def ours(H: Counted, like: Tensor, rtol: float, most: int) -> Found:
    """Lanczos' method, a product at a time."""
    generator = torch.Generator(like.device).manual_seed(0)
    krylov = Krylov(H, rademacher(like, generator=generator))
    error = 1.0
    while error > rtol and H.count < most:
        krylov.extend(1)
        values, residuals, _ = krylov.ritz()
        error = (residuals[-1] / values[-1].abs()).item()
    steps = H.count
    _, weights = eigh_tridiagonal(krylov.alphas, krylov.betas[:-1])
    vector = torch.from_numpy(weights[:, -1]).to(like) @ krylov.basis[:steps]
    others = (rademacher(like, generator=generator) for _ in range(PROBES - 1))
    spectral_density(H, others, steps=STEPS, first=krylov).on_grid(points=BINS)
    return Found(vector, error, steps, H.count - steps)


def power_iteration(H: Counted, like: Tensor, rtol: float, most: int) -> Found:
    """PyHessian's algorithm; its own stop looks at the eigenvalue, ours at the residual."""
    generator = torch.Generator(like.device).manual_seed(0)
    image = torch.randn(like.shape, generator=generator, device=like.device)
    error = 1.0
    while error > rtol and H.count < most:
        vector = image / norm(image)
        image = H(vector)
        _, error = rayleigh(vector, image)
    return Found(vector, error, H.count, PROBES * STEPS)


def arpack(H: Counted, like: Tensor, rtol: float, most: int) -> Found:
    """What curvlinops' documentation does: scipy's eigsh on its operator; 20 products at least."""

    def matvec(vector: Any) -> Any:
        return H(torch.from_numpy(vector.ravel()).to(like)).cpu().numpy()

    operator = LinearOperator((H.size, H.size), matvec=matvec, dtype=np.float32)
    _, vectors = eigsh(operator, k=1, which="LA", tol=rtol, ncv=min(20, most))
    products = H.count
    vector = torch.from_numpy(vectors[:, 0]).to(like)
    vector = vector / norm(vector)
    _, error = rayleigh(vector, H.product(vector))
    return Found(vector, error, products, PROBES * STEPS)


FINDERS = {"hesstrace": ours, "pyhessian": power_iteration, "curvlinops": arpack}


def judged(model: nn.Module, split: Split, batch_size: int, vector: Tensor) -> tuple[float, float]:
    """The quotient and relative residual in float64, by double backward as PyTorch has it."""
    model = deepcopy(model).double()
    params = list(model.parameters())
    v = vector.double() / norm(vector)
    parts = [
        x.view_as(p) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True)
    ]
    image = torch.zeros_like(v)
    for X, y in split.batches(batch_size):
        loss = F.cross_entropy(model(X.double()), y)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        product = torch.autograd.grad(grads, params, parts)
        image += torch.cat([x.flatten() for x in product]) * (len(X) / len(split))
    return rayleigh(v, image)


def trained(arguments: argparse.Namespace, split: Split) -> nn.Module:
    model = build_model(
        arguments.model, num_classes=10, in_shape=next(split.batches(1))[0].shape[1:],
        model_args={}, seed=0,
    ).to(arguments.device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(arguments.train_steps):
        chosen = torch.randperm(len(split), generator=generator)[:32]
        X, y = next(split.subset(chosen).batches(32))
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--count-examples", type=int, default=1000)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=100, help="products for the eigenvalue")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = DataConfig(
        dataset=arguments.dataset, data_dir=arguments.data_dir, model=arguments.model,
        train_examples=max(arguments.examples, arguments.count_examples), val_fraction=0.0,
    )  # fmt: skip
    split = load_data(config, torch.device(arguments.device)).train
    model = trained(arguments, split)
    size = sum(p.numel() for p in model.parameters())
    like = torch.empty(size, device=arguments.device)
    few = split.subset(torch.arange(arguments.count_examples))
    found = {
        name: FINDERS[name](Counted(product, size), like, arguments.rtol, arguments.most)
        for name, product in products(model, few, arguments.batch_size).items()
    }
    seconds = timed(
        products(model, split.subset(torch.arange(arguments.examples)), arguments.batch_size),
        like, arguments.rounds,
    )  # fmt: skip
    rows = []
    for name, result in found.items():
        value, error = judged(model, few, arguments.batch_size, result.vector)
        whole = seconds[name] * (result.products + result.more)
        own = seconds["hesstrace"] * (found["hesstrace"].products + found["hesstrace"].more)
        rows.append([
            name, str(result.products), f"{result.residual:.1e}", f"{value:.5g}", f"{error:.1e}",
            str(result.more), f"{seconds[name]:.2f}", f"{seconds[name] / seconds['hesstrace']:.2f}",
            f"{whole / own:.2f}",
        ])  # fmt: skip
    head = ("tool", "products", "relative residual", "eigenvalue in float64", "its residual",
            "more for a density", "seconds a product", "over ours", "both, over ours")  # fmt: skip
    print(f"{arguments.model}, {size} parameters, {arguments.device}, {torch.__version__}\n")
    print(markdown_table(head, rows))


def timed(tools: dict[str, Product], like: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a product, the tools in turn, after one round to warm up."""
    v = torch.ones_like(like)
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds + 1):
        for name, product in tools.items():
            begin = time.perf_counter()
            product(v).sum().item()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


if __name__ == "__main__":
    main()
