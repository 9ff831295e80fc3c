"""Launches of compiled kernels that do not ask Triton each time which one it is.

Triton binds, specialises and hashes all arguments at every launch, in Python. For a step of many
small launches, that is a good part of what the host has to do.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.language import (
    NVMMASharedLayout,
    bfloat16,
    float16,
    float32,
    int32,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

INT32 = 1 << 31


def remembered(kernel: Any) -> Any:
    """A decorator of `triton.jit` kernels: called as before, but constants by keyword and last.

    Of functions in a module, which have the name there that they are defined by: other processes
    find them by it.
    """
    return Launcher(kernel) if isinstance(kernel, JITFunction) else kernel  # else: interpreted


class Launcher:
    """Remembers what Triton compiled for which arguments. Compiling itself is left to Triton.

    The hooks and knobs that Triton minds at a launch are minded here too; only globals of the
    kernel that changed since it was compiled are no longer found out.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if _noted is None and (torch.compiler.is_compiling() or self._is_hooked()):
            settle(self.kernel)  # in vain if by torch.compile, which has asked for its key already
            self.kernel[grid](*args, **constants)
            return
        device = driver.active.get_current_device()
        modes = knobs.runtime.debug, knobs.compilation.instrumentation_mode
        key = (device, *modes, *map(specialization, args), *constants, *constants.values())
        compiled, values = self._compiled.get(key, (None, ()))
        if _noted is not None:
            name = self._name(args, constants)
            if compiled is None and name not in _noted:
                of_kernel = self.kernel.fn.__module__, self.kernel.fn.__name__
                _noted[name] = Wanted(*of_kernel, tuple(map(_stand_in, args)), constants)
            return
        if compiled is not None:
            stream = driver.active.get_current_stream(device)
            metadata = compiled.function, compiled.packed_metadata
            compiled.run(*(*grid, 1, 1)[:3], stream, *metadata, *NO_HOOKS, *args, *values)
            return
        params = self.kernel.params
        assert [x.is_constexpr for x in params] == [i >= len(args) for i in range(len(params))]
        settle(self.kernel)
        compiled = self.kernel[grid](*args, **constants)
        self._compiled[key] = compiled, tuple(constants[x.name] for x in params[len(args) :])

    def _name(self, args: tuple[Any, ...], constants: dict[str, Any]) -> str:
        """Of what Triton compiles for these, the same in all processes: without what it is told not
        to specialise for, such as numbers of rows."""
        kinds: list[object] = []
        for param, x in zip(self.kernel.params, args, strict=False):
            any_value = param.do_not_specialize
            any_alignment = any_value or param.do_not_specialize_on_alignment
            kind: Any = specialization(x)
            if isinstance(x, Tensor):
                kind = kind[:1] if any_alignment else kind
            elif type(x) is int:
                kind = None if any_value else kind[0], None if any_alignment else kind[1], *kind[2:]
            kinds.append(kind)
        function = self.kernel.fn
        return f"{function.__module__}.{function.__qualname__} {kinds} {constants}"

    def _is_hooked(self) -> bool:
        """Whether someone wants to see each launch, or to change how kernels are compiled."""
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return bool(
            any(getattr(hook, "calls", hook) for hook in hooks)
            or self.kernel.pre_run_hooks
            or knobs.runtime.add_stages_inspection_hook
        )


def settle(function: JITCallable, above: tuple[JITCallable, ...] = ()) -> None:
    """Has it known to Triton's cache by the same key in all processes, if it had no key before.

    A key tells of the globals that a function's callees use, but only of those callees whose own
    keys are known when they are first met: left to Triton, it depends on what was compiled before.
    Callees are those it has by name. above: what is being settled, since calls may go in circles.
    """
    if function.hash is None and function not in above:
        scope, code = function.get_capture_scope(), function.fn.__code__
        for name in code.co_names + code.co_freevars:
            if isinstance(scope.get(name), JITCallable):
                settle(scope[name], (*above, function))
        _ = function.cache_key


@dataclass(frozen=True)
class Wanted:
    """A kernel that would be compiled, for arguments such as these: another process may do it."""

    module: str
    name: str
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def compile(self) -> None:
        """So that others find it in Triton's cache."""
        kernel = getattr(import_module(self.module), self.name).kernel
        settle(kernel)
        kernel.warmup(*self.args, grid=(1,), **self.constants)


_noted: dict[str, Wanted] | None = None


def not_compiled(run: Callable[[], None]) -> list[Wanted]:
    """The kernels that `run` would launch, and are not compiled yet. In an order that is the same
    in all processes, if they launch the same. Nothing is launched (but interpreted kernels): what
    kernels would write is left as it is, and `run` must not mind."""
    global _noted
    assert _noted is None
    _noted = {}
    try:
        run()
        return [_noted[name] for name in sorted(_noted)]
    finally:
        _noted = None


@dataclass(frozen=True)
class StandIn:
    """In place of a tensor, for a process that has no GPU: what Triton asks of it to compile."""

    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


def _stand_in(x: Any) -> Any:
    if isinstance(x, Tensor):
        return StandIn(x.dtype, x.data_ptr() % 16)
    if isinstance(x, TensorDescriptor | GluonDescriptor):
        x = copy(x)
        x.base = _stand_in(x.base)
    return tuple(map(_stand_in, x)) if type(x) is tuple else x


NO_HOOKS = None, None, None  # metadata for those around a launch, and they


def specialization(x: Any) -> object:
    """Different for arguments that Triton would compile different kernels for."""
    kind = type(x)
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if kind is int:
        return x == 1, x % 16 == 0, -INT32 <= x < INT32, x < INT32 << 32
    if kind is float:
        return kind
    if isinstance(x, TensorDescriptor | GluonDescriptor):
        return kind, x.base.dtype, tuple(x.block_shape)
    if kind is tuple:
        return tuple(map(specialization, x))
    if kind is StandIn:
        return x.dtype, x.address == 0
    return x


class Rows(TensorDescriptor):  # type: ignore[misc]
    """Blocks of rows of one head, out of x [T, H, D] as [T, H * D].

    Rows must be packed and aligned to 16 bytes. What Triton's own class would check at each launch
    is known of these.
    """

    def __init__(self, x: Tensor, block: int) -> None:
        _describe(self, x, block)


class SharedRows(GluonDescriptor):  # type: ignore[misc]
    """The same, for kernels that say where blocks lie in shared memory."""

    def __init__(self, x: Tensor, block: int) -> None:
        _describe(self, x, block)
        self.layout = _shared_layout(block, x.shape[2], x.dtype)


def _describe(descriptor: Rows | SharedRows, x: Tensor, block: int) -> None:
    rows, heads, dim = x.shape
    descriptor.base, descriptor.block_shape = x, [block, dim]
    descriptor.shape, descriptor.strides = [rows, heads * dim], [x.stride(0), 1]
    descriptor.padding, descriptor.round_f32_to_tf32 = "zero", False


ELEMENTS = {
    torch.bfloat16: bfloat16,
    torch.float16: float16,
    torch.float32: float32,
    torch.int32: int32,
}


@cache
def _shared_layout(block: int, dim: int, dtype: torch.dtype) -> NVMMASharedLayout:
    return NVMMASharedLayout.get_default_for([block, dim], ELEMENTS[dtype])


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
