"""Gradients of columns of one buffer are columns of one buffer."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import hstu_attention
from kernels.columns import empty_gradients, side_by_side
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals
from kernels.projection import silu_linear


@given(
    rows=st.integers(0, 3),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    before=st.integers(0, 2),
    order=st.randoms(),
)
def test_columns_of_one_buffer(rows: int, widths: list[int], before: int, order: Random) -> None:
    width = before + sum(widths) + 1
    wide = torch.arange(float(rows * width)).view(rows, width)
    parts = list(wide[:, before:-1].split(widths, 1))
    order.shuffle(parts)
    grads = empty_gradients(*parts)
    for grad, part in zip(grads, parts, strict=True):
        assert grad.shape == part.shape
        grad.copy_(part)
    for grad, part in zip(grads, parts, strict=True):
        assert torch.equal(grad, part)
    together = side_by_side(grads)
    assert torch.equal(together, torch.cat(parts, 1))
    in_order = sorted(grads, key=lambda x: x.storage_offset())
    if rows:
        assert side_by_side(in_order).data_ptr() == in_order[0].data_ptr()


def test_what_overlaps_is_kept_apart() -> None:
    """A tensor given twice, shifted columns, other rows: gradients share no memory."""
    x = torch.randn(4, 12)
    for others in ([x, x], [x[:, :8], x[:, 4:]], [x[:3, :4], x[1:, 4:8]], [x[:, :6], x.double()]):
        first, second = empty_gradients(*others)
        first.fill_(1)
        second.fill_(2)
        assert (first == 1).all()
    assert torch.equal(side_by_side([x, x]), torch.cat([x, x], 1))


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_attention_after_projection_copies_nothing(backend: str) -> None:
    """What silu_linear gets from attention's backward is one buffer."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = torch.tensor([5, 0, 40], device=device)
    rows = Jagged.whole(lengths)
    x, weight, bias = (torch.randn(*n, device=device) for n in ((45, 8), (64, 8), (48,)))
    weight.requires_grad_()
    _, *vqk, _ = silu_linear(x, weight, bias, [16] * 4)
    seen: list[torch.Tensor] = []
    for part in vqk:
        part.register_hook(seen.append)
    v, q, k = (part.unflatten(1, (2, 8)) for part in vqk)
    hstu_attention(
        q,
        k,
        v,
        queries=rows,
        keys=rows,
        intervals=hstu_intervals(rows, lengths, torch.zeros_like(lengths)),
        alpha=0.3,
        scale=0.1,
        backend=backend,
    ).sum().backward()
    dv, dq, dk = (next(g for g in seen if g.storage_offset() == 16 * i) for i in range(3))
    assert side_by_side([dv, dq, dk]).data_ptr() == dv.data_ptr()
