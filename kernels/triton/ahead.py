"""Kernels compiled side by side before they are launched, and then found in Triton's cache.

By processes of their own, since most of compiling is Python, which threads take turns at. They need
no GPU, and come from one that has not used any: a process that has cannot be forked.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.triton.launcher import Wanted

logger = logging.getLogger(__name__)


class Elsewhere:
    """What Triton asks of a driver to compile, for a GPU that need not be there."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_all(kernels: Sequence[Wanted], processes: int) -> None:
    """For the GPU in use, by up to so many processes. What they fail to is left to the launch."""
    if not kernels:
        return
    told = pickle.dumps((driver.active.get_current_target(), kernels, processes))
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if subprocess.run(command, input=told, env=environment).returncode:
        logger.warning("kernels: some not compiled ahead, for what is said above")


def main() -> None:
    target, kernels, processes = pickle.load(sys.stdin.buffer)
    driver.set_active(Elsewhere(target))
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, len(kernels)), forked) as pool:
        for done in [pool.submit(kernel.compile) for kernel in kernels]:
            done.result()
