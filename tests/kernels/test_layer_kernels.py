"""The fused kernels of a layer against their naive twins, under Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels.gated_norm import draw_seed, gated_norm, naive_gated_norm
from kernels.norm import branch_norm
from kernels.projection import GradientBuffer, naive_silu_linear, residual_linear, silu_linear
from kernels.triton import rows as row_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-2  # rows of two nearly equal values would otherwise amplify rounding a thousandfold
ROWS = st.one_of(st.just(0), st.integers(1, 70))
WIDTHS = st.sampled_from([2, 5, 8, 31, 64, 100])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows a program, and several programs, already at 20 rows."""
    monkeypatch.setattr(row_blocks, "ELEMENTS", 256)


def random(*shape: int, padding: int = 0) -> Tensor:
    """Rows that are columns of a wider buffer, if padding is given. float32."""
    wide = torch.randn(*shape[:-1], shape[-1] + padding, device=DEVICE)
    return wide[..., padding:].requires_grad_()


def check_twins(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    backends: tuple[str, ...] = ("naive", "triton"),
    tolerance: float = 1e-4,
) -> None:
    """function(*inputs, backend=...) gives the same results and gradients with all backends."""
    results = {}
    for backend in backends:
        outs = function(*inputs, backend=backend)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        torch.manual_seed(1)
        douts = [random(*out.shape, padding=i % 2).detach() for i, out in enumerate(outs)]
        results[backend] = [*outs, *torch.autograd.grad(outs, inputs, douts)]
    for backend in backends[1:]:
        for got, want in zip(results[backend], results[backends[0]], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@given(rows=ROWS, width=WIDTHS, padding=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_branch_norm(rows: int, width: int, padding: int) -> None:
    inputs = [random(rows, width, padding=padding), random(width), random(width)]
    check_twins(lambda *a, backend: branch_norm(*a, eps=EPS, backend=backend), inputs)


@given(rows=ROWS, width=WIDTHS, padding=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_gated_norm(rows: int, width: int, padding: int) -> None:
    a, u = random(rows, width), random(rows, width, padding=padding)
    inputs = [a, u, random(width), random(width), random(width)]
    check_twins(lambda *a, backend: gated_norm(*a, eps=EPS, backend=backend), inputs)
    inputs[1] = random(width, rows).t()
    check_twins(lambda *a, backend: gated_norm(*a, eps=EPS, backend=backend), inputs)


@given(rows=ROWS, width=WIDTHS, splits=st.lists(st.integers(1, 40), min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_silu_linear(rows: int, width: int, splits: list[int]) -> None:
    inputs = [random(rows, width), random(sum(splits), width), random(sum(splits[1:]))]

    def function(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, ...]:
        if backend == "autograd":  # both twins share a backward written by hand
            return naive_silu_linear(x, weight, bias, splits)
        return silu_linear(x, weight, bias, splits, backend=backend)

    check_twins(function, inputs, ("autograd", "naive", "triton"))


@given(rows=ROWS, width=WIDTHS, padding=st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_residual_linear(rows: int, width: int, padding: int) -> None:
    inputs = [random(rows, 6, padding=padding), random(rows, width), random(6, width)]

    def function(x: Tensor, y: Tensor, weight: Tensor, backend: str) -> Tensor:
        if backend == "autograd":
            return x + torch.nn.functional.linear(y, weight)
        return residual_linear(x.clone(), y, weight)

    check_twins(function, inputs, ("autograd", "by hand"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_branch(dtype: torch.dtype) -> None:
    """The sum is formed in the norm's copy of x, in x's dtype, and leaves x as it is."""
    x, weight, bias, w = random(40, 8), random(8), random(8), random(8, 8)

    def branch(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, backend: str) -> Tensor:
        if backend == "autograd":
            normed = torch.nn.functional.layer_norm(x, (8,), weight, bias, EPS)
            return x + normed.to(dtype).float() @ w.to(dtype).float().T
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            normed, past = branch_norm(x, weight, bias, eps=EPS, backend=backend)
            assert normed.dtype == dtype
            before, address = x.detach().clone(), past.data_ptr()
            out = residual_linear(past, normed, w)
        assert out.data_ptr() == address != x.data_ptr()
        assert torch.equal(x, before)
        return out

    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    check_twins(branch, [x, weight, bias, w], ("autograd", "naive", "triton"), tolerance)


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("used_twice", [False, True])
def test_gradient_written_in_place(backend: str, used_twice: bool) -> None:
    """The gate's backward writes into the projection's, unless U's gradient is a sum."""
    a, x, weight, bias = random(50, 8), random(50, 16), random(32, 16), random(24)
    vectors = [random(8) for _ in range(3)]

    def gate(**shared: GradientBuffer) -> Tensor:
        u, v, q, k, _ = silu_linear(
            x, weight, bias, [8] * 4, backend=backend, gradient=shared.get("u_gradient")
        )
        out = gated_norm(a, u, *vectors, eps=EPS, backend=backend, **shared)
        return (out + u if used_twice else out) * v * q * k

    inputs = [a, x, weight, bias, *vectors]
    dout = torch.randn(50, 8, device=DEVICE)
    want = torch.autograd.grad(gate(), inputs, dout)
    out = gate(u_gradient=GradientBuffer())
    for retain_graph in (True, False):  # the second pass finds no trace of the first
        got = torch.autograd.grad(out, inputs, dout, retain_graph=retain_graph)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_buffer() -> None:
    u = torch.randn(4, 24)[:, :8]
    before = torch.randn(4, 24)[:, 8:]
    buffer = GradientBuffer()
    du = buffer.columns(u)
    assert (du.shape, du.stride()) == (u.shape, u.stride())
    whole = buffer.take(du, None)
    assert whole is not None
    assert whole.shape == (4, 24)
    assert whole.data_ptr() == du.data_ptr()
    assert buffer.take(du, None) is None
    buffer.columns(u)
    assert buffer.take(du, None) is None  # another's

    du, dbefore = buffer.columns(u), buffer.others(before)
    assert (dbefore.shape, dbefore.stride()) == (before.shape, before.stride())
    whole = buffer.take(du, dbefore)
    assert whole is not None
    assert dbefore.data_ptr() == whole[:, 8:].data_ptr()

    du, dbefore = buffer.columns(u), buffer.others(before)
    other = buffer.others(before)  # of who comes second
    assert other.untyped_storage().data_ptr() != dbefore.untyped_storage().data_ptr()
    assert buffer.take(du, other) is None
    du, dbefore = buffer.columns(u), buffer.others(before)
    assert buffer.take(du, None) is None  # who was given the others' columns may still hold them


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_dropout(backend: str) -> None:
    """One mask forward and backward, a function of the seed, with the right rate and scale."""
    a, u = random(200, 50), random(200, 50)
    vectors = [random(50) for _ in range(3)]

    def gate(seed: Tensor) -> Tensor:
        return gated_norm(a, u, *vectors, eps=EPS, dropout=0.3, seed=seed, backend=backend)

    torch.manual_seed(0)
    seed, other = draw_seed(DEVICE), draw_seed(DEVICE)
    out = gate(seed)
    assert torch.equal(out, gate(seed))
    kept = out != 0
    assert not torch.equal(kept, gate(other) != 0)
    assert abs(float(kept.float().mean()) - 0.7) < 0.02  # 4 standard deviations
    assert kept.float().mean(0).min() > 0.5  # no column, no row
    assert kept.float().mean(1).min() > 0.4
    want = naive_gated_norm(a, u, *vectors, EPS, kept / 0.7)
    dout = torch.randn_like(out)
    inputs = [a, u, *vectors]
    grads = torch.autograd.grad(out, inputs, dout)
    for got, expected in zip(
        [out, *grads], [want, *torch.autograd.grad(want, inputs, dout)], strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_under_autocast(backend: str, residual: torch.dtype) -> None:
    """bf16 to the matrix products, the residual sum in its own dtype; grads as parameters."""
    x = random(20, 16).detach().to(residual).requires_grad_()
    weight, bias, w1, b1, w2 = (random(*n) for n in ((16,), (16,), (32, 16), (24,), (16, 8)))
    u_bias = random(8)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        normed, past = branch_norm(x, weight, bias, eps=EPS, backend=backend)
        u, v, *_ = silu_linear(normed, w1, b1, [8] * 4, backend=backend)
        gated = gated_norm(v, u, u_bias, weight[:8], bias[:8], eps=EPS, backend=backend)
        out = residual_linear(past, gated, w2)
    assert [y.dtype for y in (normed, u, v, gated)] == [torch.bfloat16] * 4
    assert out.dtype == residual
    parameters = [x, weight, bias, w1, b1, u_bias, w2]
    for parameter, grad in zip(parameters, torch.autograd.grad(out.sum(), parameters), strict=True):
        assert grad.dtype == parameter.dtype
        assert grad.isfinite().all()


META = torch.empty(3, device="meta")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: branch_norm(random(3), random(3), random(3), eps=EPS), "x:"),
        (lambda: branch_norm(random(2, 3), random(3), random(2), eps=EPS), "bias:"),
        (lambda: branch_norm(random(2, 3), random(3), random(3), eps=EPS, backend="no"), "backend"),
        (lambda: gated_norm(random(2, 3), random(2, 2), *[random(3)] * 3, eps=EPS), "u:"),
        (lambda: gated_norm(*[random(2, 2)] * 2, random(3), *[random(2)] * 2, eps=EPS), "u_bias:"),
        (lambda: gated_norm(*[random(2, 2)] * 2, *[random(2)] * 3, eps=EPS, dropout=1), "dropout"),
        (lambda: gated_norm(*[random(2, 2)] * 2, *[random(2)] * 3, eps=EPS, dropout=0.5), "seed"),
        (lambda: branch_norm(random(2, 3).int(), *[random(3)] * 2, eps=EPS), "x: want floats"),
        (lambda: branch_norm(random(2, 3), META, random(3), eps=EPS), "weight: on meta"),
        (lambda: gated_norm(*[random(2, 3)] * 2, META, *[random(3)] * 2, eps=EPS), "u_bias: on"),
        (lambda: silu_linear(random(2, 3), random(5, 3), META, [2, 3]), "bias: on meta"),
        (lambda: residual_linear(random(2, 3), random(3, 3), random(3, 3)), "y: shape"),
        (lambda: silu_linear(random(2, 3), random(4, 3), random(4), [2, 3]), "weight"),
        (lambda: silu_linear(random(2, 3), random(5, 3), random(5), [2, 3]), "bias"),
        (lambda: residual_linear(random(2, 3), random(2, 3), random(4, 3)), "weight"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_strided_vectors() -> None:
    """Of parameters, such as columns of a matrix, in Triton as in PyTorch."""
    x, vectors, weight = random(5, 8), random(8, 3), random(12, 8)
    for backend in "naive", "triton":
        normed, _ = branch_norm(x, vectors[:, 0], vectors[:, 1], eps=EPS, backend=backend)
        gated = gated_norm(normed, x, *vectors.unbind(1), eps=EPS, backend=backend)
        out = silu_linear(gated, weight, vectors[:, 2], [4, 8], backend=backend)[1]
        if backend == "naive":
            want = out
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_triton_refuses_what_it_cannot_do() -> None:
    x = random(2, 3).double()
    with pytest.raises(ValueError, match="backend"):
        branch_norm(x, random(3), random(3), eps=EPS, backend="triton")
