"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.world import World

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    if find_spec("triton") is not None:
        from tests.interpreter import hasten

        hasten()


@pytest.fixture(scope="session")
def _worlds() -> Iterator[dict[tuple[int, bool], World]]:
    worlds: dict[tuple[int, bool], World] = {}
    yield worlds
    for world in worlds.values():
        world.close()


@pytest.fixture
def run_in_world(_worlds: dict[tuple[int, bool], World]) -> Callable[..., list[Any]]:
    """run_in_world(size, function, *args): function in `size` processes; results by rank.

    They work on the CPU; gpus=True gives each a GPU.
    """

    def run(size: int, function: Callable[..., Any], *args: Any, gpus: bool = False) -> list[Any]:
        kind = size, gpus
        if kind not in _worlds or not _worlds[kind].alive:
            _worlds[kind] = World(*kind)
        return _worlds[kind].run(function, *args)

    return run
