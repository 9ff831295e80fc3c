"""Kernels are compiled before the first step, and nothing else is done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_train import warm_up
from gr_train.trainer import Trainer
from gr_train.warm_up import probes
from kernels.scratch import limit_scratch, scratch_limit
from parallel.exchange.ring import MESSAGE_BYTES
from tests.gr_train.test_trainer import small


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(1, 4096),
    max_length=st.sampled_from([1, 200, 512, 1000, 4096, 20_000, 131_072]),
    heads=st.integers(1, 20),
    dim=st.sampled_from([64, 128, 256]),
    scratch=st.sampled_from([0, 1 << 20, 1 << 28, 4 << 30]),
    data=st.data(),
)
def test_probes_are_of_every_kind(
    count: int, max_length: int, heads: int, dim: int, scratch: int, data: st.DataObject
) -> None:
    """Every kernel that some batch would want, one of the probes wants."""
    configs = pytest.importorskip("kernels.triton.configs")
    launch = pytest.importorskip("kernels.triton.launch")
    q = torch.empty(1, heads, dim, dtype=torch.bfloat16, device="meta")

    def kind(lengths: int, of: int, longest: int) -> tuple[object, ...]:
        rows = SimpleNamespace(num_rows=lengths, num_sequences=of, max_length=longest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(configs, "_is_hopper", lambda device: True)
            problem = lengths * heads, lengths // of, torch.bfloat16, torch.device("cuda")
            config = configs.config_for(dim, *problem)
        slopes = launch._Slopes.of(config.kept, q, SimpleNamespace(queries=rows, keys=rows))
        many = lengths * heads >= configs.MANY and lengths >= configs.MANY_EACH * of
        return id(config), slopes is not None, many

    before = scratch_limit()
    try:
        found = set()
        for probe in probes(count, max_length, heads=heads, scratch=scratch, message=1):
            limit_scratch(probe.scratch)
            x = probe.lengths
            found.add(kind(int(x.sum()), len(x), int(x.max())))
        limit_scratch(scratch)
        some = data.draw(st.integers(1, min(count, 32)) | st.integers(1, count))
        longest = data.draw(st.integers(1, max_length))
        low, high = longest + some - 1, some * longest
        between = min(max(low, 60_000 // heads), high)  # few rows and many
        lengths = data.draw(st.just(between) | st.integers(low, high))
        assert kind(lengths, some, longest) in found
    finally:
        limit_scratch(before)


@pytest.mark.parametrize("heads", [1, 5, 7, 20])
def test_a_ring_is_probed_between_few_rows_and_many(heads: int) -> None:
    """Powers of two may step over them."""
    configs = pytest.importorskip("kernels.triton.configs")
    found = probes(8, 16_384, heads=heads, scratch=0, message=1)
    sizes = [(int(x.lengths.sum()), len(x.lengths)) for x in found]
    long = [rows * heads for rows, of in sizes if rows >= configs.SHORT * of]
    assert any(configs.FEW <= rows < configs.MANY for rows in long)


def test_only_long_messages_go_in_pieces() -> None:
    for message in (MESSAGE_BYTES, MESSAGE_BYTES + 1):
        pieces = {x.pieces for x in probes(8, 4096, heads=4, scratch=0, message=message)}
        assert pieces == ({None} if message == MESSAGE_BYTES else {None, 2})


@settings(max_examples=200, deadline=None)
@given(
    dim=st.sampled_from([64, 128, 256]),
    heads=st.sampled_from([1, 2, 3, 8]),
    length=st.integers(1, 65_536),
    data=st.data(),
)
def test_pieces_of_probes_are_of_every_kind(
    dim: int, heads: int, length: int, data: st.DataObject
) -> None:
    configs = pytest.importorskip("kernels.triton.configs")
    row, longest = 4 * dim, 65_536
    most = 8 * MESSAGE_BYTES // (row * length)  # sequences, in 8 pieces
    some = data.draw(st.integers(MESSAGE_BYTES // (row * length) + 1, most + 1))

    def kinds(rows: int, of: int, pieces: int) -> set[tuple[object, ...]]:
        """Of launches on all rows, and on those of a piece, of one head."""
        found = set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(configs, "_is_hopper", lambda device: True)
            for n in (rows, rows // pieces):
                problem = n, n // of, torch.bfloat16, torch.device("cuda")
                many = n >= configs.MANY and n >= configs.MANY_EACH * of
                config = configs.config_for(dim, *problem)
                found.add((n == rows, config.forward, config.query, config.key, many))
        return found

    at_most = probes(some, longest, heads=heads, scratch=0, message=some * longest * row)
    found = set()
    for probe in at_most:
        if probe.pieces:
            found |= kinds(int(probe.lengths.sum()), len(probe.lengths), probe.pieces)
    rows = some * length
    assert kinds(rows, some, -(-rows * row // MESSAGE_BYTES)) <= found


def _trained(warm: bool, run_dir: str, options: list[str]) -> list[Any]:
    always = ["train.steps=2", "model.dropout=0.1", "parallel.cp=2", "parallel.keep_whole=true"]
    trainer = Trainer(small(Path(run_dir), *always, *options, world_size=2))
    if warm:
        with patch.object(warm_up, "MESSAGE_BYTES", 1):  # so that there are pieces, too
            trainer.compile_ahead()
        assert all(p.grad is None for p in trainer.parameters)
        assert scratch_limit() == 1 << 29
    trainer.fit()
    return [p.detach().clone() for p in trainer.parameters]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["model.task=ranking", "model.mask.window=9", "data.synthetic.contextual_sizes=[4, 4]"],
    ],
)
def test_training_is_as_without(run_in_world: Any, tmp_path: Path, options: list[str]) -> None:
    cold, warm = (
        run_in_world(2, _trained, warm, str(tmp_path / str(warm)), options)
        for warm in (False, True)
    )
    for mine, other in zip(warm, cold, strict=True):
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def _compiled(run_dir: str, options: list[str]) -> list[list[str]]:
    """What is compiled ahead, in the first step, and in all others."""
    from triton import knobs

    always = ["train.steps=30", "data.batch_size=4", "data.max_length=4096", "model.width=64"]
    lengths = ["data.synthetic.mean_events=400", "data.synthetic.max_events=4000"]
    config = small(Path(run_dir), *always, *lengths, "parallel.cp=1", *options, world_size=1)
    trainer, found = Trainer(config), [[]]
    step, evaluate = trainer.step, trainer.evaluate

    def counted_step(at: int, *args: Any) -> torch.Tensor:
        if at <= 2:
            found.append([])
        return step(at, *args)

    def uncounted_evaluation() -> dict[str, float]:
        knobs.runtime.jit_post_compile_hook = None
        return evaluate()

    trainer.step, trainer.evaluate = counted_step, uncounted_evaluation  # type: ignore[assignment]
    knobs.runtime.jit_post_compile_hook = lambda **kw: found[-1].append(kw["fn"].name)
    trainer.fit()
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU nothing is compiled")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_length_wants_another_kernel(run_in_world: Any, tmp_path: Path, dim: int) -> None:
    options = [f"model.qk_dim={dim}", f"model.v_dim={dim}", "model.dropout=0.1"]
    ((ahead, first, others),) = run_in_world(1, _compiled, str(tmp_path), options, gpus=True)
    assert ahead
    assert not {*ahead} & {*first}
    assert not others
