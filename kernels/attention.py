"""The one entry to HSTU attention: checks, choice of backend, autograd.

`hstu_attention` is what a model calls. Context parallelism calls its parts, `attention_forward`,
`query_gradient` and `key_value_gradients`, for a block of keys or two at a time; each can add to
what the blocks before have given.

Backends: `triton` on a GPU; `blockwise` where there is no GPU or no Triton, and for float64;
`naive` to read, and to test the others against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import TRITON_DTYPES, accumulator, runs_triton
from kernels.blockwise import (
    blockwise_backward,
    blockwise_forward,
    blockwise_key_value_gradients,
    blockwise_query_gradient,
)
from kernels.columns import empty_gradients
from kernels.jagged import Jagged
from kernels.naive import naive_attention
from kernels.projection import Projected
from kernels.source import Source
from kernels.weighting import Weighting

BACKENDS = ("auto", "naive", "blockwise", "triton")
TRITON_MAX_DIM = 256
DTYPES = (*TRITON_DTYPES, torch.float64)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    deterministic: bool = True,
    projected: Projected | None = None,
    backend: str = "auto",
) -> Tensor:
    """out_i = scale * sum_j silu(alpha * q_i . k_j) v_j over the keys j that query i sees.

    q: [Tq, H, Dqk]; k: [Tk, H, Dqk]; v: [Tk, H, Dv]; one floating dtype, one device.
    queries, keys: the rows of q, and of k and v; the same B sequences. If queries.max_length is
        known, the backward may be faster, on Hopper in 16 bits, for head dims over 128, and for
        short sequences if up to 64, and takes memory for it: see `kernels.scratch`.
    intervals: int32 [Tq, 4], see `kernels.masks`.
    deterministic: gradients are bitwise equal from run to run. If False, they need not be, where
        that is faster: on Hopper in 16 bits, for both head dims over 64 and up to 128, and
        sequences of 16,384 rows or more in the mean that are not few; if there is memory for a
        float32 dq, see `kernels.scratch`.
    projected: what q, k and v are, all rows, silu(before + bias) of: then gradients go to these two
        instead, where that is faster (where `queries.max_length` makes the backward so), if q, k
        and v are columns of one buffer, as before is of theirs, and all of them.
    backend: one of BACKENDS; "auto" takes the fastest that can do it.
    Returns [Tq, H, Dv] in q's dtype; sums are float32 inside (float64 for float64). Gradients can
    be taken once, not of themselves, but for backend="naive".
    A number that is not finite may spoil any rows, also of other sequences, as it does gradients.
    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit. Values
    (order of positions, ends of intervals) are checked on a CPU only: on a GPU the host would wait.
    """
    check_rows(q, k, v)
    _check(q, k, v, queries, keys, intervals, alpha, scale, backend)
    if projected is not None:
        _check_projected(q, projected)
    if q.device.type == "cpu":
        _check_values(queries, keys, intervals)
    weighting = Weighting(queries, keys, intervals, alpha, scale)
    if backend == "naive":
        return naive_attention(q, k, v, weighting)
    if backend == "triton" or (backend == "auto" and _takes_triton(q, v)):
        _load_triton(q.device)
        if projected is not None:
            from kernels.triton.projected import goes_through, projected_attention

            if goes_through(q, k, v, weighting, projected):
                return projected_attention(q, k, v, weighting, projected)
        mask = (queries.offsets, queries.positions, keys.offsets, keys.positions, intervals)
        options = queries.max_length, alpha, scale, deterministic
        return torch.ops.gr_kernels.attention(q, k, v, *mask, *options)
    return _Blockwise.apply(q, k, v, weighting)


def attention_forward(
    q: Tensor, *sources: Source, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The forward pass over one or two blocks of keys, without autograd.

    sources: keys and values; of weightings with the same queries, alpha and scale.
    add: float32 [Tq, H, Dv], what other blocks gave; with it, or two sources, the scale must not be
    0. With two, it may be overwritten. out: where to write, of any floating dtype, `add` itself if
    you like. Of both, each row must be contiguous.
    Returns out; a new float32 tensor if None.
    """
    v = sources[0].rows[1]
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2], dtype=accumulator(q.dtype))
    if _takes_triton(q, v):
        from kernels.triton import launch

        return launch.forward(q, *sources, add=add, out=out)
    for k, v, weighting in _here(sources):
        add = _plus(blockwise_forward(q, k, v, weighting), add)
    assert add is not None
    return out.copy_(add)


def query_gradient(
    dout: Tensor,
    q: Tensor,
    *sources: Source,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dq [Tq, H, Dqk] of blocks of keys, from dout [Tq, H, Dv]. sources, add, out: as forward;
    where the scale must not be 0, nor must alpha."""
    if out is None:
        out = torch.empty(q.shape, dtype=accumulator(q.dtype), device=q.device)
    if _takes_triton(q, dout):
        from kernels.triton import launch

        return launch.query_gradient(dout, q, *sources, add=add, out=out)
    for k, v, weighting in _here(sources):
        add = _plus(blockwise_query_gradient(dout, q, k, v, weighting), add)
    assert add is not None
    return out.copy_(add)


def key_value_gradients(
    k: Tensor,
    v: Tensor,
    *sources: Source,
    add: tuple[Tensor, Tensor] | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """dk [Tk, H, Dqk] and dv [Tk, H, Dv] of one block of keys. add, out: as forward, of each.

    sources: one or two blocks of queries and of their outputs' gradients.
    """
    if out is None:
        dtype = accumulator(k.dtype)
        out = (
            torch.empty(k.shape, dtype=dtype, device=k.device),
            torch.empty(v.shape, dtype=dtype, device=v.device),
        )
    if _takes_triton(k, v):
        from kernels.triton import launch

        return launch.key_value_gradients(k, v, *sources, add=add, out=out)
    for q, dout, weighting in _here(sources):
        dk, dv = blockwise_key_value_gradients(dout, q, k, v, weighting)
        add_k, add_v = add or (None, None)
        add = _plus(dk, add_k), _plus(dv, add_v)
    assert add is not None
    return out[0].copy_(add[0]), out[1].copy_(add[1])


def _here(sources: Sequence[Source]) -> Iterator[tuple[Tensor, Tensor, Weighting]]:
    """Each once it has arrived."""
    for source in sources:
        if source.arrival:
            source.arrival.wait()
        yield *source.rows, source.weighting


def _plus(partial: Tensor, add: Tensor | None) -> Tensor:
    return partial if add is None else partial.add_(add)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.weighting = weighting
        return blockwise_forward(q, k, v, weighting).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = empty_gradients(q, k, v)
        sums = blockwise_backward(dout, q, k, v, ctx.weighting)
        for grad, total in zip(grads, sums, strict=True):
            grad.copy_(total)
        return *grads, None


def _takes_triton(q: Tensor, v: Tensor) -> bool:
    """Whether "auto" means Triton for these tensors on this machine."""
    return q.is_cuda and _fits_triton(q, v) and runs_triton(q.device)


def _fits_triton(q: Tensor, v: Tensor) -> bool:
    return q.dtype in TRITON_DTYPES and max(q.shape[2], v.shape[2]) <= TRITON_MAX_DIM


@torch.compiler.assume_constant_result
def _load_triton(device: torch.device) -> bool:
    """Register the operators, on first use: a machine without Triton never comes here."""
    if not runs_triton(device):
        raise ValueError(f"backend: 'triton' needs Triton and a recent NVIDIA GPU, not {device}")
    import kernels.triton.operator  # noqa: F401

    return True


# Messages are built only on failure: under torch.compile, printing a size would fix it.
def check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError, naming it, for one that does not fit q, or is not for attention."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name}: want [rows, heads, dim], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: want 16-bit, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} is not q's {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, q is on {q.device}")
        if x.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: {x.shape[1]} heads, q has {q.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: head dim {k.shape[2]} is not q's {q.shape[2]}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v: {v.shape[0]} rows, k has {k.shape[0]}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    backend: str,
) -> None:
    for name, jagged, rows in (("queries", queries, q.shape[0]), ("keys", keys, k.shape[0])):
        for part in (jagged.offsets, jagged.positions):
            if part.dtype != torch.int32 or part.dim() != 1:
                raise ValueError(f"{name}: want int32 [n], got {part.dtype} {tuple(part.shape)}")
            if part.device != q.device:
                raise ValueError(f"{name}: on {part.device}, q is on {q.device}")
            if not part.is_contiguous():
                raise ValueError(f"{name}: offsets and positions must be contiguous()")
        if jagged.num_rows != rows:
            raise ValueError(f"{name}: {jagged.num_rows} positions for {rows} rows")
    if queries.num_sequences != keys.num_sequences:
        raise ValueError(
            f"keys: {keys.num_sequences} sequences, queries have {queries.num_sequences}"
        )
    if intervals.dtype != torch.int32 or intervals.shape != (q.shape[0], 4):
        raise ValueError(
            f"intervals: want int32 [{q.shape[0]}, 4], got {intervals.dtype} "
            f"{tuple(intervals.shape)}"
        )
    if intervals.device != q.device:
        raise ValueError(f"intervals: on {intervals.device}, q on {q.device}")
    for name, factor in (("alpha", alpha), ("scale", scale)):
        if not abs(factor) < math.inf:
            raise ValueError(f"{name}: want a finite number, got {factor}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "triton" and not _fits_triton(q, v):
        raise ValueError(
            f"backend: 'triton' takes 16-bit and float32 inputs with head dims up to "
            f"{TRITON_MAX_DIM}, got {q.dtype}, {q.shape[2]} and {v.shape[2]}"
        )


def _check_projected(q: Tensor, projected: Projected) -> None:
    before, bias = projected.before, projected.bias
    if before.dim() != 2:
        raise ValueError(f"projected: want before [rows, width], got {tuple(before.shape)}")
    if bias.shape != before.shape[1:]:
        raise ValueError(
            f"projected: bias has shape {tuple(bias.shape)}, before {tuple(before.shape)}"
        )
    for x in (before, bias):
        if x.device != q.device:
            raise ValueError(f"projected: on {x.device}, q is on {q.device}")
    if before.dtype != q.dtype:
        raise ValueError(f"projected: before is {before.dtype}, q is {q.dtype}")


@torch.compiler.disable
def _check_values(queries: Jagged, keys: Jagged, intervals: Tensor) -> None:
    for name, rows in (("queries", queries), ("keys", keys)):
        ends = rows.offsets.tolist()
        if not ends or ends[0] != 0 or ends[-1] != rows.num_rows or ends != sorted(ends):
            raise ValueError(f"{name}: offsets must rise from 0 to the {rows.num_rows} rows")
        longest = max(rows.lengths().tolist(), default=0)
        if rows.max_length is not None and longest > rows.max_length:
            raise ValueError(f"{name}: a sequence is longer than max_length={rows.max_length}")
        same_sequence = rows.sequence_ids().diff() == 0
        if not bool((rows.positions.diff() > 0)[same_sequence].all() & (rows.positions >= 0).all()):
            raise ValueError(f"{name}: positions must increase within a sequence, from 0 or more")
    a0, a1, b0, b1 = intervals.unbind(-1)
    disjoint = (a1 <= b0) | (a0 == a1) | (b0 == b1)
    if not bool(((a0 >= 0) & (a0 <= a1) & (b0 >= 0) & (b0 <= b1) & disjoint).all()):
        raise ValueError("intervals: want 0 <= a0 <= a1 <= b0 <= b1, or one of the two empty")
