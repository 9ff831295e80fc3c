"""What a CUDA stream can be told that PyTorch has no call for: the driver's, by ctypes.

To write a number, to wait for one, and to copy rows that lie apart; none of them takes a kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_thread = threading.local()  # autograd calls the driver from a thread of its own


def write_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Once what is on the stream so far is done."""
    _call("cuStreamWriteValue32_v2", stream, stream.cuda_stream, address, value, 0)


def wait_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """What comes on the stream from now on waits until at least this is there."""
    flags = FLUSH if reorders_writes(stream.device) else 0
    _call("cuStreamWaitValue32_v2", stream, stream.cuda_stream, address, value, flags)


CAN_FLUSH_REMOTE_WRITES, FLUSH = 98, 1 << 30  # CU_DEVICE_ATTRIBUTE_..., CU_STREAM_WAIT_VALUE_...


@cache
def reorders_writes(device: torch.device) -> bool:
    """Whether what others write may be seen in another order. Over NVLink it is not; a device that
    may reorder it says that it can be told not to, by a stream's wait."""
    found = ctypes.c_int()
    _driver_function("cuDeviceGetAttribute")(
        ctypes.addressof(found), CAN_FLUSH_REMOTE_WRITES, device.index
    )
    return bool(found.value)


def _call(name: str, stream: torch.cuda.Stream, *args: int) -> None:
    """The driver's function of that name."""
    if not getattr(_thread, "has_context", False):
        torch.cuda.mem_get_info(stream.device)  # any call of the runtime gives a thread one
        _thread.has_context = True
    error = _driver_function(name)(*args)
    if error:
        raise RuntimeError(f"{name}: CUDA driver error {error}")


DRIVER_FUNCTIONS = {
    "cuStreamWriteValue32_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint],
    "cuStreamWaitValue32_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint],
    "cuMemcpy2DAsync_v2": [ctypes.c_void_p, ctypes.c_void_p],
    "cuDeviceGetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
}


@cache
def _driver_function(name: str) -> Callable[..., int]:
    function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    function.argtypes = DRIVER_FUNCTIONS[name]
    return function


class _Memcpy2D(ctypes.Structure):
    """The driver's CUDA_MEMCPY2D."""

    _fields_ = [
        (end + name, kind)
        for end in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE


def copy_rows(part: Tensor, to: Tensor, start: int, stream: torch.cuda.Stream) -> None:
    """A message's part, row behind row, into bytes `to` from `start` on, perhaps a peer's: one
    engine's copy."""
    assert start + part.nbytes <= to.numel(), "a message is larger than its inbox"
    if not part.numel():
        return
    rows = 1 if part.dim() == 1 else part.shape[0]
    width = part.nbytes // rows
    copy = _thread_copy()  # the driver has read it when the call returns
    copy.srcDevice, copy.dstDevice = part.data_ptr(), to.data_ptr() + start
    copy.srcPitch, copy.dstPitch = max(width, part.stride(0) * part.itemsize), width
    copy.WidthInBytes, copy.Height = width, rows
    _call("cuMemcpy2DAsync_v2", stream, ctypes.addressof(copy), stream.cuda_stream)


def _thread_copy() -> _Memcpy2D:
    """One for each thread: to make them costs more than to fill one in."""
    copy = getattr(_thread, "copy", None)
    if copy is None:
        copy = _Memcpy2D(srcMemoryType=DEVICE_MEMORY, dstMemoryType=DEVICE_MEMORY)
        _thread.copy = copy
    return copy
