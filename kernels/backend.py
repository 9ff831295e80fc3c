"""Which twin of a kernel runs: Triton or plain PyTorch. For the entries of this floor."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "naive", "triton")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_WIDTH = 8192  # a row lives in one program's registers


def takes_triton(backend: str, x: Tensor) -> bool:
    """Whether Triton runs on rows like those of x [rows, width].

    "auto" means Triton on an NVIDIA GPU from Ampere on; "triton" insists, and on a CPU means
    Triton's interpreter. Raises ValueError, naming `backend`, if it is unknown or cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "naive" or (backend == "auto" and not x.is_cuda):
        return False
    fits = x.dtype in TRITON_DTYPES and x.shape[1] <= TRITON_MAX_WIDTH
    can = fits and runs_triton(x.device)
    if backend == "triton" and not can:
        raise ValueError(
            f"backend: 'triton' cannot run on {x.dtype} rows of width {x.shape[1]} on {x.device}"
        )
    return can


def check_devices(**tensors: Tensor) -> None:
    """Raises ValueError, naming it, for a tensor that is not where the first one is."""
    first, *others = tensors
    device = tensors[first].device
    for name in others:
        if tensors[name].device != device:
            raise ValueError(f"{name}: on {tensors[name].device}, {first} is on {device}")


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """An NVIDIA GPU from Ampere on, or a CPU under Triton's interpreter, and Triton itself."""
    return _runs_triton(device)


@cache  # asked by every layer of every step
def _runs_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of products are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x run in: autocast's where it is on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in TRITON_DTYPES:
        return torch.get_autocast_dtype(device)
    return x.dtype
