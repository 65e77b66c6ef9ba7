"""Small language models over 20 words, and the traces of theirs by dense derivatives.

A tied model is held against its untied twin, whose outputs are the same: so the oracle knows what a
table does as embeddings and what as output layer, and no rule for tied weights is in it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hesstrace_cli.tasks import Tokens
from tests.tasks.cases import Case

V, N, T, WIDTH = 20, 5, 4, 4


class Lstm(nn.Module):
    """Two layers, their state from nothing."""

    def __init__(self, tied):
        super().__init__()
        self.table = nn.Embedding(V, WIDTH)
        self.cells = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, V)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, X):
        return self.head(self.cells(self.table(X))[0])


class StepsFirst(Lstm):
    """The same, as PyTorch's example has it: time first inside."""

    def __init__(self, tied):
        super().__init__(tied)
        self.cells.batch_first = False

    def forward(self, X):
        hidden = self.cells(self.table(X.T))[0]
        return self.head(hidden.flatten(0, 1)).view(T, len(X), V).transpose(0, 1)


class Gpt(nn.Module):
    """One pre-norm block with positions, no bias at the end."""

    def __init__(self, tied, *, looked_up=False):
        super().__init__()
        self.table = nn.Embedding(V, WIDTH)
        self.places = nn.Embedding(T + 2, WIDTH) if looked_up else nn.Parameter(
            torch.randn(T + 2, WIDTH)
        )  # fmt: skip
        self.first, self.second, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, X):
        length = X.shape[1]
        places = (
            self.places(torch.arange(length)) if isinstance(self.places, nn.Embedding)
            else self.places[:length]
        )  # fmt: skip
        h = self.table(X) + places
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2)
                   for part in self.qkv(self.first(h)).chunk(3, 2))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.second(h))))
        return self.head(self.last(h))


KINDS = {
    "lstm": Lstm,
    "lstm, steps first": StepsFirst,
    "gpt": Gpt,
    "gpt, places looked up": lambda tied: Gpt(tied, looked_up=True),
}
MODELS = ["lstm", "lstm, tied", "lstm, steps first, tied", "gpt", "gpt, tied",
          "gpt, places looked up, tied"]  # fmt: skip


def build(name, *, tied):
    return KINDS[name.removesuffix(", tied")](tied).double().eval()


@functools.cache
def language(name):
    """A model by its name with some sequences; not all of their tokens count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name, tied="tied" in name)
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
        X, y = torch.randint(V, (N, T)), torch.randint(V, (N, T))
    X[:, 2] = X[:, 0]  # a word twice in a sequence
    y[1, 2:], y[3] = -100, -100
    return Case(Tokens(), model, X, y)


def untied(name):
    """The outputs as a function of parameters by name, the output layer's weight one of them."""
    case = language(name)
    with torch.random.fork_rng(devices=[]):
        twin = build(name, tied=False)

    def outputs(params):
        return functional_call(twin, params, (case.X,))

    return outputs, {n: dict(case.model.named_parameters()).get(
        n, case.model.table.weight) for n, _ in twin.named_parameters()}  # fmt: skip


def jacobians(name, params):
    """Of the outputs in each parameter of the untied twin, (N T V, numbers)."""
    outputs, _ = untied(name)
    names = list(params)
    rows = torch.autograd.functional.jacobian(
        lambda *values: outputs(dict(zip(names, values, strict=True))), tuple(params.values()),
        vectorize=True,
    )  # fmt: skip
    return {n: J.flatten(3).flatten(0, 2) for n, J in zip(names, rows, strict=True)}


def of_own(name, parts):
    """By the names of the model itself: what a tied table has at both places, added."""
    if "tied" not in name:
        return dict(parts)
    rest = {n: J for n, J in parts.items() if n != "head.weight"}
    return {**rest, "table.weight": parts["table.weight"] + parts["head.weight"]}


def curvature(name, f):
    """A of every term, 0 where it does not count, (N T, V, V)."""
    p, counts = f.softmax(-1), language(name).y != -100
    A = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    return (A * counts[..., None, None]).flatten(0, 1)


def quadratic(A, J):
    """sum_m tr(J_m^T A_m J_m)."""
    J = J.unflatten(0, A.shape[:2])
    return torch.einsum("mvw,mvp,mwp->", A, J, J).item()


def num_terms(name):
    return int((language(name).y != -100).sum())


def traces(name, params, f):
    """tr(G) of every block, the Jacobian's at `params`, A's at these outputs."""
    A, parts = curvature(name, f), of_own(name, jacobians(name, params))
    return {n: quadratic(A, J) / num_terms(name) for n, J in parts.items()}


def moved(name, step, direction):
    """The twin's parameters moved along a direction of the model's own."""
    _, params = untied(name)
    own = {n: direction[n if n in direction else "table.weight"] for n in params}
    return {n: p.detach() + step * own[n] for n, p in params.items()}


def sample(name, params, f, signs):
    """The sample of tr(G) by example, A taken at these outputs; the output layer's has no noise."""
    case, parts = language(name), jacobians(name, params)
    u = case.task.root(f, case.y, signs).flatten(1)
    pulled = {n: torch.einsum("nk,nkp->np", u, J.unflatten(0, (N, T * V)))
              for n, J in parts.items()}  # fmt: skip
    closed = parts.keys() & {"head.weight", "head.bias"}
    total = sum(g.square().sum().item() for n, g in pulled.items() if n not in closed)
    if "tied" in name:
        total += 2 * (pulled["table.weight"] * pulled["head.weight"]).sum().item()
    total += sum(quadratic(curvature(name, f), parts[n]) for n in closed)
    return total / num_terms(name)
