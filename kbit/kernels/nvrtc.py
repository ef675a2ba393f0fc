"""CUDA C++ to something that can be launched, with what torch brings along: NVRTC and the driver, no CUDA toolkit.

By ctypes, and not NVIDIA's ``cuda.core``: on an H200 a process has its first launch 0.02 s after it needs one; with
cuda.core 1.2 it has it after 0.14 s, 0.12 of them for the import. A launch from Python then takes 14 to 20 us, not
5, which a CUDA graph hides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kbit.errors import CudaError

_MOST_STATIC_SHARED: Final = 48 * 1024
_FUNCTION_MAX_DYNAMIC_SHARED: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_LAUNCH: Final = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def compile_cubin(
    source: str, options: Sequence[str], capability: tuple[int, int], headers: Mapping[str, str] | None = None
) -> bytes:
    """Return machine code of CUDA C++ for a compute capability; headers are those that it includes, by name.

    Raises:
        CudaError: NVRTC isn't there, or refuses the source; with its log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    headers = headers or {}
    names, texts = (
        (ctypes.c_char_p * len(headers))(*[h.encode() for h in some]) for some in (headers, headers.values())
    )
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kbit.cu", len(headers), texts, names)
    )
    # The architecture's own instructions are the "a" targets from Hopper on.
    target = f"sm_{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")
    arguments = [f"--gpu-architecture={target}", "--std=c++17", *options]
    array = (ctypes.c_char_p * len(arguments))(*[a.encode() for a in arguments])
    size = ctypes.c_size_t()
    if nvrtc.nvrtcCompileProgram(program, len(arguments), array):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CudaError(f"a kernel can't be compiled for {target}: {log.value.decode(errors='replace')}")
    _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    cubin = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


class Function:
    """A compiled kernel, loaded on a device.

    Args:
        shared: bytes of shared memory that a launch asks for.
        device: index of the current device.
    """

    def __init__(self, cubin: bytes, name: str, shared: int, device: int) -> None:
        self._driver, self._shared, self._device = _driver(), shared, device
        self._enter_context()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        if shared > _MOST_STATIC_SHARED:
            self._check(self._driver.cuFuncSetAttribute(self._function, _FUNCTION_MAX_DYNAMIC_SHARED, shared))

    def launch(self, grid: int, threads: int, *arguments: Tensor | int | float | None, overlap: bool = False) -> None:
        """Launch on torch's current stream.

        Args:
            grid: blocks of threads.
            threads: threads of a block.
            *arguments: tensors are passed as pointers, None as a null pointer, numbers as int32 and float32.
            overlap: the kernel may begin while the one before ends; it waits itself for what that one makes.
        """
        self._enter_context()
        values = [_argument(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values])
        attribute = _Attribute(id=_PROGRAMMATIC_LAUNCH)
        attribute.value[0] = 1
        config = _Config(
            *(grid, 1, 1, threads, 1, 1, self._shared),
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(overlap),
        )
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))

    def _enter_context(self) -> None:
        """Give a thread whose first work on a GPU this is torch's context, the primary one: it has none yet."""
        context = ctypes.c_void_p()
        self._check(self._driver.cuCtxGetCurrent(ctypes.byref(context)))
        if not context.value:
            self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device))
            self._check(self._driver.cuCtxSetCurrent(context))

    def _check(self, code: int) -> None:
        if code:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(name))
            raise CudaError((name.value or b"unknown error").decode())


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> ctypes.CDLL:
    # torch has that of its own CUDA version loaded, or its wheel is next to it. Drivers may refuse a newer one's code.
    major = (torch.version.cuda or "").partition(".")[0]
    beside = sorted(Path(torch.__file__).parents[1].glob(f"nvidia/**/libnvrtc.so.{major}*"))
    for name in (f"libnvrtc.so.{major}", *(str(p) for p in beside if "builtins" not in p.name)):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("libnvrtc was not found: it comes with torch's CUDA build (nvidia-cuda-nvrtc)")


def _check_nvrtc(code: int) -> None:
    if code:
        raise CudaError(f"NVRTC failed with code {code}")
