"""Worlds of processes that stay up between tests, so that each test pays no start-up."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240  # a test that takes longer hangs


def _serve(rank: int, size: int, gpus: bool, pipe: Connection) -> None:
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
    )
    torch.set_num_threads(1)
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = port
        try:
            result = function(*args)
            # The threads of a gloo group wake a hundred times a second: those of all tests together
            # would keep a small machine from anything else.
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
            pipe.send((result, None))
        except BaseException:
            pipe.send((None, f"rank {rank} of {size}:\n{traceback.format_exc()}"))


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class World:
    """`size` processes with the environment that torchrun gives.

    gpus: each has one; else they see none, even where there are some.
    """

    def __init__(self, size: int, gpus: bool) -> None:
        # The preloaded libraries touch the GPU where there is one, and its state cannot be forked.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["torch", "torchrec"])
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            # Not daemons: those may not start loader workers. They end when their pipe closes.
            process = context.Process(target=_serve, args=(rank, size, gpus, there))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) in every process; the results by rank. Raises what any of them raised."""
        port = _free_port()
        for pipe in self.pipes:
            pipe.send((port, function, args))
        results: dict[int, Any] = {}
        pending = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        while pending:
            ready = wait(list(pending), timeout=SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(pending.values())} hang in {function.__name__}")
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[index]
                try:
                    result, error = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    result, error = None, f"rank {rank} of {len(self.pipes)} has ended"
                if error is not None:
                    self.close()  # the others may be waiting for this one in a collective
                    raise AssertionError(error)
                results[rank] = result
        return [results[rank] for rank in range(len(self.pipes))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
