"""Blockwise attention against the naive reference, forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.blockwise
from kernels.attention import attention_forward, hstu_attention
from kernels.jagged import Jagged
from kernels.projection import GradientBuffer, Projected
from kernels.source import Source
from kernels.weighting import Weighting
from tests.kernels.cases import Case, cases, part_of


def inputs(rows: int, heads: int, dqk: int, dv: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(rows, heads, d, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for d in (dqk, dqk, dv, dv)
    ]


@given(case=cases(), heads=st.integers(1, 3), dqk=st.integers(1, 5), dv=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_blockwise_equals_naive(case: Case, heads: int, dqk: int, dv: int) -> None:
    whole = Jagged.whole(case.lengths)
    *qkv, dout = inputs(whole.num_rows, heads, dqk, dv)
    mask = dict(queries=whole, keys=whole, intervals=case.intervals(whole), alpha=0.7, scale=0.3)
    block, kernels.blockwise.BLOCK = kernels.blockwise.BLOCK, 8  # several tiles a sequence
    try:
        results = {}
        for backend in ("naive", "blockwise"):
            out = hstu_attention(*qkv, **mask, backend=backend)
            results[backend] = [out, *torch.autograd.grad(out, qkv, dout.detach())]
    finally:
        kernels.blockwise.BLOCK = block
    for got, want in zip(results["blockwise"], results["naive"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(case=cases(), parts=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_disjoint_key_sets_add_up(case: Case, parts: int) -> None:
    """What a ring relies on: the sum over parts of the keys is the whole."""
    whole = Jagged.whole(case.lengths)
    q, k, v, _ = (x.detach() for x in inputs(whole.num_rows, 2, 3, 3))
    mask = dict(queries=whole, intervals=case.intervals(whole), alpha=0.7, scale=0.3)
    want = attention_forward(q, Source((k, v), Weighting(keys=whole, **mask)))
    got = torch.zeros_like(want)
    for part in range(parts):
        keep = whole.positions % parts == part
        source = Source((k[keep], v[keep]), Weighting(keys=part_of(whole, keep), **mask))
        attention_forward(q, source, add=got, out=got)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_low_precision_inputs_accumulate_in_float32() -> None:
    lengths = torch.tensor([300], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    case = Case(lengths, torch.zeros_like(lengths), 0)
    q, k, v, _ = inputs(300, 2, 16, 16, torch.bfloat16)
    mask = dict(queries=whole, keys=whole, intervals=case.intervals(whole), alpha=0.25, scale=0.01)
    source = Source((k.detach(), v.detach()), Weighting(**mask))
    got = attention_forward(q.detach(), source)
    want = hstu_attention(q.double(), k.double(), v.double(), **mask, backend="naive")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "blockwise"])
def test_autocast_rounds_nothing(backend: str) -> None:
    whole = Jagged.whole(torch.tensor([50, 20], dtype=torch.int32))
    intervals = torch.tensor([[0, 50, 0, 0]] * 70).int()
    *qkv, dout = inputs(70, 2, 16, 16, torch.float32)
    mask = dict(queries=whole, keys=whole, intervals=intervals, alpha=0.25, scale=0.01)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = hstu_attention(*qkv, **mask, backend=backend)
        results.append([out, *torch.autograd.grad(out, qkv, dout.detach())])
    for plain, under in zip(*results, strict=True):
        assert torch.equal(plain, under)


POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5], dtype=torch.int32)
STRIDED = POSITIONS.repeat_interleave(2)[::2]


def projected(
    rows: int, width: int, bias: int | None = None, dtype: torch.dtype = torch.float64
) -> Projected:
    before = torch.zeros(rows, width, dtype=dtype)
    return Projected(before, before.new_zeros(bias or width), GradientBuffer())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a: a.update(q=a["q"][0]), "q: want"),
        (lambda a: a.update(k=a["k"].half()), "k: dtype"),
        (lambda a: a.update(k=a["k"][..., :2]), "k: head dim"),
        (lambda a: a.update(v=a["v"][:-1]), "v: "),
        (lambda a: a.update(v=a["v"][:, :1]), "v: 1 heads"),
        (lambda a: a.update(intervals=a["intervals"].long()), "intervals"),
        (lambda a: a.update(intervals=a["intervals"][:-1]), "intervals"),
        (lambda a: a.update(keys=Jagged.whole(torch.tensor([2, 3, 5]))), "keys"),
        (lambda a: a.update(keys=Jagged.whole(torch.tensor([9]))), "keys"),
        (lambda a: a.update(backend="fastest"), "backend"),
        (lambda a: a.update(v=a["v"].to("meta")), "v: on meta, q is on cpu"),
        (lambda a: a.update(intervals=a["intervals"].to("meta")), "intervals: on meta"),
        (lambda a: a.update(keys=replace(a["keys"], positions=POSITIONS[:, None])), "keys: want"),
        (lambda a: a.update(keys=replace(a["keys"], positions=POSITIONS - 1)), "keys: positions"),
        (lambda a: a.update(alpha=math.nan), "alpha: want a finite number, got nan"),
        (lambda a: a.update(scale=-math.inf), "scale"),
        (lambda a: a.update(q=a["q"].to(torch.float8_e4m3fn)), "q: want 16-bit"),
        (lambda a: a.update(keys=replace(a["keys"], positions=STRIDED)), "keys: .* contiguous"),
        (lambda a: a.update(projected=projected(10, 24, bias=8)), "projected: bias"),
        (lambda a: a.update(projected=projected(10, 24, dtype=torch.half)), "projected: before is"),
    ],
)
def test_errors_name_the_argument(change, name: str) -> None:
    whole = Jagged.whole(torch.tensor([4, 6], dtype=torch.int32))
    q, k, v, _ = inputs(10, 2, 4, 4)
    arguments = dict(
        q=q,
        k=k,
        v=v,
        queries=whole,
        keys=whole,
        intervals=torch.zeros(10, 4, dtype=torch.int32),
        alpha=1.0,
        scale=1.0,
    )
    change(arguments)
    with pytest.raises(ValueError, match=name):
        hstu_attention(**arguments)


def test_gradients_of_gradients_are_refused() -> None:
    whole = Jagged.whole(torch.tensor([4], dtype=torch.int32))
    q, k, v, dout = inputs(4, 1, 4, 4)
    mask = dict(queries=whole, keys=whole, intervals=torch.tensor([[0, 4, 0, 0]] * 4).int())
    out = hstu_attention(q, k, v, **mask, alpha=1.0, scale=1.0, backend="blockwise")
    [dq] = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
