"""Errors that tell of the machine or the interpreter, not of the model, the data or a file.

They come as `RuntimeError`, as do those of an operation without a derivative or of a file that is
cut off, or as `ImportError`: whoever catches one of these asks here first. Nothing here imports
torch.
"""

from __future__ import annotations

import errno
import re
import sys
import zlib

_NO_MEMORY = re.compile(
    r"out of memory"  # CUDA's allocator, runtime and driver, and NCCL
    r"|DefaultCPUAllocator|std::bad_alloc|Cannot allocate memory"
    r"|could not create a (primitive|memory object)$"  # oneDNN, of kernels that it has
    r"|Storage size calculation overflowed"  # more bytes than any machine has
    r"|(STATUS|CUFFT)_ALLOC_FAILED|ALLOCATION_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
    re.IGNORECASE,
)
_NOT_LOADED = re.compile(r"failed to map segment from shared object")  # a library, by ld.so
_DEVICE_FAILED = re.compile(
    r"(CUDA|HIP|CUDA driver) error:"  # of the runtime, and of cuBLAS
    r"|CU(DNN|BLAS|SOLVER|SPARSE)_STATUS_(NOT_INITIALIZED|MAPPING|EXECUTION|INTERNAL)"
)

FAILURES = (
    RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, IndexError,
    AssertionError,
)  # fmt: skip
"""What an operation raises that has no derivative of some order, or no rule for it."""


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether memory was asked for that is not there, on whatever device."""
    if isinstance(problem, (MemoryError, *_types("OutOfMemoryError"))):
        return True
    if isinstance(problem, OSError):
        return problem.errno == errno.ENOMEM
    if isinstance(problem, zlib.error):
        return str(problem).startswith("Error -4 ")  # Z_MEM_ERROR
    if isinstance(problem, ImportError):
        return _NOT_LOADED.search(str(problem)) is not None
    return isinstance(problem, RuntimeError) and _NO_MEMORY.search(str(problem)) is not None


def is_lost_worker(problem: BaseException) -> bool:
    """Whether a process that reads the data is gone; raised wherever the news comes."""
    return isinstance(problem, RuntimeError) and str(problem).startswith("DataLoader worker (pid")


def is_of_the_machine(problem: BaseException) -> bool:
    """Whether memory, the stack, a device or a worker failed: nothing is said of what it met."""
    if is_out_of_memory(problem) or is_lost_worker(problem):
        return True
    if isinstance(problem, (RecursionError, *_types("AcceleratorError"))):
        return True
    return isinstance(problem, RuntimeError) and _DEVICE_FAILED.search(str(problem)) is not None


def _types(name: str) -> tuple[type[BaseException], ...]:
    """A class of torch's errors, where torch is loaded and has it."""
    found = getattr(sys.modules.get("torch"), name, None)
    return () if found is None else (found,)
