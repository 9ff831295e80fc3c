"""Runs Gluon kernels on a CPU, which Triton's interpreter does not: their own functions, as Python.

Warps that do different things are threads, of which one runs, until it waits. Copies into shared
memory and products of matrices happen as late as waits allow, on operands as they are by then, and
a buffer is full of NaN from the moment its next copy is asked for: who waits too little, or gives a
buffer away too early, finds the wrong numbers. Reads and writes out of bounds of a tensor's memory
raise IndexError; waits that nothing ends raise TimeoutError.

A thread stands for a whole warpgroup, and nothing is known of layouts, of fences between proxies or
of registers: what a compiler makes of a kernel is for `compiling.py`, and for a GPU.
"""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.triton import resident
from kernels.triton.launcher import SharedRows

# What kernels import by name.
GLUON = {
    *("warpgroup_mma", "warpgroup_mma_wait"),
    *("fence_async_shared", "async_add_shared_to_global", "piece_of"),
}
PATIENCE = 20  # seconds
NAN = float("nan")


class Value(Tensor):
    """A number, or a block of them, in registers."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Any:  # type: ignore[override]
        return self.long() & 0xFFFFFFFF if dtype == "uint32" else super().to(dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Tensor's, with less around it
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if type(result) is Tensor else result

    # A name gets another value: who has the old one keeps it.
    def __iadd__(self, other: Any) -> Value:  # type: ignore[misc, override]
        return self + other

    def __itruediv__(self, other: Any) -> Value:  # type: ignore[misc, override]
        return self / other


def value(x: Any) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    """Into the memory of a tensor: one address, or a block of them."""

    def __init__(self, memory: Tensor, at: Any) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    @staticmethod
    def to(x: Tensor) -> Pointer:
        length = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        return Pointer(x.detach().as_strided((length,), (1,)), value(0))

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)

    def addresses(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Those meant, and which of them are."""
        at, meant = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask))
        if bool(((at < 0) | (at >= len(self.memory)))[meant].any()):
            raise IndexError(f"out of bounds of {len(self.memory)}: {at[meant].aminmax()}")
        return at.long(), meant


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes have come."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.count, self.phase, self.waiting = gpu, 0, 0, 0
        self.arrived, self.expected = 0, 0  # and bytes
        self.copies: list[Callable[[], int]] = []

    def arrive(self, count: int) -> None:
        with self.gpu.changed:
            self.arrived += count
            assert self.arrived <= self.count
            if not self.copies:
                self._end()
            self.gpu.changed.notify_all()
            if self.waiting or self.gpu.running > 1:  # all others who can go first
                self.gpu.changed.wait(1e-3)

    def _end(self) -> bool:
        """The phase, if it is over, whether or not anybody waits for that."""
        over = self.arrived == self.count and self.expected == 0
        if over:
            self.arrived, self.phase = 0, self.phase ^ 1
        return over

    def wait(self, parity: Any) -> None:
        with self.gpu.changed:
            self.waiting += 1
            self.gpu.running -= 1
            while self.phase == int(parity):
                while self.copies:
                    self.expected -= self.copies.pop()()
                if self._end():
                    self.gpu.changed.notify_all()
                elif self.gpu.failure or not self.gpu.changed.wait(PATIENCE):
                    raise TimeoutError("a barrier waits for ever")
            self.waiting -= 1
            self.gpu.running += 1


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, x: Any) -> None:
        self.x = x

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype  # type: ignore[no-any-return]

    layout = None

    def index(self, i: Any) -> Any:
        return self.x[int(i)] if isinstance(self.x, list) else Shared(self.x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.x.view(-1).view(dtype)[: math.prod(shape)].view(shape))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order))

    def load(self, layout: Any) -> Value:
        return self.x.clone().as_subclass(Value)  # type: ignore[no-any-return]

    def store(self, x: Tensor) -> None:
        self.x.copy_(x)


class Product:
    """Of matrices, being computed."""

    def __init__(self, a: Any, b: Shared, acc: Tensor) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.result: Value | None = None

    def compute(self) -> None:
        a = self.a.x if isinstance(self.a, Shared) else self.a
        self.result = (self.acc + a.float() @ self.b.x.float()).as_subclass(Value)


class Gpu:
    """What Gluon offers to kernels, as far as ours use it."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.failure: BaseException | None = None
        self.running = 0  # threads that need not wait
        self.changed = threading.Condition()
        self.local = threading.local()

    def run(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        program = self.plain(kernel.kernel.fn)
        self.start([(program, args, constants)] * self.programs)

    def start(self, calls: list[tuple[Callable[..., None], Any, dict[str, Any]]]) -> None:
        """Side by side; raises what the first to fail raised."""

        def call(function: Callable[..., None], args: Any, constants: Any) -> None:
            self.local.products, self.local.stores = [], []
            with self.changed:
                try:
                    function(*args, **constants)
                    assert not self.local.products, "products nobody waited for"
                    assert not self.local.stores, "copies nobody waited for"
                except BaseException as error:
                    self.failure = self.failure or error
                done.append(function)
                self.running -= 1
                self.changed.notify_all()

        done: list[Callable[..., None]] = []
        with self.changed:
            self.running += len(calls)
            for x in calls:
                threading.Thread(target=call, args=x).start()
            while len(done) < len(calls):
                self.changed.wait()
        if self.failure is not None:
            raise self.failure

    def plain(self, function: Any) -> Any:
        """A kernel's function that Python can call; all that it calls, too."""
        names = {}
        for name, x in function.__globals__.items():
            if name in function.__code__.co_names:
                names[name] = self.replaced(name, x)
        names["__builtins__"] = __builtins__
        code, defaults = function.__code__, function.__defaults__
        return types.FunctionType(code, names, function.__name__, defaults)

    def replaced(self, name: str, x: Any) -> Any:
        if name in ("gl", "tl", "mbarrier", "tma"):
            return self
        if name in GLUON:
            return getattr(self, name)
        if hasattr(x, "fn"):  # triton.jit's and gluon.jit's
            return self.plain(x.fn)
        if hasattr(x, "__triton_builtin__") or not hasattr(x, "value"):
            return x
        return x.value  # a constexpr

    # Programs, and warps of one.

    def num_programs(self, axis: int) -> Value:
        return value(self.programs)

    def num_warps(self) -> int:
        return 4

    def warp_specialize(self, parts: Any, warps: Any, registers: Any) -> None:
        self.running -= 1
        self.start([(function, args, {}) for function, args in parts])
        self.running += 1

    # Numbers.

    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    float32 = torch.float32
    float16, bfloat16 = torch.float16, torch.bfloat16
    uint32 = "uint32"
    static_range, constexpr, tuple = range, None, tuple
    static_assert = staticmethod(lambda holds: None if holds else 1 / 0)
    maximum = staticmethod(lambda a, b: torch.maximum(value(a), value(b)))
    minimum = staticmethod(lambda a, b: torch.minimum(value(a), value(b)))
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis, dtype=x.dtype))

    def where(self, x: Any, a: Any, b: Any) -> Any:
        if isinstance(a, Pointer):
            return a if x else b
        return value(torch.where(torch.as_tensor(x), a, b))

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: list[int], x: Any, dtype: torch.dtype, layout: Any) -> Value:
        return value(torch.full(shape, x, dtype=dtype))

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Value:
        return self.full(shape, 0, dtype, layout)

    def zeros_like(self, x: Tensor) -> Value:
        return value(torch.zeros_like(x))

    def inline_asm_elementwise(self, asm: str, *args: Any, **kwargs: Any) -> Value:
        assert asm.startswith("tanh")
        return value(torch.tanh(args[1][0]))

    def layout(self, *args: Any, **kwargs: Any) -> None:
        return None

    BlockedLayout = SliceLayout = DotOperandLayout = layout
    NVMMADistributedLayout = SwizzledSharedLayout = layout
    NVMMASharedLayout = types.SimpleNamespace(get_default_for=lambda *x: None)
    MBarrierLayout = staticmethod(lambda: Barrier)
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)

    # Memory.

    def load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Value:
        at, meant = pointer.addresses(mask)
        found = torch.full(at.shape, other, dtype=pointer.memory.dtype)
        found[meant] = pointer.memory[at[meant]]
        return found.as_subclass(Value)

    def store(self, pointer: Pointer, x: Any, mask: Any = True) -> None:
        at, meant = pointer.addresses(mask)
        x = torch.as_tensor(x, dtype=pointer.memory.dtype).expand(at.shape)
        pointer.memory[at[meant]] = x.as_subclass(Tensor)[meant]

    def atomic_add(self, pointer: Pointer, x: int, sem: str = "acq_rel") -> Value:
        with self.changed:
            before = self.load(pointer)
            self.store(pointer, before + x)
            return before

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        if layout is Barrier:
            return Shared([Barrier(self) for _ in range(shape[0])])
        return Shared(torch.full(shape, NAN if dtype.is_floating_point else -7, dtype=dtype))

    # Copies, barriers, products.

    def debug_barrier(self) -> None: ...

    def fence_async_shared(self) -> None: ...

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(self, barrier: Barrier, parity: Any, pred: Any = True) -> None:
        if pred:
            barrier.wait(parity)

    def arrive(self, barrier: Barrier, count: int, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        with self.changed:
            barrier.expected += nbytes
            barrier.arrive(1)

    def async_copy_global_to_shared(
        self, desc: Descriptor, at: list[Any], barrier: Barrier, result: Shared
    ) -> None:
        row, column = map(int, at)
        result.x.fill_(NAN if result.x.is_floating_point() else -7)
        with self.changed:
            barrier.copies.append(lambda: desc.copy(row, column, result.x))
            self.changed.notify_all()

    def piece_of(self, block: Shared, desc: Descriptor, piece: Any, part: int) -> Shared:
        """Memory here is not swizzled."""
        rows, columns = desc.block_type.shape
        return block.slice(int(piece) * rows, rows).slice(part * columns, columns, dim=1)

    def async_copy_shared_to_global(self, desc: Descriptor, at: list[Any], source: Shared) -> None:
        row, column = map(int, at)
        self.local.stores.append(lambda: desc.store(row, column, source.x))

    def async_add_shared_to_global(self, desc: Descriptor, at: list[Any], source: Shared) -> None:
        row, column = map(int, at)

        def add() -> None:
            with self.changed:
                desc.store(row, column, source.x + desc.copied(row, column, source.x))

        self.local.stores.append(add)

    def store_wait(self, pendings: int) -> None:
        assert pendings == 0
        while self.local.stores:
            self.local.stores.pop()()

    def warpgroup_mma(
        self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async
        product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        self.local.products.append(product)
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: list[Any]) -> Any:
        products = self.local.products
        while len(products) > outstanding:
            products.pop(0).compute()
        found = [x.result if isinstance(x, Product) else x for x in deps]
        assert all(x is not None for x in found), "used while it is being computed"
        return found[0] if len(found) == 1 else found


class Descriptor:
    """Blocks of rows of a matrix; what lies beyond it is 0."""

    def __init__(self, rows: SharedRows) -> None:
        self.matrix = rows.base.detach().as_strided(rows.shape, rows.strides)
        self.dtype, self.layout = rows.base.dtype, None
        shape = list(rows.block_shape)
        nbytes = shape[0] * shape[1] * rows.base.itemsize
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=nbytes)

    def copied(self, row: int, column: int, like: Tensor) -> Tensor:
        found = torch.empty_like(like)
        self.copy(row, column, found)
        return found

    def copy(self, row: int, column: int, into: Tensor) -> int:
        """Bytes that have come."""
        rows, columns = into.shape
        into.zero_()
        low, high = max(row, 0), min(row + rows, len(self.matrix))
        if low < high:
            part = self.matrix[low:high, column : column + columns]
            into[low - row : high - row, : part.shape[1]] = part
        return into.nbytes

    def store(self, row: int, column: int, x: Tensor) -> None:
        rows, columns = x.shape
        low, high = max(row, 0), min(row + rows, len(self.matrix))
        if low < high:
            self.matrix[low:high, column : column + columns] = x[low - row : high - row]


class Interpreted:
    """A kernel, launched as it is on a GPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            Gpu(grid[0]).run(self.kernel, tuple(map(_argument, args)), constants)

        return launch


KERNELS = "resident_forward_kernel", "resident_gradients_kernel", "resident_unordered_kernel"


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels of `resident` run here, by three programs each."""
    monkeypatch.setattr(resident, "multiprocessors", lambda device: 3)
    for name in KERNELS:
        monkeypatch.setattr(resident, name, Interpreted(getattr(resident, name)))


def _argument(x: Any) -> Any:
    if isinstance(x, SharedRows):
        return Descriptor(x)
    if isinstance(x, Tensor):
        return Pointer.to(x)
    return value(x) if isinstance(x, int) else x
