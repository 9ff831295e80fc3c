"""Attention whose backward goes on through a projection's SiLU: the gradients of two backwards."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.attention import hstu_attention
from kernels.columns import after
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.projection import GradientBuffer, Projected, silu_linear
from kernels.scratch import limit_scratch, scratch_limit
from kernels.triton import configs, launch, projected, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (70, 0, 1, 65)
HEADS, WIDTH = 2, 24


@pytest.fixture(autouse=True)
def kept_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    block, square = configs.Blocks(16, 16, 4, 1), configs.Blocks(64, 64, 4, 1)
    kept = configs.Kept(configs.Blocks(32, 64, 4, 1), square, square)
    monkeypatch.setitem(configs.SINGLE, 64, configs.Config(32, 16, *[block] * 4, kept))
    monkeypatch.setattr(tiles, "LEAST", 2)


@pytest.fixture
def went_through(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each backward of attention that was asked to: whether it did."""
    done: list[bool] = []
    gradients = launch.gradients

    def watched(*args: object, **options: object) -> bool:
        through = gradients(*args, **options)  # type: ignore[arg-type]
        if "through" in options:
            done.append(through)
        return through

    monkeypatch.setattr(projected.launch, "gradients", watched)
    return done


def branch(
    used: str = "", mask: Callable[..., Tensor] = hstu_intervals, dims: tuple[int, int] = (32, 64)
) -> Callable[[bool], list[Tensor]]:
    """A projection, attention, and U times it: gradients of x, weight and bias, told where q, k and
    v come from or not. used: of which parts something else makes use as well."""
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    rows = Jagged.whole(lengths, sum(LENGTHS), max(LENGTHS))
    intervals = mask(rows, lengths, lengths // 20)
    splits = [HEADS * d for d in (dims[1], dims[1], dims[0], dims[0])]
    x = torch.randn(sum(LENGTHS), WIDTH, device=DEVICE, requires_grad=True)
    weight = torch.randn(sum(splits), WIDTH, device=DEVICE, requires_grad=True)
    bias = torch.randn(sum(splits[1:]), device=DEVICE, requires_grad=True)
    dout = torch.randn(sum(LENGTHS), splits[0], device=DEVICE)

    def run(told: bool) -> list[Tensor]:
        gradient = GradientBuffer()
        u, v, q, k = silu_linear(x, weight, bias, splits, gradient=gradient, backend="triton")
        where = Projected(after(u.detach(), bias.numel()), bias, gradient) if told else None
        out = hstu_attention(
            *(y.unflatten(1, (HEADS, -1)) for y in (q, k, v)),
            queries=rows,
            keys=rows,
            intervals=intervals,
            alpha=0.3,
            scale=0.1,
            projected=where,
            backend="triton",
        ).flatten(1)
        more = sum(y.square().sum() for name, y in dict(u=u, v=v, q=q, k=k).items() if name in used)
        loss = (out * u * dout).sum() + more
        twice = [torch.autograd.grad(loss, (x, weight, bias), retain_graph=True) for _ in range(2)]
        for one, other in zip(*twice, strict=True):  # nothing is left behind
            assert torch.equal(one, other)
        return [*twice[0]]

    return run


def check(run: Callable[[bool], list[Tensor]]) -> None:
    for got, want in zip(run(True), run(False), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("used", ["", "u", "v", "qk", "uvqk"])
def test_whoever_else_uses_the_parts(used: str, went_through: list[bool]) -> None:
    check(branch(used))
    assert went_through == [True, True]


def test_tiles_in_segments_and_one_head_at_a_time(went_through: list[bool]) -> None:
    run = branch(mask=lambda *x: semi_local_intervals(*x, local=20, prefix=7))
    before = scratch_limit()
    try:
        limit_scratch((sum(LENGTHS) // 64 + len(LENGTHS)) * 3 * 64 * 64 * 4)
        check(run)
    finally:
        limit_scratch(before)
    assert went_through == [True, True]


def test_slopes_have_no_room_in_the_backward(
    went_through: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = branch()
    monkeypatch.setattr(projected, "goes_through", lambda *_: True)
    before = scratch_limit()
    try:
        limit_scratch(0)
        check(run)
    finally:
        limit_scratch(before)
    assert went_through == [False, False]


@pytest.mark.parametrize("dims", [(32, 48), (24, 32)])
def test_padded_heads_go_their_own_way(dims: tuple[int, int], went_through: list[bool]) -> None:
    check(branch(dims=dims))
    assert not went_through
