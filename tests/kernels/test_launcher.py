"""The launcher compiles where Triton would, and launches what Triton would."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton import launcher
from kernels.triton.launcher import NO_HOOKS, Launcher, Rows, SharedRows, specialization

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
EDGES = (0, 2**31, 2**63)


def arguments() -> Iterator[object]:
    """One, at least, of each kind that Triton tells apart, and of its neighbours."""
    yield from (None, True, False, 0.0, 1.0, 16.0, math.inf)
    for edge in EDGES:
        yield from range(edge - 33, edge + 34)
        yield from range(-edge, 34 - edge)
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64):
        pool = torch.zeros(64 * 64, dtype=dtype)
        yield from (pool[start:] for start in range(17))
        if dtype.is_floating_point:
            yield torch.nn.Parameter(pool)
            yield torch.nn.Parameter(pool[1:])
            for block in ([16], [1], [32]):
                yield TensorDescriptor(pool, [64], [1], block)
            for block in ([16, 16], [16, 32], [32, 16], [1, 1]):
                yield TensorDescriptor(pool, [64, 64], [64, 1], block)
            for block in (16, 32):
                yield Rows(pool.view(16, 4, 64), block)
                yield SharedRows(pool.view(16, 4, 64), block)
            yield (pool, 16)
            yield (pool[1:], 16)
            yield (pool, 17)


def test_what_triton_tells_apart_has_different_keys() -> None:
    by_key: dict[object, list[object]] = {}
    for x in arguments():
        flags = [(specialize, align) for specialize in (False, True) for align in (False, True)]
        stand_in = pickle.loads(pickle.dumps(launcher._stand_in(x)))
        by_triton, instead = (
            [native_specialize_impl(BACKEND, y, False, *of) for of in flags] for y in (x, stand_in)
        )
        assert by_key.setdefault(specialization(x), by_triton) == by_triton, x
        assert instead == by_triton, x


class Kernel:
    """A `triton.jit` kernel(x, n, SIZE, FLAG) that notes what it is called with."""

    hash = "settled"

    def __init__(self, notes: list[tuple[Any, ...]]) -> None:
        self.notes = notes
        self.pre_run_hooks: list[object] = []
        names = [("x", False), ("n", False), ("SIZE", True), ("FLAG", True)]
        self.fn = SimpleNamespace(__module__="kernels", __qualname__="kernel", __name__="kernel")
        self.params = [
            SimpleNamespace(
                name=name,
                is_constexpr=known,
                do_not_specialize=False,
                do_not_specialize_on_alignment=False,
            )
            for name, known in names
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: object, **constants: object) -> Compiled:
            self.notes.append(("compiled", grid, args, constants))
            return Compiled(self.notes)

        return run


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, notes: list[tuple[Any, ...]]) -> None:
        self.notes = notes

    def run(self, x: int, y: int, z: int, stream: int, *args: Any) -> None:
        of_kernel, args = args[:5], args[5:]
        assert of_kernel == (self.function, self.packed_metadata, *NO_HOOKS)
        self.notes.append(("launched", (x, y, z), args, stream))


def test_the_second_launch_does_not_ask_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    notes: list[tuple[Any, ...]] = []
    kernel = Kernel(notes)
    launch = Launcher(kernel)  # type: ignore[arg-type]
    x, other = torch.zeros(4), torch.ones(8)

    launch[(3,)](x, 5, FLAG=True, SIZE=64, num_warps=4)
    assert notes == [("compiled", (3,), (x, 5), dict(FLAG=True, SIZE=64, num_warps=4))]
    launch[(2, 6)](other, 7, FLAG=True, SIZE=64, num_warps=4)
    assert notes[1:] == [("launched", (2, 6, 1), (other, 7, 64, True), 7)]  # as in the signature

    def compiles(*args: object, **constants: object) -> bool:
        del notes[:]
        launch[(1,)](*args, **(dict(FLAG=True, SIZE=64, num_warps=4) | constants))
        return notes[0][0] == "compiled"

    assert compiles(x, 1)
    assert compiles(x.half(), 5)
    assert compiles(other[1:], 5)
    assert compiles(x, 5, SIZE=32)
    assert compiles(x, 5, num_warps=8)
    assert not compiles(x, 5, SIZE=32)
    active.get_current_device = lambda: 1
    assert compiles(x, 5)
    assert not compiles(x, 5)
    kernel.pre_run_hooks.append(print)  # Triton runs hooks only on its own path
    assert compiles(x, 5)
    kernel.pre_run_hooks.clear()
    assert not compiles(x, 5)
    runtime = launcher.knobs.runtime
    with monkeypatch.context() as patch:
        patch.setattr(runtime.launch_exit_hook, "calls", [print])
        assert compiles(x, 5)
    for hook, seen in ((print, True), (None, False)):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "launch_enter_hook", hook)
            assert compiles(x, 5) == seen


def test_what_is_not_compiled_is_noted_and_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    notes: list[tuple[Any, ...]] = []
    kernel, warm = Kernel(notes), list[tuple[Any, ...]]()
    kernel.warmup = lambda *args, **constants: warm.append((args, constants))  # type: ignore[attr-defined]
    launch, x = Launcher(kernel), torch.zeros(1000)  # type: ignore[arg-type]
    rows = Rows(x.half()[:768].view(4, 3, 64), 16)
    launch[(3,)](x, 5, SIZE=64, FLAG=True)
    of = [(x, 5), (x[1:], 5), (rows, 5), (x[2:], 5), (x, 16), (x[1:], 7)]

    def run() -> None:
        for args in of:
            launch[(2,)](*args, SIZE=64, FLAG=True)

    wanted = launcher.not_compiled(run)
    assert len(notes) == 1
    of_modules = SimpleNamespace(kernel=launch)
    monkeypatch.setattr(launcher, "import_module", {"kernels": of_modules}.__getitem__)
    for one in wanted:
        pickle.loads(pickle.dumps(one)).compile()
    assert len(warm) == 3  # for x[1:], for rows, and for 16
    kinds = [[*map(specialization, args)] for args in (of[1], of[2], of[4])]
    for args, constants in warm:
        kinds.remove([*map(specialization, args)])
        assert constants == dict(grid=(1,), SIZE=64, FLAG=True)

    def noted() -> list[list[object]]:
        return [[*map(specialization, one.args)] for one in launcher.not_compiled(run)]

    first = noted()
    of.reverse()
    assert noted() == first  # as another process, which has other rows, must find it
    kernel.params[1].do_not_specialize = True  # 5 and 16 are alike
    kernel.params[0].do_not_specialize_on_alignment = True  # x and x[1:], too
    assert len(noted()) == 2
    run()
    assert sum(note[0] == "compiled" for note in notes[1:]) == 3


def test_constants_come_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    """By position, they would be taken for numbers that a kernel is not compiled for."""
    active = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    launch = Launcher(Kernel([]))  # type: ignore[arg-type]
    for args, constants in (((1, 2, 3), dict(FLAG=True)), ((1,), dict(n=1, SIZE=1, FLAG=True))):
        with pytest.raises(AssertionError):
            launch[(1,)](*args, **constants)
