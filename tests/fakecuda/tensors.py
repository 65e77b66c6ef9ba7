"""The tensors of a device that is not there, what it refuses, and the kernels only CUDA has."""

from __future__ import annotations

import collections
import contextlib
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_RealGenerator = torch._C.Generator
_ON_CUDA = set()  # generators by what they are below the dispatcher, where they are other objects


class CudaTensor(torch.Tensor):
    """Says `cuda:0` above the dispatcher; `host` has the numbers."""

    @staticmethod
    def __new__(cls, host):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, layout=host.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self):
        return CudaTensor(self.host.detach())  # unlike detach(), with a version of its own

    @data.setter
    def data(self, other):
        torch._C.TensorBase.data.__set__(self, other)  # type and shape
        self.host = other.host

    def tolist(self):
        return self.detach().cpu().tolist()  # which PyTorch refuses for subclasses

    def untyped_storage(self):
        return self.host.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.detach().host.clone().__reduce_ex__(protocol)  # saved, it is as if on the CPU

    def __deepcopy__(self, memo):
        copied = CudaTensor(self.detach().host.clone())
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Generator(_RealGenerator):
    """Says which device it is for; its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        self = _RealGenerator.__new__(cls, "cpu")
        self.where = torch.device(device)
        if self.where.type == "cuda":
            _ON_CUDA.add(self._cdata)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.where

    def get_state(self):
        state = super().get_state()
        return state if self.where.type == "cpu" else torch.cat([state, state.new_zeros(16)])

    def set_state(self, state):
        extra = 16 if self.where.type == "cuda" else 0
        if state.numel() != super().get_state().numel() + extra:
            raise RuntimeError("the state is of another device's generator")
        return super().set_state(state[: state.numel() - extra].contiguous())


class Log:
    """The waits for the device, by operation and place in the package."""

    def __init__(self):
        self.waits = collections.Counter()
        self.unordered = collections.Counter()


_log = None


@contextlib.contextmanager
def logged():
    global _log
    before, _log = _log, Log()
    try:
        yield _log
    finally:
        _log = before


def _place():
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "hesstrace_cli" in frame.filename:
            return f"{frame.filename.split('hesstrace_cli/')[-1]}:{frame.lineno}"
    return "?"


_COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
            aten._index_put_impl_.default, aten._unsafe_index.Tensor}  # fmt: skip
_WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
          aten.equal.default, aten._unique2.default, aten.is_nonzero.default}  # fmt: skip
# Without a deterministic form on CUDA, by the documentation of `use_deterministic_algorithms`
_UNORDERED = {aten._adaptive_avg_pool2d_backward.default,
              aten.adaptive_max_pool2d_backward.default}  # fmt: skip


def run(func, args, kwargs):
    """An operation as CUDA would do it, or refuse it, on the CPU."""
    if func is torch.ops.prim.device.default:
        return args[0].device
    flat, spec = tree_flatten((args, kwargs))
    given = [t for t in flat if isinstance(t, CudaTensor)]
    asked = kwargs.get("device")
    on_cuda = bool(given) if asked is None else torch.device(asked).type == "cuda"
    if not given and not on_cuda:
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    _refuse_mixed(func, args, flat, given, kwargs.get("generator"), on_cuda)
    _note(func, args, kwargs, on_cuda)
    host = [t.host if isinstance(t, CudaTensor) else t for t in flat]
    host_args, host_kwargs = tree_unflatten(host, spec)
    if asked is not None and on_cuda:
        host_kwargs["device"] = torch.device("cpu")
    if "pin_memory" in host_kwargs:
        host_kwargs["pin_memory"] = False
    seeded = torch.Tag.nondeterministic_seeded in func.tags and host_kwargs.get("generator") is None
    with _random_state_of_cuda() if seeded and on_cuda else contextlib.nullcontext():
        out = _KERNELS.get(func, func)(*host_args, **host_kwargs)
    written = _written(func, args, kwargs)

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not on_cuda:
            return x
        return written.get(id(x)) if id(x) in written else CudaTensor(x)

    return tree_map(wrap, out)


def _written(func, args, kwargs):
    """What is written into, which comes back as the object that it was."""
    written = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        by_name = argument.kwarg_only or i >= len(args)
        given = kwargs.get(argument.name) if by_name else args[i]
        if isinstance(given, CudaTensor):
            written[id(given.host)] = given
            if torch.Tag.inplace_view in func.tags:
                with no_dispatch():
                    func(*args, **kwargs)
    return written


def _refuse_mixed(func, args, flat, given, generator, on_cuda):
    if generator is not None and (generator._cdata in _ON_CUDA) != on_cuda:
        raise RuntimeError(f"the generator of another device ({func})")
    if func in _COPIES or not given:
        return
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    if func in _INDEXED:  # indices may stay on the CPU
        tensors = [args[0], *(t for t in args[2:] if isinstance(t, torch.Tensor))]
    for t in tensors:
        scalar = t.dim() == 0 and torch.Tag.pointwise in func.tags
        if not isinstance(t, CudaTensor) and not scalar:
            raise RuntimeError(f"two devices, cuda:0 and cpu ({func}, {_place()})")


def _note(func, args, kwargs, on_cuda):
    if _log is None:
        return
    name = func._schema.name.split("::")[-1]
    waits = func in _WAITS
    if func in (aten._to_copy.default, aten.copy_.default):
        source = args[1] if func is aten.copy_.default else args[0]
        asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
        waits = isinstance(source, CudaTensor) != on_cuda and not (asked and on_cuda)
    if func in _INDEXED:
        indices = [t for t in args[1] if t is not None]
        waits = any(t.dtype in (torch.bool, torch.uint8) or t.device.type == "cpu" for t in indices)
    if waits:
        _log.waits[f"{name} {_place()}"] += 1
    if func in _UNORDERED:
        _log.unordered[f"{name} {_place()}"] += 1


@contextlib.contextmanager
def _random_state_of_cuda():
    before = torch._C.default_generator.get_state()
    own = torch.cuda.default_generators[0]
    torch._C.default_generator.set_state(_RealGenerator.get_state(own))
    try:
        yield
    finally:
        _RealGenerator.set_state(own, torch._C.default_generator.get_state())
        torch._C.default_generator.set_state(before)


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    out = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return (*out, torch.empty(0, dtype=torch.uint8))


def _batch_norm_backward(x, g, weight, mean, var, save_mean, save_var, eps, _reserve):
    return aten.native_batch_norm_backward(
        g, x, weight, mean, var, save_mean, save_var, True, eps, [True, True, True]
    )


def _lstm_gates(x, h, bx, bh):
    gates = x + h if bx is None else x + h + bx + bh
    i, f, g, o = gates.chunk(4, 1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def _lstm_cell(x, h, cx, bx=None, bh=None):
    i, f, g, o = _lstm_gates(x, h, bx, bh)
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(gh, gc, cx, cy, workspace, has_bias):
    if gh is None and gc is None:
        return (None,) * 3
    i, f, g, o = workspace.chunk(4, 1)
    t = cy.tanh()
    gh = torch.zeros_like(cx) if gh is None else gh
    gc = torch.zeros_like(cx) if gc is None else gc
    gc = gc + gh * o * (1 - t * t)
    parts = [
        gc * g * i * (1 - i),
        gc * cx * f * (1 - f),
        gc * i * (1 - g * g),
        gh * t * o * (1 - o),
    ]
    grads = torch.cat(parts, 1)
    return grads, gc * f, grads.sum(0) if has_bias else None


def _lstm(x, weights, stride, hx, cx, layers, train, bidirectional):
    return torch.lstm(x, (hx, cx), list(weights), stride == 4, layers, 0.0, train, bidirectional,
                      False)  # fmt: skip


def _cudnn_rnn(x, weights, stride, buf, hx, cx, mode, hidden, proj, layers, batch_first, dropout,
               train, bidirectional, *_):  # fmt: skip
    with torch.no_grad():
        out, hy, cy = _lstm(x, weights, stride, hx, cx, layers, train, bidirectional)
    return out, hy, cy, torch.empty(0, dtype=torch.uint8), torch.empty(0)


def _cudnn_rnn_backward(x, weights, stride, buf, hx, cx, out, go, gh, gc, mode, hidden, proj,
                        layers, batch_first, dropout, train, bidirectional, *_):  # fmt: skip
    if not train:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")

    def differentiate():
        leaves = [t.detach().requires_grad_() for t in (x, *weights, hx, cx)]
        again = _lstm(leaves[0], leaves[1:-2], stride, *leaves[-2:], layers, train, bidirectional)
        pairs = [(o, g) for o, g in zip(again, (go, gh, gc), strict=True) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)

    with ThreadPoolExecutor(1) as pool:  # another thread's dispatch state is fresh
        grads = pool.submit(differentiate).result()
    return grads[0], grads[-2], grads[-1], list(grads[1:-2])


def _tf32(x):
    """Rounded to the 10 bits that tensor cores multiply."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).reshape(x.shape)


def _convolution(*args):
    if torch.backends.cudnn.allow_tf32:
        args = tuple(map(_tf32, args))
    return aten.convolution(*args)


def _convolution_backward(*args):
    if torch.backends.cudnn.allow_tf32:
        args = tuple(map(_tf32, args))
    return aten.convolution_backward(*args)


_KERNELS = {
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
    aten._cudnn_rnn.default: _cudnn_rnn,
    aten._cudnn_rnn_backward.default: _cudnn_rnn_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._efficientzerotensor.default: lambda size, **options: torch.zeros(size, **options),
    aten._pin_memory.default: lambda x, device=None: x.clone(),
    aten.is_pinned.default: lambda x, device=None: False,
}


class _Functions(TorchFunctionMode):
    """LSTMs ask cuDNN's handle above the dispatcher; they go to the operation that it ends in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_cuda = func is torch.lstm and args[0].is_cuda
        if not on_cuda or not torch._C._get_cudnn_enabled():
            return func(*args, **(kwargs or {}))
        x, (hx, cx), weights, biases, layers, dropout, train, both, batch_first = args
        x = x.transpose(0, 1) if batch_first else x
        out, hy, cy, *_ = aten._cudnn_rnn(
            x, list(weights), 4 if biases else 2, None, hx, cx, 2, hx.shape[2], 0, layers, False,
            dropout, train, both, [], None,
        )  # fmt: skip
        return out.transpose(0, 1) if batch_first else out, hy, cy


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def enter():
    """From here on `cuda` exists."""
    torch.autograd.set_multithreading_enabled(False)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.nn.RNNBase.flatten_parameters = lambda self: None
    cuda = torch.cuda
    generator = Generator(CUDA)
    cuda.default_generators = (generator,)
    # A function each: torch.compile's tables take none twice.
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda._lazy_init = lambda: None
    cuda._is_in_bad_fork = lambda: False
    cuda._lazy_call = lambda call, **_: call()
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=1 << 36, name="none")  # fmt: skip
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
    cuda.manual_seed_all = lambda seed: generator.manual_seed(seed)
    torch.Generator = Generator
    for mode in (_Dispatch(), _Functions()):
        mode.__enter__()
