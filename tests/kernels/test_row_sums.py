"""Sums of rows and their gradients against float64; Triton under its interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels.row_sums import Sum, Term, naive_sum, sum_rows, take_rows
from kernels.triton import row_sums as fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = [1, 20, 600]


class Case:
    """Two sums of rows of three tables; the first also adds something."""

    def __init__(self, n: int, sizes: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.tables = [self.numbers(size, width) for size in sizes]
        self.add = self.numbers(n, width).to(dtype)
        some = torch.randperm(n, generator=self.draw)[: n // 3]
        few = torch.randperm(n, generator=self.draw)[: n // 5]
        self.terms = [
            [self.term(0, n), self.term(0, some), self.term(1, few), self.term(2, n)],
            [self.term(0, n // 2)],
        ]
        self.shapes = (n, dtype), (n // 2, torch.float32)
        self.douts = [self.numbers(rows, width).to(dtype) for rows, dtype in self.shapes]

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(DEVICE)

    def term(self, table: int, places: int | Tensor) -> Term:
        count = places if isinstance(places, int) else len(places)
        # The lower a row, the more often it is taken; most are not taken at all.
        rows = torch.rand(count, generator=self.draw) ** 4 * len(self.tables[table])
        to = None if isinstance(places, int) else places.to(DEVICE)
        return Term(table, rows.int().to(DEVICE), to)

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The sums and the gradients of tables and `add`; all in a dtype, if given."""
        tables = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.tables]
        add = self.add.detach().to(dtype or self.add.dtype).requires_grad_()
        sums = [
            Sum(rows, dtype or own, terms, extra)
            for (rows, own), terms, extra in zip(self.shapes, self.terms, (add, None), strict=True)
        ]
        if dtype:
            outs = [naive_sum(tables, x) for x in sums]
        else:
            outs = sum_rows(tables, sums, backend=backend)
        douts = [x.to(out.dtype) for x, out in zip(self.douts, outs, strict=True)]
        grads = torch.autograd.grad(outs, [*tables, add], douts)
        return [x.detach() for x in (*outs, *grads)]


def check(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        rounding = 1e-5 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
        scale = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x.double(), y, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_equals_float64(backend: str, width: int, dtype: torch.dtype) -> None:
    case = Case(300, [500, 3, 1], width, dtype, seed=width)
    check(case.run(backend), case.run("naive", torch.float64))


@given(st.integers(0, 40), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_number_of_rows(n: int, sizes: list[int], seed: int) -> None:
    case = Case(n, sizes, 5, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ENTRIES", 16)
        check(case.run("triton"), case.run("naive", torch.float64))


@given(st.lists(st.integers(0, 70), max_size=12), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_runs_of_equal_keys(runs: list[int], seed: int) -> None:
    """However they lie to the programs' shares: within, across one border, across many."""
    torch.manual_seed(seed)
    keys = torch.repeat_interleave(torch.tensor(runs, dtype=torch.int64)).int()
    keys = keys[torch.randperm(len(keys))].to(DEVICE)
    dout = torch.randn(len(keys), 3, device=DEVICE)
    for grad in (torch.zeros(len(runs) + 1, 3), torch.ones(len(runs) + 1, 3)):
        grad = grad.to(DEVICE)
        want = grad.double().index_add_(0, keys.long(), dout.double())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "ENTRIES", 16)
            fused.add_gradients(grad, [(keys, None)], dout, fresh=not grad.any())
        check([grad], [want])


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_rows_that_lie_apart(backend: str) -> None:
    table = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    rows = torch.randint(9, (40,), dtype=torch.int32, device=DEVICE)
    for some in (rows[::2], rows.view(10, 4)[:, 1], rows[:1].expand(20)):
        (out,) = sum_rows([table], [Sum(len(some), table.dtype, [Term(0, some)])], backend=backend)
        assert torch.equal(out, table[some.long()])


def test_same_bits_in_every_run() -> None:
    case = Case(1000, [50, 3, 1], 20, torch.bfloat16, seed=0)
    for x, y in zip(case.run("triton"), case.run("triton"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_take_rows(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(50, 20, device=DEVICE).to(dtype).requires_grad_()
    for count in (0, 1, 30, 50):
        rows = torch.randperm(50, device=DEVICE)[:count]
        out = take_rows(x, rows, backend=backend)
        assert torch.equal(out, x[rows])
        dout = torch.randn(count, 20, device=DEVICE).to(dtype)
        (dx,) = torch.autograd.grad(out, x, dout)
        want = torch.zeros_like(x)
        want[rows] = dout
        assert torch.equal(dx, want)


def test_errors_name_the_argument() -> None:
    tables = [torch.zeros(3, 4), torch.zeros(2, 4)]
    rows, places = torch.zeros(5, dtype=torch.int32), torch.arange(5)

    def call(*terms: Term, tables: list[Tensor] = tables, add: Tensor | None = None) -> None:
        sum_rows(tables, [Sum(5, torch.float32, terms, add)])

    call(Term(1, rows), Term(0, rows, places))
    with pytest.raises(ValueError, match="tables: want numbers"):
        call(Term(0, rows), tables=[torch.zeros(3, 4), torch.zeros(3, 5)])
    with pytest.raises(ValueError, match="tables: rows must be contiguous"):
        call(Term(0, rows), tables=[torch.zeros(4, 3).T])
    with pytest.raises(ValueError, match="table: there is no number 2 among 2"):
        call(Term(2, rows))
    with pytest.raises(ValueError, match=r"rows: want int32 \[5\], got torch.int64"):
        call(Term(0, rows.long()))
    with pytest.raises(ValueError, match=r"rows: want int32 \[5\], got torch.int32 \(4,\)"):
        call(Term(0, rows[1:]))
    with pytest.raises(ValueError, match="places: want int64"):
        call(Term(0, rows, places.int()))
    with pytest.raises(ValueError, match="terms: want at least one"):
        call()
    with pytest.raises(ValueError, match="tables: want at least one"):
        call(Term(0, rows), tables=[])
    with pytest.raises(ValueError, match="add: want contiguous"):
        call(Term(0, rows), add=torch.zeros(4, 4))


def test_a_gradient_is_told_before_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, told = Case(20, [4, 3, 2], 8, torch.float32, 0), []
    tables = [x.requires_grad_() for x in case.tables]
    add_gradients = fused.add_gradients

    def add(*args: object) -> None:
        add_gradients(*args)  # type: ignore[arg-type]
        told.append("added")

    monkeypatch.setattr(fused, "add_gradients", add)
    sums = [Sum(n, x, terms) for (n, x), terms in zip(case.shapes, case.terms, strict=True)]
    on_gradient = {i: lambda grad, i=i: told.append((i, grad)) for i in (0, 2)}
    outs = sum_rows(tables, sums, on_gradient=on_gradient, backend="triton")
    grads = torch.autograd.grad(outs, tables, case.douts)
    assert [x if x == "added" else x[0] for x in told] == ["added", "added", 0, "added", "added", 2]
    for i, grad in (x for x in told if x != "added"):
        assert torch.equal(grad, grads[i])
