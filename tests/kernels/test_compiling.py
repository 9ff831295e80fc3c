"""The shipped blocks compile for every generation of GPUs, and fit into its multiprocessors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Capability -> KiB that a block may take. 8.6 has the least, with 8.9 and 12.0.
SHARED = {86: 99, 90: 227, 100: 227}
TENSOR_MEMORY = 512  # columns


def test_all_fit() -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    compiling = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compiling", str(capability)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for capability in SHARED
    }
    written = {
        capability: process.communicate(timeout=500)[0] for capability, process in compiling.items()
    }
    for capability, kernels in written.items():
        assert compiling[capability].returncode == 0, f"sm_{capability}"
        assert len(kernels.splitlines()) == (19 if capability == 90 else 16)
        for kernel in kernels.splitlines():
            *_, shared, columns, warnings = kernel.split(" ")
            assert not warnings, f"sm_{capability}: {kernel}"
            assert int(shared) <= SHARED[capability] * 1024, f"sm_{capability}: {kernel}"
            assert int(columns) <= TENSOR_MEMORY, f"sm_{capability}: {kernel}"
