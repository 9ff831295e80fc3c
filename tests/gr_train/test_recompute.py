"""A layer that computes activations again gives what a layer that keeps them gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gr_train.config import Config, ModelConfig
from gr_train.model import hstu
from gr_train.model.hstu import HSTULayer
from gr_train.model.recommender import DenseModel
from gr_train.model.recompute import Recomputation
from kernels import attention as kernels_attention
from kernels import gated_norm, norm, projection
from kernels.masks import hstu_intervals
from kernels.norm import branch_norm
from parallel import attention
from parallel.attention import EXCHANGES
from parallel.batch import JaggedBatch
from parallel.layout import ZigzagLayout
from parallel.mesh import build_mesh
from parallel.shard import Shard, shard_batch
from parallel.visibility import Visibility
from tests.gr_train.samples import INFO

CPU = torch.device("cpu")
WIDTH = 16
POLICIES = ("none", "projections")


def make_shard(cp: int, lengths: list[int]) -> Shard:
    mesh = build_mesh(dp=1, cp=cp, device=CPU) if cp > 1 else None
    mine = torch.tensor(lengths, dtype=torch.int32)
    if mesh is not None:
        mine = mine[mesh.rank :: cp]
    batch = JaggedBatch(
        mine, torch.zeros_like(mine), {"id": torch.zeros(int(mine.sum()), dtype=torch.int64)}
    )
    return shard_batch(batch, ZigzagLayout(cp), mesh)


def make_layer(recompute: str, exchange: str = "ring", dropout: float = 0.0) -> HSTULayer:
    torch.manual_seed(3)
    config = ModelConfig(
        width=WIDTH, num_heads=2, qk_dim=4, v_dim=8, dropout=dropout, recompute=recompute
    )
    return HSTULayer(config, max_length=700, exchange=exchange)


class Allocations(TorchDispatchMode):
    """Watches the memory that operations allocate; views of what was there before do not count."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.before = {x.untyped_storage().data_ptr() for x in before}
        self.seen: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.before:
                    self.seen.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def alive(self) -> int:
        """Bytes not freed yet, whoever holds them."""
        return sum({ref.cdata: size for ref, size in self.seen if not ref.expired()}.values())


def step(
    shard: Shard, recompute: str, exchange: str, dropout: float, autocast: bool
) -> tuple[list[Tensor], int, int]:
    """Two layers' output and all gradients; bytes alive after forward and backward."""
    layers = [make_layer(recompute, exchange, dropout) for _ in range(2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    seen = Visibility(shard, hstu_intervals)
    torch.manual_seed(4)
    dtype = torch.bfloat16 if autocast else torch.float32
    x = torch.randn(shard.rows.num_rows, WIDTH, dtype=dtype, requires_grad=True)
    torch.manual_seed(5)  # of the dropout
    with Allocations([x, seen.intervals, *parameters]) as allocations:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layers[1](layers[0](x, seen), seen)
        kept = allocations.alive()
        out.backward(torch.sin(torch.arange(out.numel()).view_as(out)))
    results = [out.detach(), x.grad, *(p.grad for p in parameters)]
    return results, kept, allocations.alive()


def check(shard: Shard, exchange: str, dropout: float, autocast: bool) -> tuple[int, int]:
    """The same results from less memory. Returns what either policy leaves behind, in bytes."""
    want, kept, left = step(shard, "none", exchange, dropout, autocast)
    got, kept_less, left_less = step(shard, "projections", exchange, dropout, autocast)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same operations on the same values
    # Halo and ulysses hand attention copies of their own of q, k and v, which it keeps.
    assert kept_less < (0.5 if exchange in ("ring", "all_gather") else 1.0) * kept
    return left, left_less


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_process(dropout: float, autocast: bool) -> None:
    left, left_less = check(make_shard(1, [400, 0, 1, 170]), "ring", dropout, autocast)
    assert left_less <= left  # the first step also fills what a shard caches


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets: its rows are here")


@pytest.mark.parametrize("backend", ["naive", pytest.param("triton", marks=INTERPRETED)])
def test_rebuilds_a_layer_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors are asked for once each by every backward, of the fused kernels as well."""
    for module in (norm, projection, gated_norm):
        monkeypatch.setattr(module, "takes_triton", lambda *_: backend == "triton")
    calls = []
    monkeypatch.setattr(
        hstu, "branch_norm", lambda *a, **k: calls.append(0) or branch_norm(*a, **k)
    )
    step(make_shard(1, [30, 7]), "projections", "ring", 0.3, False)
    assert len(calls) == 2 * 2  # layers, forward and rebuilt


@INTERPRETED
def test_attention_whose_backward_goes_through_the_projection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wide heads, whose backward keeps slopes: as if attention knew nothing of the projection."""
    pytest.importorskip("triton")
    from kernels.triton import configs, projected

    def grads(recompute: str) -> list[Tensor]:
        torch.manual_seed(3)
        config = ModelConfig(width=WIDTH, num_heads=2, qk_dim=32, v_dim=32, recompute=recompute)
        layer = HSTULayer(config, max_length=70, exchange="ring")
        torch.manual_seed(4)
        x = torch.randn(shard.rows.num_rows, WIDTH, requires_grad=True)
        out = layer(x, Visibility(shard, hstu_intervals))
        return list(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))

    shard = make_shard(1, [70, 0, 3])
    want = grads("none")
    for module in (norm, projection, gated_norm):
        monkeypatch.setattr(module, "takes_triton", lambda *_: True)
    monkeypatch.setattr(kernels_attention, "_takes_triton", lambda *_: True)
    block, square = configs.Blocks(16, 16, 4, 1), configs.Blocks(64, 64, 4, 1)
    kept = configs.Kept(configs.Blocks(32, 64, 4, 1), square, square)
    monkeypatch.setitem(configs.SINGLE, 64, configs.Config(32, 16, *[block] * 4, kept))
    through = []
    goes_through = projected.goes_through
    monkeypatch.setattr(
        projected, "goes_through", lambda *x: through.append(goes_through(*x)) or through[-1]
    )
    for policy in POLICIES:
        for got, expected in zip(grads(policy), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert through == [True, True]


def in_group(exchange: str, autocast: bool) -> None:
    check(make_shard(2, [700, 0, 1, 170, 3]), exchange, 0.2, autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_context_parallel(run_in_world, exchange: str, autocast: bool) -> None:
    run_in_world(2, in_group, exchange, autocast)


@pytest.mark.parametrize("deterministic", [True, False])
def test_attention_is_told_whether_order_matters(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def attend(*args: Any, **options: Any) -> Tensor:
        told.append(options["deterministic"])
        return kernels_attention.hstu_attention(*args, **options)

    monkeypatch.setattr(attention, "hstu_attention", attend)
    config = ModelConfig(width=WIDTH, deterministic=deterministic)
    shard = make_shard(1, [5, 3])
    x = torch.randn(shard.rows.num_rows, WIDTH)
    HSTULayer(config, max_length=7, exchange="ring")(x, Visibility(shard, hstu_intervals))
    assert told == [deterministic]


def test_no_tokens() -> None:
    shard = make_shard(1, [0, 0])
    for policy in POLICIES:
        results, _, _ = step(shard, policy, "ring", 0.5, False)
        assert all(not x.any() for x in results)


def test_rebuilds_once_a_pass() -> None:
    """However many operations want it, also in a second pass over the same graph."""
    calls = 0
    x = torch.randn(5, requires_grad=True)
    with Recomputation(x) as kept:
        hidden = x * 2
        out = (hidden.exp() * hidden[1:].sum()).sum() + hidden.square().sum()
    values = x.detach()

    def rebuild() -> list[Tensor]:
        nonlocal calls
        calls += 1
        assert not torch.is_grad_enabled()
        return [values * 2]

    kept.forget([hidden], rebuild)
    del hidden
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    assert calls == 1
    (second,) = torch.autograd.grad(out, x)
    assert calls == 2
    want = torch.func.grad(
        lambda x: ((2 * x).exp() * (2 * x)[1:].sum()).sum() + (2 * x).square().sum()
    )(values)
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(second, want)


def test_only_the_first_layers() -> None:
    model = ModelConfig(num_layers=3, recompute="projections", recompute_layers=2)
    layers = DenseModel(Config(model=model), INFO).layers
    assert [layer.recompute for layer in layers] == ["projections", "projections", "none"]
