"""A CUDA device that is not there: tensors say `cuda:0`, their numbers are computed on the CPU.

PyTorch above its dispatcher sees CUDA tensors: autograd records cuDNN's nodes, devices and
generators may not be mixed. Below it every kernel runs on the CPU, so that whole commands work and
can be compared with those on the CPU. It needs a CUDA build of torch and a C++ compiler, no GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

# Loaded before torch under libcuda's own name: one device, whose context nobody has made.
_INTERPOSED = r"""
signed char _ZN3c104cuda12device_countEv(void) { return 1; }
signed char _ZN3c104cuda28device_count_ensure_non_zeroEv(void) { return 1; }
_Bool _ZN3c104cuda17hasPrimaryContextEa(signed char d) { (void)d; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { (void)d; *f = 0; *a = 0; return 0; }
int cuGetErrorString(int e, const char **s) { (void)e; *s = "no driver"; return 0; }
"""
# What guards the current device and stream, which are always the same.
_GUARD = r"""
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return d; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
extern "C" void install() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
}
"""


def _build(folder: Path) -> None:
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    (folder / "interposed.cpp").write_text(f'extern "C" {{{_INTERPOSED}}}'.replace("_Bool", "bool"))
    (folder / "guard.cpp").write_text(_GUARD)
    shared = ["c++", "-std=c++20", "-shared", "-fPIC"]
    for words in (
        [*shared, "-Wl,-soname,libcuda.so.1", "interposed.cpp", "-o", "interposed.so"],
        [*shared, f"-I{root}/include", "guard.cpp", "-o", "guard.so", f"-L{root}/lib", "-lc10"],
    ):
        subprocess.run(words, cwd=folder, check=True)


def install(folder: Path) -> None:
    """Make the device, for the rest of the process.

    Args:
        folder: Where its libraries are built.
    """
    assert "torch" not in sys.modules, "the device comes before the first import of torch"
    _build(folder)
    ctypes.CDLL(str(folder / "interposed.so"), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    ctypes.CDLL(str(folder / "guard.so")).install()
    from tests.fakecuda import tensors

    tensors.enter()
