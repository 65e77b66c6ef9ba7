"""Small language models on a vocabulary of 20 tokens, in float64, with their dense Hessians."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.data.windows import TextSplit
from hesstrace_cli.models import build_model
from hesstrace_cli.tasks import Tokens

V, T = 20, 3
SMALL = {
    "lstm": ("lstm", {"width": 2, "layers": 2}),
    "lstm, tied": ("lstm", {"width": 2, "layers": 1, "tied": True}),
    "gpt": ("gpt", {"width": 4, "layers": 1, "heads": 2}),
    "gpt, tied, relu": ("gpt", {"width": 4, "layers": 1, "heads": 2, "tied": True,
                                "activation": "relu"}),
}  # fmt: skip


def numbers(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


def text(n=21):
    """6 windows and a bit: in the last the tokens beyond the end do not count."""
    return TextSplit.of(numbers(n), T, Tokens(), -100)


@functools.cache
def model_of(name):
    spec, arguments = SMALL[name]
    model = build_model(spec, num_classes=V, in_shape=(T,), model_args=arguments, seed=0)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():  # away from zeros and ones, which hide mistakes
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.add_(0.3 * noise)
    return model


def mean_loss(model, split, params=None):
    """The mean over all tokens that count, each window from a state of zeros, in plain PyTorch."""
    ((X, y),) = split.batches(10**6)
    logits = functional_call(model, dict(trainable(model)) if params is None else params, (X,))
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)


@functools.cache
@sdpa_kernel(SDPBackend.MATH)  # the other kernels have no second derivative
def dense(name):
    """H and G over the text, from the model's own operations, and the sizes of the parameters."""
    model, split = model_of(name), text()
    own = trainable(model)
    sizes = [p.numel() for p in own.values()]
    w = torch.cat([p.detach().flatten() for p in own.values()])

    def at(flat):
        parts = flat.split(sizes)
        return {n: part.view_as(p) for (n, p), part in zip(own.items(), parts, strict=True)}

    ((X, y),) = split.batches(10**6)
    H = torch.autograd.functional.hessian(lambda flat: mean_loss(model, split, at(flat)), w)
    J = torch.autograd.functional.jacobian(lambda flat: functional_call(model, at(flat), (X,)), w)
    p = functional_call(model, at(w), (X,)).softmax(-1).detach()
    A = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    J, A = J.flatten(0, 1), (A * (y != -100)[..., None, None]).flatten(0, 1)
    G = torch.einsum("mcw,mcd,mdv->wv", J, A, J) / split.num_terms
    return {"hessian": H, "ggn": G}, dict(zip(own, sizes, strict=True))


def block_traces(name, curvature):
    """The traces of the diagonal blocks by parameter name."""
    matrices, sizes = dense(name)
    parts = matrices[curvature].diagonal().split(list(sizes.values()))
    return {each: part.sum().item() for each, part in zip(sizes, parts, strict=True)}
