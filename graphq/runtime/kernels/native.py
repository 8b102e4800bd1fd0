"""The library of kernels written in C++, where it was built: found once, called through ctypes, which releases the GIL.

``graphq`` is whole without it: an installation without a compiler has none, and every product has a path in torch.
"""

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

import torch

_ABI: Final = 4  # of the functions below
LEVELS: Final = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16")  # as in native/weight.h
OUT_OF_MEMORY: Final = "not enough memory"
NOT_BUILT: Final = "graphq's kernels were not built when it was installed (a C++ compiler does it)"


class Weight(Structure):
    """``Weight`` of native/weight.h."""

    _fields_ = (
        ("tiles", c_void_p),
        ("table", c_void_p),
        ("row_scale", c_void_p),
        ("bias", c_void_p),
        ("sums", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
        ("scale", c_int32),
        ("has_zero", c_int32),
        ("is_integer", c_int32),
    )


class Packing(Structure):
    """``Packing`` of native/library.cpp."""

    _fields_ = (
        ("weight", POINTER(Weight)),
        ("tiles", c_void_p),
        ("rows", c_void_p),
        ("row_bytes", c_int64),
        ("scale", c_void_p),
        ("zero", c_void_p),
    )


def _file() -> Path | None:
    here = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := here / f"_native{suffix}").is_file()), None)


def library() -> Any:
    """The library, whose threads are torch's; None where it was not built, or not from these sources (``absence``)."""
    return _loaded()[0]


def absence() -> str:
    """Why there is no library; "" where there is one."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[Any, str]:
    path = _file()
    if path is None:
        return None, NOT_BUILT
    try:
        found = ctypes.CDLL(str(path))
        abi = int(found.graphq_abi())
    except (OSError, AttributeError) as error:
        return None, f"graphq's kernels cannot be loaded: {error}"
    if abi != _ABI:
        return None, f"graphq's kernels were built from other sources (version {abi}, not {_ABI}): install graphq again"
    found.graphq_linear.argtypes = (
        POINTER(Weight), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32, c_int32, c_int64,
    )  # fmt: skip
    found.graphq_grouped.argtypes = (
        POINTER(Weight), c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32,
        c_int32, c_int32, c_int64,
    )  # fmt: skip
    found.graphq_quantize.argtypes = (
        c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32, c_int32, c_int64,
    )  # fmt: skip
    found.graphq_attention.argtypes = (c_void_p, c_int32, c_int64)
    found.graphq_steps.argtypes = (c_void_p, c_int64, c_void_p, c_int64, c_int64)
    found.graphq_tiles_size.restype = c_int64
    found.graphq_tiles_size.argtypes = (POINTER(Weight),)
    found.graphq_pack.argtypes = found.graphq_unpack.argtypes = (POINTER(Packing), c_int64)
    _share_threads(found)
    return found, ""


def _share_threads(found: Any) -> None:
    """Products run in the pool of threads that torch's OpenMP has; where it is another kind, in the calling thread."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL(str(torch_library))  # already loaded; its symbols include those it was linked with
        parts = [openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads]
    except (OSError, AttributeError):
        return
    found.graphq_use_openmp.argtypes = (c_void_p,) * 3
    found.graphq_use_openmp(*(ctypes.cast(part, c_void_p) for part in parts))


@cache
def levels() -> frozenset[str]:
    """The instruction sets for which the library has kernels and which this processor and system have."""
    found = library()
    mask = 0 if found is None else int(found.graphq_levels())
    return frozenset(name for bit, name in enumerate(LEVELS) if mask >> bit & 1)
