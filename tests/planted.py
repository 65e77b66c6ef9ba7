"""Models of 8 inputs and 3 classes whose second derivatives PyTorch or their authors got wrong.

Each says what must become of a penalty on tr(H): "right" by some way, or "refused".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Body(nn.Module):
    """A body between two linear maps."""

    def __init__(self, body, width=6):
        super().__init__()
        self.inner, self.head, self.body = nn.Linear(8, width), nn.Linear(width, 3), body

    def forward(self, X):
        return self.head(self.body(self.inner(X)))


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y


class WrongSecond(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y.detach().square())


class OffByAPercent(Tanh):
    """Its second derivative is 1 % too large."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        slope = 1 - y * y
        return g * (slope.detach() + 1.01 * (slope - slope.detach()))


class WrongThird(Tanh):
    """Its second derivative is right, and a constant."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return SlopeOfTanh.apply(g, y)


class SlopeOfTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(g, y)
        return g * (1 - y * y)

    @staticmethod
    def backward(ctx, gg):
        g, y = ctx.saved_tensors
        return gg * (1 - y * y), gg * g.detach() * -2 * y.detach()


class NoSecond(Tanh):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(3 * x) / 3

    @staticmethod
    def backward(ctx, g):
        return g


class ReverseOnly(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class FirstOrderForward(torch.autograd.Function):
    """Its `jvp` is right, of the first order."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)

    @staticmethod
    def jvp(ctx, t):
        (y,) = ctx.saved_tensors
        return t * (1 - y.detach() ** 2)


class Gated(nn.Module):
    """What is wrong is behind a gate that begins closed."""

    def __init__(self, wrong, gate=0.0):
        super().__init__()
        self.wrong, self.mix = wrong, nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.full((6,), gate))

    def forward(self, h):
        return torch.tanh(h) + self.gate * self.wrong(self.mix(h))


class Fixup(nn.Module):
    """The last linear map of a branch begins at 0."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong, self.mix, self.last = wrong, nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h):
        return torch.tanh(h) + self.last(self.wrong(self.mix(h)))


class Aliased(nn.Module):
    """The weight is read by another name than its parameter's."""

    def __init__(self, by):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        weight = self.inner.weight
        self.second = nn.Linear(6, 8, bias=False)
        if by == "list":
            self.also = [weight]
        elif by == "captured":
            self.read = lambda: weight
        elif by == "data":
            self.also = [weight.data]
        elif by == "buffer":
            self.register_buffer("copy", weight.detach())
        elif by == "parameter":
            self.copy = nn.Parameter(weight.data)
        elif by == "tied":
            self.copy = weight
        self.by = by

    def forward(self, X):
        if self.by in ("list", "data"):
            weight = self.also[0]
        else:
            weight = self.read() if self.by == "captured" else self.copy
        return self.head(torch.sin(torch.tanh(self.inner(X)) @ weight)[:, :6])


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, X):
        return self.head(torch.tanh(self.inner(X)))


class Tokens(nn.Module):
    """Some of its tokens are padding."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.kind = nn.Embedding(7, 6, padding_idx=2), kind
        nn.init.normal_(self.table.weight)
        self.head = nn.Linear(6, 3)
        self.output = nn.Linear(3, 7)

    def forward(self, X):
        tokens = (X.abs() * 10).long() % 7
        if self.kind == "function":
            rows = F.embedding(tokens, self.table.weight, padding_idx=-5)
        elif self.kind == "scaled":
            rows = F.embedding(tokens, self.table.weight.sin() * 2, 2)
        else:
            rows = self.table(tokens)
        h = torch.tanh(rows).mean(1)
        if self.kind == "tied":
            return (h @ self.table.weight.T)[:, :3] + self.head(h)
        return self.head(h)


class OwnPrecision(nn.Module):
    """Casts to float32 by itself, or makes tensors of the default type."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner, self.head = kind, nn.Linear(8, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, X):
        h = self.inner(X)
        if self.kind == "llama":
            own = h.dtype
            h = h.to(torch.float32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = self.gain * h.to(own)
        elif self.kind == "softmax":
            h = F.softmax(h, dim=-1, dtype=torch.float32).type_as(h)
        elif self.kind == "float":
            h = torch.tanh(h.float())
        elif self.kind == "state":
            h = torch.tanh(h @ torch.eye(6) + torch.zeros(len(X), 6, dtype=torch.float32))
        return self.head(h)


class Odd(nn.Module):
    """Has parameters that are not of floating point, or a scripted part."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head, self.kind = nn.Linear(8, 6), nn.Linear(6, 3), kind
        if kind == "integers":
            self.order = nn.Parameter(torch.arange(6).flip(0), requires_grad=False)
        elif kind == "booleans":
            self.order = nn.Parameter(torch.arange(6) % 2 == 0, requires_grad=False)
        elif kind == "scripted":
            self.inner = torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.Tanh()))

    def forward(self, X):
        h = torch.tanh(self.inner(X))
        if self.kind == "integers":
            h = h[:, self.order]
        elif self.kind == "booleans":
            h = h * self.order
        return self.head(h)


def in_place_view(h):
    h = torch.sin(h)
    view = h[:, :3]
    view.mul_(2)
    view += 1
    return h * h


def in_place_alias(h):
    h = torch.sin(h)
    alias = h.contiguous()
    alias.relu_()
    return h * h


def in_place_dropout(h):
    h = torch.sin(h)
    same = F.dropout(h, 0.5, training=False)
    same.mul_(2)
    return h * same


def detached(h):
    return torch.tanh(h) * h.detach().square()


def without_graph(h):
    with torch.no_grad():
        scale = h.abs().mean() ** 2
    return torch.tanh(h) / (1 + scale)


def by_number(h):
    return torch.tanh(h) * h.abs().mean().item() ** 2


def integer_scale(h):
    return torch.tanh(h) * ((10 * h).to(torch.int64).to(h.dtype) + 5)


def square(h):
    return h[:, :4].reshape(-1, 2, 2) + 2 * torch.eye(2, dtype=h.dtype)


def matrices(h, *, width=6):
    return h @ h.T / len(h) + 2 * torch.eye(len(h), dtype=h.dtype)


def polar(h):
    return torch.polar(1 + h * h, h.sin()).real


def by_fourier(h):
    return torch.fft.fft(h * h).abs()


def short_fourier(h):
    window = torch.ones(4, dtype=h.dtype)
    out = torch.stft(torch.tanh(h), 4, 2, window=window, return_complex=True)
    return out.abs().square().flatten(1)[:, :6]


def complex_gain(h):
    pairs = torch.view_as_complex(h.reshape(len(h), 3, 2).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * pairs.real)).flatten(1)


def checkpointed(norm):
    return Wrapped(norm)


class Wrapped(nn.Module):
    """A block that keeps no activations but computes them again."""

    def __init__(self, block, *, reentrant=False):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, h):
        return checkpoint(self.block, h, use_reentrant=self.reentrant)


def block():
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())


RIGHT = {
    "fft": lambda: Body(by_fourier),
    "stft": lambda: Body(short_fourier),
    "polar": lambda: Body(polar),
    "complex gain": lambda: Body(complex_gain),
    "view written": lambda: Body(in_place_view),
    "alias written": lambda: Body(in_place_alias),
    "dropout's alias written": lambda: Body(in_place_dropout),
    "cast to integers": lambda: Body(integer_scale),
    "first-order jvp": lambda: Body(FirstOrderForward.apply),
    "reverse only": lambda: Body(ReverseOnly.apply),
    "logdet": lambda: Body(lambda h: torch.tanh(h) * torch.logdet(square(h))[:, None]),
    "slogdet": lambda: Body(lambda h: torch.tanh(h) * torch.slogdet(square(h))[1][:, None]),
    "det": lambda: Body(lambda h: torch.tanh(h) * torch.det(square(h))[:, None]),
    "solve": lambda: Body(lambda h: torch.linalg.solve(matrices(h), torch.tanh(h))),
    "inverse": lambda: Body(lambda h: torch.linalg.inv(matrices(h)) @ h),
    "cholesky": lambda: Body(lambda h: torch.linalg.cholesky(matrices(h)) @ h),
    "normalize": lambda: Body(lambda h: F.normalize(h) ** 2),
    "norm": lambda: Body(lambda h: h / h.norm()),
    "norm of rows": lambda: Body(lambda h: h / h.norm(dim=1, keepdim=True)),
    "std": lambda: Body(lambda h: (h - h.mean(0)) / h.std(0)),
    "var": lambda: Body(lambda h: h / (1 + h.var(1, keepdim=True))),
    "cdist": lambda: Body(lambda h: torch.cdist(h, h.sin()) @ h),
    "cosine": lambda: Body(lambda h: h * F.cosine_similarity(h, h.sin(), dim=1)[:, None]),
    "root of 0": lambda: Body(lambda h: torch.sqrt(torch.relu(h))),
    "power of 0": lambda: Body(lambda h: torch.relu(h) ** 0.3 + torch.relu(h).pow(0.5)),
    "norm of 0": lambda: Body(lambda h: h + torch.relu(h - 3).square().sum(1, True).sqrt()),
    "alias in a list": lambda: Aliased("list"),
    "alias captured": lambda: Aliased("captured"),
    "two names": lambda: Aliased("tied"),
    "weight norm": Parametrized,
    "padding": lambda: Tokens("module"),
    "padding of a function": lambda: Tokens("function"),
    "padding scaled": lambda: Tokens("scaled"),
    "padding tied": lambda: Tokens("tied"),
    "llama's norm": lambda: OwnPrecision("llama"),
    "softmax in float32": lambda: OwnPrecision("softmax"),
    "float()": lambda: OwnPrecision("float"),
    "state in float32": lambda: OwnPrecision("state"),
    "integers": lambda: Odd("integers"),
    "booleans": lambda: Odd("booleans"),
    "gated, right": lambda: Body(Gated(torch.tanh)),
    "checkpointed": lambda: Body(Wrapped(block())),
}

REFUSED = {
    "wrong second": lambda: Body(WrongSecond.apply),
    "1 % wrong": lambda: Body(OffByAPercent.apply),
    "no second": lambda: Body(NoSecond.apply),
    "straight through": lambda: Body(StraightThrough.apply),
    "behind a gate": lambda: Body(Gated(WrongSecond.apply)),
    "behind a gate, 1 %": lambda: Body(Gated(OffByAPercent.apply)),
    "behind a small gate": lambda: Body(Gated(WrongSecond.apply, 1e-6)),
    "behind two gates": lambda: Body(Gated(Gated(WrongSecond.apply))),
    "behind a branch of zeros": lambda: Body(Fixup(WrongSecond.apply)),
    "small branch": lambda: Body(lambda h: h.tanh() + 0.02 * WrongSecond.apply(h)),
    "straight through, as a sum": lambda: Body(lambda h: h + (h.round() - h).detach()),
    "entropy of 0": lambda: Body(lambda h: torch.special.entr(torch.relu(h))),
    "detached": lambda: Body(detached),
    "no_grad": lambda: Body(without_graph),
    "by number": lambda: Body(by_number),
    ".data in a list": lambda: Aliased("data"),
    "detached buffer": lambda: Aliased("buffer"),
    "two parameters of one memory": lambda: Aliased("parameter"),
    "checkpointed, wrong": lambda: Body(Wrapped(WrongSecond.apply)),
    "wrong, casts to float32": lambda: Body(lambda h: WrongSecond.apply(h.float())),
    "1 % wrong, casts to float32": lambda: Body(lambda h: OffByAPercent.apply(h.float())),
    "wrong in a few examples": lambda: Body(
        lambda h: torch.where(h > 0.8, WrongSecond.apply(h), h.tanh())
    ),
    "wrong for a bias": lambda: Body(lambda h: h + WrongSecond.apply(h[:, :1])),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)
    ),
}

RIGHT_FOR_G = {
    "wrong third": lambda: Body(WrongThird.apply),
    "third behind a gate": lambda: Body(Gated(WrongThird.apply)),
}
"""Refused for tr(H) alone."""
