"""Attention whose backward goes on through a projection's SiLU: the gradients of two backwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from triton.runtime.interpreter import InterpreterBuilder

from kernels.attention import hstu_attention
from kernels.gated_norm import gated_norm
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.projection import GradientBuffer, Projected, silu_linear
from kernels.scratch import limit_scratch, scratch_limit
from kernels.triton import configs, launch, projected, tiles
from kernels.triton.target import Through

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (70, 0, 1)
ROWS = sum(LENGTHS)
HEADS, WIDTH = 2, 24
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def kept_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    block, square = configs.Blocks(16, 16, 4, 1), configs.Blocks(64, 64, 4, 1)
    kept = configs.Kept(configs.Blocks(32, 64, 4, 1), square, square)
    config = configs.Config(32, 16, *[block] * 4, kept)
    for table in (configs.SINGLE, configs.CONSERVATIVE):
        monkeypatch.setitem(table, 64, config)
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


class Branch:
    """The parts of a projection, and attention on them, told where they come from or not."""

    def __init__(
        self,
        told: bool,
        dims: tuple[int, int] = (32, 64),
        more: int = 0,
        mask: Callable[..., Tensor] = hstu_intervals,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """more: so many columns behind those that attention takes."""
        torch.manual_seed(0)
        self.told, self.mask = told, mask
        self.splits = [HEADS * d for d in (dims[1], dims[1], dims[0], dims[0])] + [more] * (
            more > 0
        )
        draw = partial(torch.randn, device=DEVICE)
        x, weight = draw(ROWS, WIDTH).to(dtype), draw(sum(self.splits), WIDTH)
        self.inputs = [x, weight, draw(sum(self.splits[1:]))]
        for y in self.inputs:
            y.requires_grad_()
        self.gradient = GradientBuffer()
        self.u, *self.vqk, self.before = silu_linear(
            *self.inputs, self.splits, gradient=self.gradient, backend="triton"
        )

    def attention(self, rows: slice = slice(None)) -> Tensor:
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
        if rows.stop is not None:
            lengths = torch.tensor([rows.stop], dtype=torch.int32, device=DEVICE)
        queries = Jagged.whole(lengths, int(lengths.sum()), int(lengths.max()))
        v, q, k = (y[rows].unflatten(1, (HEADS, -1)) for y in self.vqk[:3])
        where = Projected(self.before, self.inputs[2], self.gradient) if self.told else None
        return hstu_attention(
            q,
            k,
            v,
            queries=queries,
            keys=queries,
            intervals=self.mask(queries, lengths, lengths // 20),
            alpha=0.3,
            scale=0.1,
            projected=where,
            backend="triton" if self.told else "auto",
        ).flatten(1)

    def gradients(self, loss: Tensor, retain_graph: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.inputs, retain_graph=retain_graph))


def weigh(x: Tensor) -> Tensor:
    """A sum with weights of either sign."""
    return (x * torch.linspace(-1, 2, x.numel(), device=DEVICE).view_as(x)).sum()


def gated(branch: Branch) -> Tensor:
    """U is an affair of the gate, whose backward makes room for all gradients."""
    vectors = [torch.linspace(0.5, 1.5, branch.splits[0], device=DEVICE) for _ in range(3)]
    a, u, of = branch.attention(), branch.u, branch.gradient
    return weigh(gated_norm(a, u, *vectors, eps=1e-3, u_gradient=of, backend="triton"))


def gated_elsewhere(branch: Branch) -> Tensor:
    """The gate's backward comes after attention's."""
    vectors = [torch.linspace(0.5, 1.5, branch.splits[0], device=DEVICE) for _ in range(3)]
    other, u, of = torch.ones_like(branch.u), branch.u, branch.gradient
    gate = gated_norm(other, u, *vectors, eps=1e-3, u_gradient=of, backend="triton")
    return weigh(gate) + weigh(branch.attention())


def without_u(branch: Branch) -> Tensor:
    return weigh(branch.attention())


def twice(branch: Branch) -> Tensor:
    return gated(branch) + weigh(branch.attention() * branch.u)


def used_by_others(branch: Branch, names: str) -> Tensor:
    parts = dict(zip("vqk", branch.vqk, strict=True), u=branch.u)
    return gated(branch) + sum(parts[name].square().sum() for name in names)


def check(
    loss: Callable[[Branch], Tensor], dtype: torch.dtype = torch.float32, **of: object
) -> None:
    got, want = (
        branch.gradients(loss(branch))
        for branch in (Branch(told, dtype=dtype, **of) for told in (True, False))  # type: ignore[arg-type]
    )
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_go_through(dtype: torch.dtype, went_through: list[bool]) -> None:
    check(gated, dtype)
    assert went_through == [True]


@pytest.mark.parametrize("names", ["u", "v", "qk"])
def test_whoever_else_uses_the_parts(names: str, went_through: list[bool]) -> None:
    check(partial(used_by_others, names=names))
    assert went_through == [True]


@pytest.mark.parametrize("loss", [gated_elsewhere, without_u, twice])
def test_other_ways_through_the_graph(
    loss: Callable[[Branch], Tensor], went_through: list[bool]
) -> None:
    check(loss)
    assert all(went_through)
    assert len(went_through) == 1 + (loss is twice)


def test_nothing_is_left_of_another_backward(went_through: list[bool]) -> None:
    branch = Branch(told=True)
    loss = gated(branch)
    want = branch.gradients(loss, retain_graph=True)
    kept = torch.autograd.grad(loss, (branch.u, branch.before), retain_graph=True)
    copies = [x.clone() for x in kept]
    more = branch.gradients(branch.u.square().sum() + branch.vqk[0].sum(), retain_graph=True)
    plain = Branch(told=False)
    others = plain.gradients(plain.u.square().sum() + plain.vqk[0].sum())
    for one, other in zip(more, others, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(branch.gradients(loss), want, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(kept, copies, strict=True):
        assert torch.equal(one, other)
    assert went_through == [True] * 3


def test_tiles_in_segments_and_one_head_at_a_time(went_through: list[bool]) -> None:
    before = scratch_limit()
    try:
        limit_scratch((ROWS // 64 + len(LENGTHS)) * 2 * 64 * 64 * 4)
        check(gated, mask=lambda *x: semi_local_intervals(*x, local=20, prefix=7))
    finally:
        limit_scratch(before)
    assert went_through == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")
def test_sums_do_not_depend_on_who_is_done_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that a bias's gradient is added up from stay where they are."""
    monkeypatch.setitem(globals(), "LENGTHS", (700,))
    monkeypatch.setitem(globals(), "ROWS", 700)
    sums: list[Tensor] = []
    finish, set_grid_idx = Through.finish, InterpreterBuilder.set_grid_idx
    key_value_gradients = launch._key_value_gradients

    def finish_and_tell(through: Through) -> None:
        sums.append(through.sums)
        finish(through)

    def from_the_last(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        set_grid_idx(builder, builder.grid_dim[0] - 1 - x, y, z)

    def backwards(*args: object, **options: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "set_grid_idx", from_the_last)
            return key_value_gradients(*args, **options)

    monkeypatch.setattr(Through, "finish", finish_and_tell)
    branch = Branch(told=True, mask=lambda *x: semi_local_intervals(*x, local=20, prefix=7))
    loss = gated(branch)
    branch.gradients(loss, retain_graph=True)
    monkeypatch.setattr(launch, "_key_value_gradients", backwards)
    branch.gradients(loss)
    assert len(sums) == 6
    for one, other in zip(sums[:3], sums[3:], strict=True):
        assert torch.equal(one, other)


def test_slopes_have_no_room_in_the_backward(
    went_through: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected, "goes_through", lambda *_: True)
    before = scratch_limit()
    try:
        limit_scratch(0)
        check(gated)
    finally:
        limit_scratch(before)
    assert went_through == [False]


@pytest.mark.parametrize("dims", [(32, 48), (24, 32)])
def test_padded_heads_go_their_own_way(dims: tuple[int, int], went_through: list[bool]) -> None:
    check(gated, dims=dims)
    assert not went_through


def test_so_do_parts_that_are_not_all(went_through: list[bool]) -> None:
    """Of the rows, and of the columns."""
    check(lambda branch: weigh(branch.attention(slice(0, 66))))
    check(without_u, more=8)
    assert not went_through
