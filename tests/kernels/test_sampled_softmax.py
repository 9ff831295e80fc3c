"""The sampled softmax against its formula in float64; Triton under its interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import sampled_softmax
from kernels.sampled_softmax import sampled_softmax_loss
from kernels.triton import rows as row_blocks
from kernels.triton import sampled_softmax as fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.1
FACTOR = -0.3  # of the loss: the gradient that its backward is given
BACKENDS = ["naive", "triton"]
PIECES = [1, 200, 1 << 26]  # logits: a row, a few rows, all


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows already at 20 rows."""
    monkeypatch.setattr(row_blocks, "ELEMENTS", 256)
    torch.manual_seed(0)


class Case:
    """Inputs of n rows and m negatives, and what the formula makes of them in float64."""

    def __init__(
        self, n: int, m: int, width: int, dtype: torch.dtype = torch.float32, items: int = 12
    ) -> None:
        self.hidden = torch.randn(n, width, device=DEVICE).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.embeddings = torch.randn(n, width, device=DEVICE).to(wide)
        self.negative_embeddings = torch.randn(m, width, device=DEVICE).to(wide)
        self.labels = torch.randint(items, (n,), device=DEVICE)
        self.negatives = torch.randint(items, (m,), device=DEVICE)
        self.temperature = TEMPERATURE

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        rows = self.hidden, self.embeddings, self.negative_embeddings
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in rows]

    def loss(self, backend: str, leaves: list[Tensor] | None = None) -> Tensor:
        hidden, own, against = leaves or self.leaves()
        ids = self.labels, self.negatives
        return sampled_softmax_loss(
            hidden, ids[0], own, ids[1], against, self.temperature, backend=backend
        )

    def run(self, backend: str) -> list[Tensor]:
        """The loss and the gradients of FACTOR times it."""
        leaves = self.leaves()
        loss = self.loss(backend, leaves)
        return [loss.detach(), *torch.autograd.grad(loss * FACTOR, leaves)]

    def written_out(self) -> list[Tensor]:
        leaves = self.leaves(torch.float64)
        hidden, own, against = (
            x / (x.square().sum(1, keepdim=True) + x.shape[1] * 1e-12).sqrt() for x in leaves
        )
        others = (hidden @ against.T / self.temperature).exp()
        others = (others * (self.labels[:, None] != self.negatives)).sum(1)
        positive = (hidden * own).sum(1) / self.temperature
        loss = torch.log1p(others / positive.exp()).sum()
        return [loss.detach(), *torch.autograd.grad(loss * FACTOR, leaves)]


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    """All but for so much of the largest of each, and of its dtype's resolution."""
    for x, y in zip(got, want, strict=True):
        rounding = torch.finfo(x.dtype).eps
        largest = float(y.abs().max()) if y.numel() else 0.0
        atol = (tolerance if x.dtype != torch.bfloat16 else rounding) * largest
        torch.testing.assert_close(x.double(), y.double(), rtol=2 * rounding, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits", PIECES)
@pytest.mark.parametrize(
    ("n", "m", "width"), [(0, 5, 8), (1, 9, 5), (37, 37, 20), (20, 1, 8), (21, 64, 32), (9, 300, 3)]
)
def test_formula(
    n: int, m: int, width: int, logits: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_softmax, "LOGITS", logits)
    case = Case(n, m, width)
    got = case.run(backend)
    check(got, case.written_out())
    assert [x.dtype for x in got] == [torch.float32] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_of_16_bits(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only hidden's gradient is rounded to 16 bits; what is computed is float32."""
    monkeypatch.setattr(sampled_softmax, "LOGITS", 200)
    case = Case(37, 19, 16, dtype)
    got = case.run(backend)
    want = case.written_out()
    check([*got[:1], *got[2:]], [*want[:1], *want[2:]])
    coarse = 4 * torch.finfo(dtype).eps * float(want[1].abs().max())
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=coarse)
    assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("logits", PIECES)
def test_double_precision(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_softmax, "LOGITS", logits)
    case = Case(23, 11, 6, torch.float64)
    check(case.run("auto"), case.written_out(), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_negative_left(backend: str) -> None:
    """Rows whose label is every negative lose nothing and move nothing; the others are right."""
    case = Case(20, 7, 8)
    case.negatives.fill_(5)
    case.labels[::2] = 5
    case.labels[1::2] = 4
    got = case.run(backend)
    check(got, case.written_out())
    assert not any(x[::2].any() for x in got[1:3])
    case.labels.fill_(5)
    assert not any(x.any() for x in case.run(backend))  # NaN would be True


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_64_bits(backend: str) -> None:
    """A negative is not the label because its low 32 bits are."""
    case = Case(20, 7, 8)
    case.labels += 1 << 32
    check(case.run(backend), case.written_out())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend: str) -> None:
    """Cosines of 1 and -1 over a small temperature: exp would overflow float32."""
    case = Case(20, 7, 8, items=1 << 40)
    case.temperature = 0.005
    case.negative_embeddings[0] = case.hidden[0]
    case.embeddings[0] = -case.hidden[0]
    check(case.run(backend), case.written_out(), 1e-3)


def test_certain_labels() -> None:
    """1 - p(label) of 1e-7 keeps its digits, though p(label) is 1 in float32."""
    case = Case(20, 7, 8, items=1 << 40)
    case.temperature = 1 / 20
    case.hidden[:, :4] *= 1e-2
    case.negative_embeddings[:, 4:] = 0  # all but orthogonal to hidden
    case.embeddings = case.hidden + 1e-2 * case.embeddings
    check(case.run("triton")[1:], case.written_out()[1:], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend: str) -> None:
    case = Case(20, 7, 8)
    case.hidden[3] = case.embeddings[4] = case.negative_embeddings[5] = 0
    check(case.run(backend), case.written_out())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    case = Case(20, 8, 12)
    want = case.run(backend)
    padded = torch.randn(20, 20, device=DEVICE)
    padded[:, 3:15] = case.hidden
    case.hidden = padded[:, 3:15]
    case.embeddings = case.embeddings.T.contiguous().T
    case.labels = torch.stack([case.labels] * 2, 1)[:, 1]
    check(case.run(backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradients are recorded, none are made; the loss is the same number."""
    monkeypatch.setattr(sampled_softmax, "LOGITS", 200)
    case = Case(20, 37, 8)
    want = case.loss(backend).detach()

    def never(*args: object) -> None:
        raise AssertionError("a gradient is computed")

    monkeypatch.setattr(torch.autograd, "grad", never)
    monkeypatch.setattr(fused, "gradients_kernel", {})
    with torch.no_grad():
        got = case.loss(backend)
    constant = case.loss(backend, [x.detach() for x in case.leaves()])
    for loss in (got, constant):
        assert torch.equal(loss, want)
        assert not loss.requires_grad
    with pytest.raises((AssertionError, KeyError)):  # else the two would watch for nothing
        case.loss(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input(backend: str, which: int) -> None:
    case = Case(20, 7, 8)
    leaves = case.leaves()
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)
    (case.loss(backend, leaves) * FACTOR).backward()
    assert torch.equal(leaves[which].grad, case.run(backend)[1 + which])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend: str) -> None:
    """It changes nothing that is kept; and the gradients have none of their own."""
    case = Case(20, 7, 8)
    leaves = case.leaves()
    loss = case.loss(backend, leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    (gradient, *_) = torch.autograd.grad(loss.square(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_softmax, "LOGITS", 200)
    case = Case(37, 19, 16)
    assert all(torch.equal(x, y) for x, y in zip(case.run(backend), case.run(backend), strict=True))


def loss(**changed: object) -> Tensor:
    arguments = dict(
        hidden=torch.randn(3, 4),
        labels=torch.zeros(3, dtype=torch.int64),
        label_embeddings=torch.randn(3, 4),
        negatives=torch.zeros(2, dtype=torch.int64),
        negative_embeddings=torch.randn(2, 4),
        temperature=0.1,
    )
    return sampled_softmax_loss(**{**arguments, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hidden", lambda: loss(hidden=torch.randn(3))),
        ("hidden", lambda: loss(hidden=torch.zeros(3, 4, dtype=torch.int64))),
        ("labels", lambda: loss(labels=torch.zeros(2, dtype=torch.int64))),
        ("labels", lambda: loss(labels=torch.zeros(3))),
        ("label_embeddings", lambda: loss(label_embeddings=torch.randn(2, 4))),
        ("negatives", lambda: loss(negatives=torch.zeros(3, dtype=torch.int64))),
        ("negatives", lambda: loss(negatives=torch.zeros(2, dtype=torch.int32))),
        ("negative_embeddings", lambda: loss(negative_embeddings=torch.randn(2, 3))),
        ("negative_embeddings", lambda: loss(negative_embeddings=torch.randn(0, 4))),
        ("temperature", lambda: loss(temperature=0.0)),
        ("backend", lambda: loss(backend="no")),
        ("backend", lambda: loss(hidden=torch.randn(3, 4).double(), backend="triton")),
    ],
)
def test_errors_name_the_argument(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()


def test_too_many_negatives_for_triton() -> None:
    """A row of logits is one program's: longer ones are the naive twin's."""
    m = 8193
    changed = dict(negatives=torch.arange(m), negative_embeddings=torch.randn(m, 4))
    assert loss(**changed).isfinite()
    with pytest.raises(ValueError, match="backend"):
        loss(**changed, backend="triton")
