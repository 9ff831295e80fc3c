"""Triton attention against the readable twins: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels.attention import hstu_attention
from kernels.blockwise import blockwise_backward, blockwise_forward
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.source import Arrival, Source
from kernels.triton import configs, launch, plan, runs, target, tiles, walk
from kernels.weighting import Weighting
from tests.kernels.cases import part_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (70, 0, 1, 33, 5)
TARGETS = (6, 0, 1, 0, 2)
LOOKS = 5  # that find nothing


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, of several blocks and segments, in a short sequence. dv has its own launch."""
    block = configs.Blocks(16, 16, 4, 1)
    monkeypatch.setattr(tiles, "LEAST", 1)
    monkeypatch.setitem(configs.SINGLE, 64, configs.Config(32, 16, block, block, block, block))


@dataclass
class Problem:
    """q, k, v, dout and the keyword arguments of attention."""

    tensors: list[Tensor]
    mask: dict

    def check(self, rtol: float = 1e-5) -> None:
        """Forward, adding forward and backward against float64 on the same inputs."""
        q, k, v, dout = self.tensors
        weighting = Weighting(**self.mask)
        keys, queries = Source((k, v), weighting), Source((q, dout), weighting)
        wide = [x.double() for x in self.tensors]
        want = blockwise_forward(*wide[:3], weighting)
        grads = blockwise_backward(wide[3], *wide[:3], weighting)
        # Into some of the heads of a wider tensor: the others stay as they are.
        wider = [
            F.pad(torch.zeros_like(x), (0, 0, 1, 0), value=7.0).float() for x in (want, *grads)
        ]
        out, dq, dk, dv = (x[:, 1:] for x in wider)
        assert launch.forward(q, keys, out=out) is out
        launch.query_gradient(dout, q, keys, out=dq)
        launch.key_value_gradients(k, v, queries, out=(dk, dv))
        for whole, expected in zip(wider, (want, *grads), strict=True):
            close(whole[:, 1:], expected, rtol)
            assert bool((whole[:, 0] == 7).all())

        # Onto what is there, in place or into another tensor.
        half = [torch.full_like(x, 0.5, dtype=torch.float32) for x in (want, *grads)]
        launch.forward(q, keys, add=half[0], out=half[0])
        launch.query_gradient(dout, q, keys, add=half[1], out=half[1])
        dk, dv = half[2].clone(), half[3].clone()
        launch.key_value_gradients(k, v, queries, add=(half[2], half[3]), out=(dk, dv))
        half[2:] = dk, dv
        for got, expected in zip(half, (want, *grads), strict=True):
            close(got - 0.5, expected, max(rtol, 1e-4))


def test_rows_that_are_one_are_laid_apart() -> None:
    """A gradient that is the same for all rows, expanded: descriptors have no row stride of 0."""
    for heads in (1, 2):
        same = torch.randn(1, heads, 32, device=DEVICE).expand(5, heads, 32)
        ready = target.ready(same)
        assert ready.stride() == (heads * 32, 32, 1)
        assert torch.equal(ready, same)


def close(got: Tensor, want: Tensor, rtol: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm()
    assert error <= rtol * want.norm(), f"relative error {error / want.norm():.1e}"


def tokens() -> tuple[Jagged, Tensor, Tensor]:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    targets = torch.tensor(TARGETS, dtype=torch.int32, device=DEVICE)
    return Jagged.whole(lengths), lengths, targets


def masks() -> dict[str, Tensor]:
    whole, lengths, targets = tokens()
    return {
        "causal": hstu_intervals(whole, lengths, torch.zeros_like(targets)),
        "contextual": hstu_intervals(whole, lengths, targets, num_contextual=3),
        "window": hstu_intervals(
            whole, lengths, targets, num_contextual=2, window=9, full_suffix=4
        ),
        "semi-local": semi_local_intervals(
            whole, lengths, targets, num_contextual=2, local=20, prefix=7
        ),
    }


def problem(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    *,
    heads: int = 1,
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (queries.num_rows, heads, dims[0]),
        (keys.num_rows, heads, dims[0]),
        (keys.num_rows, heads, dims[1]),
        (queries.num_rows, heads, dims[1]),
    ]
    tensors = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    mask = dict(queries=queries, keys=keys, intervals=intervals, alpha=0.3, scale=0.1)
    return Problem(tensors, mask)


@pytest.mark.parametrize("mask", ["causal", "contextual", "window", "semi-local"])
def test_masks(mask: str) -> None:
    whole, _, _ = tokens()
    problem(whole, whole, masks()[mask]).check()


@pytest.mark.parametrize("mask", ["contextual", "window", "semi-local"])
def test_zigzag_shards(mask: str) -> None:
    """Queries hold two ranges of each sequence; keys the other shard's, then two rows in three."""
    whole, lengths, _ = tokens()
    chunk = whole.positions * 4 // lengths[whole.sequence_ids()].clamp(min=1)
    outer = (chunk == 0) | (chunk == 3)
    intervals = masks()[mask]
    queries = part_of(whole, outer)
    problem(queries, part_of(whole, ~outer), intervals[outer]).check()
    problem(queries, part_of(whole, whole.positions % 3 > 0), intervals[outer]).check()


@triton.jit
def count_looks(counter_ptr, count):
    """In the place of `is_here`: rows come after so many looks."""
    return tl.atomic_add(counter_ptr, 1) - count >= 0


class Coming(Arrival):
    """Rows that a kernel finds when it looks, or that come while it runs, as `count_looks` has it,
    or later, or that it cannot look for."""

    def __init__(self, rows: tuple[Tensor, Tensor], when: str) -> None:
        self.rows, self.there, self.when = rows, [x.clone() for x in rows], when
        first = {"early": 3, "between": 3 - LOOKS}.get(when, -1000)
        self.counter = torch.tensor([first], dtype=torch.int32, device=DEVICE)
        if when not in ("early", "between"):
            for x in rows:
                x.fill_(torch.nan)

    def wait(self) -> None:
        self.counter.fill_(3)
        for x, there in zip(self.rows, self.there, strict=True):
            x.copy_(there)

    def signal(self) -> tuple[Tensor, int] | None:
        return None if self.when == "waited for" else (self.counter, 3)


@pytest.mark.parametrize(
    ("mask", "mine", "dims"),
    [
        ("semi-local", lambda at: at // 16 % 2 == 0, (32, 32)),
        ("contextual", lambda at: at < 40, (24, 40)),  # padded: kernels cannot look for them
    ],
)
def test_two_sources(
    mask: str,
    mine: Callable[[Tensor], Tensor],
    dims: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a rank of a ring has them: its own rows, and those that another sends."""
    when = ["early", "late", "waited for"]
    if DEVICE.type == "cpu":  # one program after the other, by kernels that are not compiled
        when.append("between")
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()[mask], heads=2, dims=dims)
    q, k, v, dout = case.tensors
    want = [blockwise_forward(q.double(), k.double(), v.double(), Weighting(**case.mask))]
    want += blockwise_backward(*(x.double() for x in (dout, q, k, v)), Weighting(**case.mask))
    keep = mine(whole.positions)
    parts = [(x, part_of(whole, x)) for x in (keep, ~keep)]
    own = parts[0][0]

    def weighting(asking: int, asked: int) -> Weighting:
        (rows, queries), (_, keys) = parts[asking], parts[asked]
        return Weighting(queries, keys, case.mask["intervals"][rows], 0.3, 0.1)

    of_keys, of_queries = ([weighting(0, 0), x] for x in (weighting(0, 1), weighting(1, 0)))

    def attend(when: str, shift: float) -> list[Tensor]:
        """And checks how many tiles were left after the first launch, and after the second."""
        left: list[int] = []
        launches = walk.Walk.launches

        def watched(*args: Any) -> Iterator[Any]:
            for programs, about in launches(*args):
                yield programs, about
                if about[2] is not None:
                    left.append(int(about[2].sum()))

        with monkeypatch.context() as patch:
            patch.setattr(walk.Walk, "launches", watched)
            if when == "between":
                patch.setattr(runs, "is_here", count_looks)
            results = attend_as_patched(when, shift)
        looked = dims == (32, 32) and when != "waited for"
        assert [x > 0 for x in left] == [when == "late", False] * 2 * looked
        return results

    def attend_as_patched(when: str, shift: float) -> list[Tensor]:
        def sources(x: Tensor, y: Tensor, weightings: list[Weighting]) -> list[Source]:
            here, coming = ((x[rows], y[rows]) for rows, _ in parts)
            arrival = Coming(coming, when)
            return [Source(here, weightings[0]), Source(coming, weightings[1], arrival)]

        room = [torch.empty_like(x[own]) for x in (dout, q, k, v)]
        add = [torch.full_like(x, shift) if shift else None for x in room]
        keys = sources(k, v, of_keys)
        launch.forward(q[own], *keys, add=add[0], out=room[0])
        keys = sources(k, v, of_keys)
        launch.query_gradient(dout[own], q[own], *keys, add=add[1], out=room[1])
        queries = sources(q, dout, of_queries)
        launch.key_value_gradients(k[own], v[own], *queries, out=(room[2], room[3]))
        return [room[0] - shift, room[1] - shift, *room[2:]]

    for shift in (0, 0.5) if dims == (32, 32) else (0,):
        results = [attend(x, shift) for x in when]
        for expected, *got in zip(want, *results, strict=True):
            close(got[0], expected[own], 1e-4)
            assert all(torch.equal(got[0], x) for x in got[1:])


def test_parts_of_several_blocks_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dk and dv, in segments."""
    block = configs.Blocks(16, 16, 4, 1)
    monkeypatch.setitem(configs.SINGLE, 64, configs.Config(64, 32, block, block, block))
    whole, _, _ = tokens()
    problem(whole, whole, masks()["semi-local"], heads=2).check()


def test_any_intervals() -> None:
    """What our masks never have: random ends, rows that see nothing, runs beyond a record."""
    whole, lengths, _ = tokens()
    generator = torch.Generator().manual_seed(1)
    ends = torch.rand(whole.num_rows, 4, generator=generator).sort(-1).values.to(DEVICE)
    intervals = (ends * (lengths[whole.sequence_ids()][:, None] + 1)).to(torch.int32)
    intervals[whole.positions % 5 == 2] = 0
    blocks = whole.positions // 16 % 2 == 0  # tiles that see the start of the sequence or do not
    intervals[blocks, 0], intervals[blocks, 1] = 0, intervals[blocks, 2]
    problem(whole, whole, intervals).check()


@pytest.mark.parametrize(
    ("dims", "heads", "dtype", "rtol"),
    [
        ((64, 32), 2, torch.float32, 1e-5),
        ((24, 40), 1, torch.float32, 1e-5),
        ((128, 64), 1, torch.float32, 1e-5),
        ((40, 256), 1, torch.float32, 1e-5),
        ((32, 32), 2, torch.float16, 3e-3),
        ((32, 32), 1, torch.bfloat16, 3e-3),
    ],
)
def test_dims_and_dtypes(
    dims: tuple[int, int], heads: int, dtype: torch.dtype, rtol: float
) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as if it were integers")
    whole, _, _ = tokens()
    problem(whole, whole, masks()["contextual"], heads=heads, dims=dims, dtype=dtype).check(rtol)


def test_rows_beyond_two_to_the_31() -> None:
    """Elements, from the first to the last row of each tensor. On a CPU only touched pages take
    memory."""
    lengths, targets = torch.tensor([[40, 9], [2, 0]], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    apart, heads, dim = 1 << 26, 2, 32
    buffer = torch.empty(whole.num_rows * apart, dtype=torch.float16, device=DEVICE)
    columns = [buffer[i * heads * dim :] for i in range(8)]
    wide = [x.as_strided((whole.num_rows, heads, dim), (apart, dim, 1)) for x in columns]
    small = torch.randn(4, whole.num_rows, heads, dim, device=DEVICE).half()
    for x, y in zip(wide, small, strict=False):
        x.copy_(y)
    q, k, v, dout, out, dq, dk, dv = wide
    weighting = Weighting(whole, whole, hstu_intervals(whole, lengths, targets), 0.3, 0.1)
    launch.forward(q, Source((k, v), weighting), out=out)
    launch.query_gradient(dout, q, Source((k, v), weighting), out=dq)
    launch.key_value_gradients(k, v, Source((q, dout), weighting), out=(dk, dv))
    q, k, v, dout = small.double()
    want = blockwise_forward(q, k, v, weighting), *blockwise_backward(dout, q, k, v, weighting)
    for x, y in zip((out, dq, dk, dv), want, strict=True):
        close(x, y, 1e-3)


def test_rows_of_a_wider_buffer() -> None:
    """q, k and v as slices of one projection: strided rows, no copy needed."""
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["causal"])
    wide = torch.cat(case.tensors[:3], -1)
    case.tensors[:3] = wide.split(32, -1)
    case.check()


def test_no_rows() -> None:
    whole, _, _ = tokens()
    none = part_of(whole, whole.positions < 0)
    intervals = masks()["causal"]
    problem(whole, none, intervals).check()
    problem(none, whole, intervals[:0]).check()


def test_autograd_compile_and_fake_tensors() -> None:
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["contextual"])
    *qkv, dout = (x.requires_grad_() for x in case.tensors)
    results = {}
    for backend in ("blockwise", "triton"):
        out = hstu_attention(*qkv, **case.mask, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out, qkv, dout)]
    for got, want in zip(results["triton"], results["blockwise"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    jagged = (whole.offsets, whole.positions, whole.offsets, whole.positions)
    arguments = (*qkv, *jagged, case.mask["intervals"], max(LENGTHS), 0.3, 0.1, False)
    torch.library.opcheck(
        torch.ops.gr_kernels.attention.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    torch.library.opcheck(
        torch.ops.gr_kernels.attention_backward.default,
        [x.detach() if isinstance(x, Tensor) else x for x in (dout, *arguments, *qkv)],
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(torch.ops.gr_kernels.attention, backend="aot_eager", fullgraph=True)
    out = compiled(*arguments)
    for got, want in zip(
        [out, *torch.autograd.grad(out, qkv, dout)], results["triton"], strict=True
    ):
        assert torch.equal(got, want)


def test_one_plan_serves_the_backward_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["causal"])
    *qkv, dout = (x.requires_grad_() for x in case.tensors)
    plans, build = [], plan.Plan.build

    def note(*args: Any) -> plan.Plan:
        plans.append(build(*args))
        return plans[-1]

    monkeypatch.setattr(plan.Plan, "build", note)
    attend = partial(hstu_attention, **case.mask, backend="triton")
    want = torch.autograd.grad(attend(*qkv), qkv, dout)
    got = torch.autograd.grad(checkpoint(attend, *qkv, use_reentrant=False), qkv, dout)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert len(plans) == 1


def test_a_changed_mask_is_planned_anew() -> None:
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["causal"].clone())
    case.check()
    case.mask["intervals"].copy_(masks()["window"])
    case.check()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()), "backend"),
        (lambda a: a.update(v=a["v"].repeat(1, 1, 9)), "backend"),
        (lambda a: a["queries"].positions.mul_(-1), "queries"),
        (lambda a: a["intervals"].add_(-1), "intervals"),
    ],
)
def test_errors_name_the_argument(change, name: str) -> None:
    if DEVICE.type == "cuda" and name != "backend":
        pytest.skip("values are not looked at on a GPU")
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["causal"])
    arguments = dict(zip("qkv", case.tensors, strict=False), **case.mask, backend="triton")
    change(arguments)
    with pytest.raises(ValueError, match=name):
        hstu_attention(**arguments)


def test_gradients_of_gradients_are_refused() -> None:
    whole, _, _ = tokens()
    case = problem(whole, whole, masks()["causal"])
    q, k, v = (x.detach().requires_grad_() for x in case.tensors[:3])
    out = hstu_attention(q, k, v, **case.mask, backend="triton")
    [dq] = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
