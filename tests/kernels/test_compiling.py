"""The shipped blocks compile for every generation of GPUs, and fit into its multiprocessors."""

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


@pytest.mark.parametrize(
    ("capability", "which", "count"),
    [
        *((86, "bfloat16", 6), (86, "float32", 9)),
        *((90, "bfloat16", 19), (90, "resident", 13)),
        *((100, "bfloat16", 6), (100, "float32", 6)),
    ],
)
def test_all_fit(capability: int, which: str, count: int, tmp_path: Path) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compiling", str(capability), which]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=500)
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == count
    for kernel in run.stdout.splitlines():
        *_, shared, columns, faults = kernel.split(" ", 5)
        assert faults == "[]", kernel
        assert int(shared) <= SHARED[capability] * 1024, kernel
        assert int(columns) <= TENSOR_MEMORY, kernel
