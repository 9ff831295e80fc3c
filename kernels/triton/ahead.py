"""Kernels compiled side by side before they are launched, and then found in Triton's cache.

By processes of their own, since most of compiling is Python, which threads take turns at. They need
no GPU, and come from one that has not used any: a process that has cannot be forked.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.triton.launcher import Wanted

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class Elsewhere:
    """What Triton asks of a driver to compile, for a GPU that need not be there."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_all(kernels: Sequence[Wanted], processes: int) -> None:
    """For the GPU in use, by up to so many processes. One that cannot be compiled is said on
    stderr, and left to its launch."""
    if not kernels:
        return
    told = pickle.dumps((driver.active.get_current_target(), kernels, processes))
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if subprocess.run(command, input=told, env=environment).returncode:
        logger.warning("kernels: some not compiled ahead, for what is said above")


def main() -> None:
    _end_with_parent()
    target, kernels, processes = pickle.load(sys.stdin.buffer)
    driver.set_active(Elsewhere(target))
    processes, forked = min(processes, len(kernels)), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, forked, _end_with_parent) as pool:
        sys.exit(not all([*pool.map(_compiles, kernels)]))


def _end_with_parent() -> None:
    """A job that is stopped, or killed, leaves no process behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _compiles(kernel: Wanted) -> bool:
    try:
        kernel.compile()
    except Exception:
        traceback.print_exc()
        return False
    return True
