"""Forms of PyTorch's operations whose derivatives of every order are right.

The fused kernels of several operations have a first derivative that is right and a second or
third one that is missing or, without an error, wrong: batch, instance and layer norm in nested
forward mode and in third derivatives; `weight_norm` already in second ones; flash attention,
`hardsigmoid` and cuDNN's recurrent layers have no second derivative at all; the padding row of an
embedding is held fixed in reverse mode alone. Inside
`differentiable_ops()` each is written from primitive operations instead, for any model, whether
it calls a module or a function. Values agree with the fused kernels to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesstrace_cli.autodiff.checkpointing import plain_checkpoints
from hesstrace_cli.autodiff.convolution import CONVOLUTIONS
from hesstrace_cli.autodiff.group_norm import group_norm as fast_group_norm
from hesstrace_cli.autodiff.layer_calls import noting


def _normalize(X: Tensor, dims: list[int], eps: float) -> Tensor:
    mean = X.mean(dims, keepdim=True)
    centered = X - mean
    variance = (centered * centered).mean(dims, keepdim=True)
    return centered * torch.rsqrt(variance + eps)


def per_channel(vector: Tensor, X: Tensor) -> Tensor:
    """A vector over the channels, in a shape that multiplies X, (N, C, ...)."""
    return vector.reshape(1, -1, *([1] * (X.dim() - 2)))


def affine_per_channel(X: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """X times a weight plus a bias for each channel."""
    if weight is not None:
        X = X * per_channel(weight, X)
    if bias is not None:
        X = X + per_channel(bias, X)
    return X


_ONE_VALUE = "Expected more than 1 value per channel when training, got input size {}"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Batch norm from primitives; the running statistics are left as they are."""
    if training or running_mean is None or running_var is None:
        dims = [0, *range(2, input.dim())]
        if input.numel() == input.shape[1]:
            raise ValueError(_ONE_VALUE.format(tuple(input.shape)))
        normalized = _normalize(input, dims, eps)
    else:
        scale = torch.rsqrt(running_var + eps)
        normalized = (input - per_channel(running_mean, input)) * per_channel(scale, input)
    return affine_per_channel(normalized, weight, bias)


class _HeldBatchNorm(torch.autograd.Function):
    """Batch norm in training mode, its statistics constant where `held_statistics` says so.

    Elsewhere it has the derivatives of the kernel itself. What is made while they are held knows
    how mean and 1/std depend on the input, and is differentiated through them afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        Y, mean, rstd = torch.native_batch_norm(
            X, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(X, weight, mean, rstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return Y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        X, weight, mean, rstd = ctx.saved_tensors
        g, of_mean, of_rstd = slopes
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if _Held.now:
            assert g is not None
            scale = rstd if weight is None else rstd * weight
            grads = g * per_channel(scale, X), None, None
            if _Held.with_weights:
                dims = [0, *range(2, X.dim())]
                normalized = (X - per_channel(mean, X)) * per_channel(rstd, X)
                grads = grads[0], (g * normalized).sum(dims), g.sum(dims)
        elif g is not None:
            grads = torch.ops.aten.native_batch_norm_backward(
                g, X, weight, None, None, mean.detach(), rstd.detach(), True, ctx.eps,
                [ctx.needs_input_grad[0], weight is not None, ctx.needs_input_grad[2]],
            )  # fmt: skip
        through = _through_statistics(X, mean, rstd, of_mean, of_rstd)
        of_X = grads[0] if through is None else through if grads[0] is None else grads[0] + through
        of_weight = None if weight is None else grads[1]
        of_bias = grads[2] if ctx.needs_input_grad[2] else None
        return of_X, of_weight, of_bias, None, None, None, None


HELD_BATCH_NORM = _HeldBatchNorm.__name__
"""The name of its nodes in a graph, whose first input is x, and outputs are y, mean and 1/std."""


def _through_statistics(
    X: Tensor, mean: Tensor, rstd: Tensor, of_mean: Tensor | None, of_rstd: Tensor | None
) -> Tensor | None:
    """The gradient in X of what depends on its channels' mean and 1/std."""
    n = X.numel() // X.shape[1]
    total = None
    if of_mean is not None:
        total = per_channel(of_mean / n, X).expand_as(X)
    if of_rstd is not None:
        slope = per_channel(of_rstd * rstd**3 / -n, X)
        by_rstd = (X - per_channel(mean, X)) * slope
        total = by_rstd if total is None else total + by_rstd
    return total


class _Held:
    """Of the whole process, as backward passes run in threads of their own."""

    now = False
    with_weights = False


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, statistic: Tensor) -> Tensor:
        return statistic.clone()

    @staticmethod
    def backward(_ctx: Any, *slopes: Tensor) -> Tensor | None:
        return None if _Held.now else slopes[0]


def held(statistic: Tensor) -> Tensor:
    """A batch's statistic, constant in the backward passes inside `held_statistics`."""
    kept: Tensor = _Hold.apply(statistic)
    return kept


@contextmanager
def held_statistics(*, with_weights: bool = False) -> Iterator[None]:
    """Hold the batch's statistics constant in the backward passes inside.

    Args:
        with_weights: Whether a batch or group norm's own weight and bias get gradients there.
    """
    before = _Held.now, _Held.with_weights
    _Held.now, _Held.with_weights = True, with_weights
    try:
        yield
    finally:
        _Held.now, _Held.with_weights = before


def _held_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if input.numel() == input.shape[1]:
        raise ValueError(_ONE_VALUE.format(tuple(input.shape)))
    output: Tensor = _HeldBatchNorm.apply(
        input, weight, bias, running_mean, running_var, momentum, eps
    )[0]
    return output


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Instance norm from primitives; the running statistics are left as they are."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normalized = _normalize(input, list(range(2, input.dim())), eps)
    return affine_per_channel(normalized, weight, bias)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer norm from primitives."""
    output = _normalize(input, list(range(-len(normalized_shape), 0)), eps)
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group norm from primitives."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    normalized = _normalize(grouped, [-1], eps).reshape(input.shape)
    return affine_per_channel(normalized, weight, bias)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root-mean-square norm from primitives."""
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    output = input * torch.rsqrt((input * input).mean(dims, keepdim=True) + eps)
    return output if weight is None else output * weight


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight g v / ||v||, the norm taken over all dimensions but `dim`."""
    return v * (g / norm_except_dim(v, 2, dim))


def norm_except_dim(v: Tensor, pow: int = 2, dim: int = 0) -> Tensor:
    """The `pow`-norm of v over all dimensions but `dim` (-1: over all), kept as ones."""
    dims = [d for d in range(v.dim()) if d != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    powers = v * v if pow == 2 else v.abs().pow(pow)
    return powers.sum(dims, keepdim=True).pow(1 / pow)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Hardsigmoid as clamp(x / 6 + 1/2, 0, 1)."""
    return torch.clamp(input / 6 + 0.5, 0, 1)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Hardswish as x times hardsigmoid(x)."""
    return input * hardsigmoid(input)


def _root(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A power below 1, finite in every derivative where what it is taken of stays 0.

    There the slope is infinite, and 0 times it no number: so that what multiplies it by 0, as the
    slope of ReLU, gives 0, it is the largest number there; by anything else it overflows.
    """

    def call(input: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not _has_infinite_slope(func, input, *args, **kwargs):
            return func(input, *args, **kwargs)
        is_zero = input == 0
        root = func(torch.where(is_zero, 1, input), *args, **kwargs)
        return torch.where(is_zero, input * torch.finfo(input.dtype).max, root)

    return call


def _has_infinite_slope(
    func: Any, input: Any, exponent: Any = None, *, out: Tensor | None = None
) -> bool:
    """Whether a call of `sqrt` or `pow` takes a power between 0 and 1 of real numbers."""
    if not isinstance(input, Tensor) or not input.is_floating_point() or out is not None:
        return False
    if exponent is None:
        return func in (torch.sqrt, Tensor.sqrt)
    return isinstance(exponent, float) and 0 < exponent < 1


_ROOTS = (torch.sqrt, Tensor.sqrt, torch.pow, Tensor.pow, Tensor.__pow__)


def _padding_read(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *_args: Any, **_kwargs: Any
) -> tuple[Tensor, Tensor, int | None]:
    """Which rows a call of `F.embedding` reads, of what, and which of them is padding."""
    return input, weight, None if padding_idx is None else padding_idx % weight.shape[0]


def _padding_read_natively(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *_args: Any, **_kwargs: Any
) -> tuple[Tensor, Tensor, int | None]:
    """The same of `torch.embedding`, where -1 is no padding."""
    return indices, weight, None if padding_idx < 0 else padding_idx


_EMBEDDINGS: dict[Any, Callable[..., tuple[Tensor, Tensor, int | None]]] = {
    F.embedding: _padding_read,
    torch.embedding: _padding_read_natively,
}


def _with_fixed_padding(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The padding row is held fixed in forward mode too, as it is in reverse mode."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        rows = func(*args, **kwargs)
        input, _, padding = _EMBEDDINGS[func](*args, **kwargs)
        if padding is None:
            return rows
        return torch.where((input == padding).unsqueeze(-1), rows.detach(), rows)

    return call


class HeldPadding(TorchFunctionMode):
    """Keeps the padding rows of embeddings as they were when each was first read.

    Autograd gives a padding row no gradient though the loss depends on it: differences of a loss
    have to be taken with it held. The passes must be of one model on one batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[Tensor] = []
        self._read = 0

    def __enter__(self) -> HeldPadding:
        """Begin a pass."""
        self._read = 0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = func(*args, **(kwargs or {}))
        if func not in _EMBEDDINGS:
            return rows
        input, weight, padding = _EMBEDDINGS[func](*args, **(kwargs or {}))
        if padding is None:
            return rows
        if self._read == len(self._rows):
            self._rows.append(weight[padding].detach().clone())
        held = self._rows[self._read]
        self._read += 1
        return torch.where((input == padding).unsqueeze(-1), held, rows)


def _without_fused(recurrent: Callable[..., Any]) -> Callable[..., Any]:
    """Without cuDNN and oneDNN, whose recurrent layers are one operation each.

    Step by step their weights are those of linear layers, and examples' gradients can be told.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        cudnn, onednn = torch.backends.cudnn, torch._C._get_mkldnn_enabled()
        before = cudnn.enabled
        cudnn.enabled = False  # `cudnn.flags` would set all its other flags too
        torch._C._set_mkldnn_enabled(False)
        try:
            return recurrent(*args, **kwargs)
        finally:
            cudnn.enabled = before
            torch._C._set_mkldnn_enabled(onednn)

    return call


def _in_full_precision(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Statistics of a half-precision input are taken in float32, as the fused kernels do."""

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dtype not in (torch.bfloat16, torch.float16):
            return norm(input, *args, **kwargs)
        return norm(input.float(), *args, **kwargs).to(input.dtype)

    return call


def _by_torchs_order(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.batch_norm` and `torch.instance_norm` take the weights before the statistics."""

    def call(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, *rest: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        return norm(input, running_mean, running_var, weight, bias, *rest, **named)

    return call


_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    torch.batch_norm: _by_torchs_order(batch_norm),
    F.instance_norm: instance_norm,
    torch.instance_norm: _by_torchs_order(instance_norm),
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}

# In eval mode cuDNN's recurrent layers have no derivative at all; fused ones have no norm rule.
_FIRST_ORDER: dict[Any, Callable[..., Any]] = {
    recurrent: _without_fused(recurrent)
    for recurrent in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}

# Right and fast where only second derivatives in reverse mode are taken (the Gauss-Newton penalty).
_SECOND_ORDER: dict[Any, Callable[..., Any]] = {
    **_FIRST_ORDER,
    torch._weight_norm: weight_norm,
    torch.norm_except_dim: norm_except_dim,
    F.hardsigmoid: hardsigmoid,
    torch._C._nn.hardsigmoid: hardsigmoid,
    F.hardswish: hardswish,
    torch._C._nn.hardswish: hardswish,
    **{operation: _root(operation) for operation in _ROOTS},
    # The kernels' second derivatives in half precision overflow, so they run in float32.
    **{operation: _in_full_precision(operation) for operation in _NORMS},
}

_FAST_GROUP_NORM = _in_full_precision(fast_group_norm(lambda: _Held.now and not _Held.with_weights))
_IN_REVERSE: dict[Any, Callable[..., Any]] = {
    **_SECOND_ORDER,
    **CONVOLUTIONS,
    F.group_norm: _FAST_GROUP_NORM,
    torch.group_norm: _FAST_GROUP_NORM,
}

_BY_EXAMPLE: dict[Any, Callable[..., Any]] = {
    **_IN_REVERSE,
    F.batch_norm: _in_full_precision(_held_batch_norm),
    torch.batch_norm: _in_full_precision(_by_torchs_order(_held_batch_norm)),
}

_ANY_ORDER: dict[Any, Callable[..., Any]] = {
    **_SECOND_ORDER,
    **{operation: _with_fixed_padding(operation) for operation in _EMBEDDINGS},
    **{operation: _in_full_precision(norm) for operation, norm in _NORMS.items()},
}


def is_replaced(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is replaced where derivatives of any order are needed."""
    if func in _EMBEDDINGS:
        return _EMBEDDINGS[func](*args, **kwargs)[2] is not None
    if func in _ROOTS:
        return _has_infinite_slope(func, *args, **kwargs)
    return func in _ANY_ORDER


class _ReplaceOperations(TorchFunctionMode):
    def __init__(self, replacements: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def differentiable_ops(*, order: int = 3, by_example: bool = False) -> Iterator[None]:
    """Run what is inside with operations whose derivatives up to `order` are right.

    Args:
        order: 1 keeps all of the model's own operations but cuDNN's recurrent layers; 2 keeps
            the fast norm kernels, whose second derivative in reverse mode is right; 3 replaces
            them too, and is needed for any forward mode.
        by_example: Whether batch norm's statistics can be held, see `held_statistics`; of
            order 2 alone.
    """
    if order <= 1:
        with noting(), plain_checkpoints(), _ReplaceOperations(_FIRST_ORDER):
            yield
        return
    replacements = _ANY_ORDER
    if order <= 2:
        replacements = _BY_EXAMPLE if by_example else _IN_REVERSE
    attention = sdpa_kernel(SDPBackend.MATH)
    with noting(), plain_checkpoints(), attention, _ReplaceOperations(replacements):
        yield
