"""The shipped blocks compile for every generation of GPUs, and fit into its multiprocessors; and
what one process compiles, others find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels import sass

# Capability -> KiB that a block may take. 8.6 has the least, with 8.9 and 12.0.
SHARED = {86: 99, 90: 227, 100: 227}
TENSOR_MEMORY = 512  # columns


def test_operands_set_on_one_path_are_found() -> None:
    program = """
        /*0000*/  @P0 BRA `(.L_x_1) ;
        /*0010*/  UIADD3.X UR8, UP0, UR4, URZ, URZ ;
        /*0020*/  USHF.R.U64 UR12, UR8, 0x4, UR9 ;
        /*0030*/  UMOV UR13, 0x40000040 ;
    .L_x_1:
        /*0040*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0050*/  @P1 BRA `(.L_x_1) ;
        /*0060*/  EXIT ;
    """
    assert len(sass.unset_in(program)) == 1
    assert not sass.unset_in(program.replace("@P0 BRA", "@P0 MOV R0,"))


def lines_of(module: str, *options: str, cache: Path) -> list[str]:
    """What it writes, as a process that compiles."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", f"tests.kernels.{module}", *options]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=500)
    assert run.returncode == 0
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    ("capability", "which", "count"),
    [
        *((86, "bfloat16", 6), (86, "float32", 9)),
        *((90, "bfloat16", 19), (90, "resident", 13)),
        *((100, "bfloat16", 6), (100, "float32", 6)),
    ],
)
def test_all_fit(capability: int, which: str, count: int, tmp_path: Path) -> None:
    kernels = lines_of("compiling", str(capability), which, cache=tmp_path)
    assert len(kernels) == count
    for kernel in kernels:
        *_, shared, columns, faults = kernel.split(" ", 5)
        assert faults == "[]", kernel
        assert int(shared) <= SHARED[capability] * 1024, kernel
        assert int(columns) <= TENSOR_MEMORY, kernel


def test_what_other_processes_compile_is_found(tmp_path: Path) -> None:
    found = lines_of("compiling", "90", "ahead", cache=tmp_path)
    assert "forward_kernel True" in found
    assert all(line.endswith(" True") for line in found)


def test_keys_do_not_depend_on_the_order_of_compiling(tmp_path: Path) -> None:
    kernels, reverse = (lines_of("keys", order, cache=tmp_path) for order in ("1", "-1"))
    assert len(kernels) > 20
    assert kernels == reverse[::-1]
    assert all(line.endswith(" []") for line in kernels)  # else in the order of their addresses
