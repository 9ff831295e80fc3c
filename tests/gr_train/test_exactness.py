"""Any dp x cp against a single process on the same global batch: loss, gradients, table updates.

The reference shares nothing with the distributed path but the modules: plain tables, no process
group, no DDP, whole sequences. Tables are trained with SGD, whose updates show any constant factor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gr_train.config import Config, ModelConfig, ParallelConfig
from gr_train.data.collate import collate
from gr_train.data.sample import DatasetInfo
from gr_train.model.inputs import make_inputs
from gr_train.model.mask import mask_intervals, sequence_flops
from gr_train.model.recommender import DenseModel, Recommender, tables
from parallel.batch import JaggedBatch
from parallel.dense import replicate
from parallel.embedding.lookup import route
from parallel.embedding.tables import embedding_collection, shard_tables
from parallel.layout import ZigzagLayout
from parallel.mesh import build_mesh
from parallel.shard import shard_batch
from parallel.visibility import Visibility
from tests.gr_train.samples import INFO, make_samples

CPU = torch.device("cpu")
LR = 30.0  # updates as large as the weights
# Tokens are events - 1 for retrieval: none, one, fewer than cp, fewer than 2 cp, one huge.
EVENTS = {
    style: [3, 0, 2, 1, 4, 6, 8, huge, *[4] * 24, 2, 0, 9]
    for style, huge in (("merged", 5001), ("interleaved", 2501))
}
CANDIDATES = [2, 0, 1, 1, 0, 3, 5, 20, *[3] * 24, 1, 0, 1]
NEGATIVES = torch.arange(0, 50, 2)


def make_config(task: str, style: str, exchange: str, cp: int, kind: str = "hstu") -> Config:
    model = ModelConfig(
        kind=kind,
        task=task,
        input_style=style,
        num_layers=2,
        width=12,
        num_heads=2,
        qk_dim=4,
        v_dim=6,
        time_buckets=16,
        temperature=0.2,
    )
    config = Config(model=model, parallel=ParallelConfig(cp=cp, exchange=exchange))
    config.data.max_length = 11_000
    return config


def info_for(task: str, style: str) -> DatasetInfo:
    """Retrieval on merged tokens goes without context, so that sequences may be of one token."""
    bare = task == "retrieval" and style == "merged"
    return replace(INFO, contextual={}) if bare else INFO


def global_samples(task: str, style: str) -> list:
    return make_samples(
        EVENTS[style], CANDIDATES, num_contextual=len(info_for(task, style).contextual)
    )


def make_batch(samples: list, config: Config) -> JaggedBatch:
    return collate(
        samples,
        task=config.model.task,
        style=config.model.input_style,
        num_contextual=len(info_for(config.model.task, config.model.input_style).contextual),
        max_length=config.data.max_length,
    )


def build_dense(config: Config) -> DenseModel:
    torch.manual_seed(5)
    return DenseModel(config, info_for(config.model.task, config.model.input_style))


def distributed_step(
    task: str,
    style: str,
    exchange: str,
    dp: int,
    cp: int,
    dealt: bool = False,
    kind: str = "hstu",
):
    config = make_config(task, style, exchange, cp, kind)
    info = info_for(task, style)
    mesh = build_mesh(dp=dp, cp=cp, device=CPU)
    embeddings = shard_tables(
        tables(config.model, info),
        mesh,
        tokens_per_rank=1000,
        optimizer="sgd",
        lr=LR,
        eps=0.0,
        seed=0,
    )
    before = gather_tables(embeddings)
    dense = replicate(build_dense(config), mesh)
    model = Recommender(config.model, info, embeddings, dense, mesh.world)
    # Uneven on purpose: the first rank reads samples without tokens, the last one most of them.
    samples = global_samples(task, style)
    empty = [s for s in samples if not make_batch([s], config).num_tokens]
    rest = [s for s in samples if make_batch([s], config).num_tokens]
    shares = [rest[r::5] for r in range(mesh.size)]
    shares[-1] += [s for r in range(mesh.size, 5) for s in rest[r::5]]
    if mesh.size > 1:
        shares[-1] += shares[0]
        shares[0] = empty
    batch = make_batch(shares[mesh.rank], config)
    if dealt:
        batch = replace(batch, costs=sequence_flops(config.model, len(info.contextual), batch))
    shard = shard_batch(batch, ZigzagLayout(cp), mesh, keep_whole=dealt)
    loss = model.loss(model.prepare(shard, NEGATIVES))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in dense.module.named_parameters()}
    mean_loss = loss.detach() / mesh.size
    dist.all_reduce(mean_loss)
    return mean_loss.item(), gradients, before, gather_tables(embeddings)


def gather_tables(embeddings) -> dict[str, torch.Tensor]:
    whole = {}
    for name, weight in embeddings.state_dict().items():
        out = torch.empty(weight.size()) if dist.get_rank() == 0 else None
        weight.gather(0, out)
        whole[name] = out
    return whole


def single_step(task: str, style: str, kind: str, before: dict[str, torch.Tensor]):
    config = make_config(task, style, "ring", 1, kind)
    info = info_for(task, style)
    embeddings = embedding_collection(tables(config.model, info), "cpu")
    embeddings.load_state_dict(before)
    dense = build_dense(config)
    batch = make_batch(global_samples(task, style), config)
    shard = shard_batch(batch, ZigzagLayout(1), None)
    inputs = make_inputs(
        shard,
        contextual=list(info.contextual),
        task=task,
        style=style,
        time_buckets=config.model.time_buckets,
        last_only=False,
    )
    labels, ids = inputs.labels, dict(inputs.ids)
    if task == "retrieval":
        ids |= {"label": labels, "negative": NEGATIVES}
    looked_up = route(embeddings, ids, CPU).look_up()
    found = {name: looked_up.values(name) for name in ids}
    embedded = torch.zeros(shard.rows.num_rows, config.model.width)
    for name, rows in inputs.rows.items():
        embedded = embedded.index_add(0, rows, found[name])
    mask = partial(mask_intervals, config.model.mask, len(info.contextual))
    out = dense(embedded, inputs, Visibility(shard, mask))
    if task == "retrieval":
        unit = {name: F.normalize(found[name], dim=-1) for name in ("label", "negative")}
        out = F.normalize(out, dim=-1)
        hits = labels[:, None] == NEGATIVES
        negative = (out @ unit["negative"].T).masked_fill(hits, -torch.inf)
        logits = torch.cat([(out * unit["label"]).sum(1, keepdim=True), negative], 1)
        loss = -(logits / config.model.temperature).log_softmax(1)[:, 0].mean()
    else:
        targets = torch.stack([labels & 1, labels >> 1], 1).float()
        loss = F.binary_cross_entropy_with_logits(out, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    after = {name: (p - LR * p.grad).detach() for name, p in embeddings.named_parameters()}
    return loss.item(), gradients, after


@pytest.fixture(scope="module")
def single():
    """The single process's step per (task, style, kind), computed once."""
    done: dict[tuple[str, str, str], tuple] = {}

    def get(task: str, style: str, kind: str, before: dict[str, torch.Tensor]):
        if (task, style, kind) not in done:
            done[task, style, kind] = single_step(task, style, kind, before)
        return done[task, style, kind]

    return get


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)])
@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize("style", ["interleaved", "merged"])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_equals_single_process(
    run_in_world, single, task: str, style: str, exchange: str, dp: int, cp: int
) -> None:
    results = run_in_world(dp * cp, distributed_step, task, style, exchange, dp, cp)
    check(results, single, task, style)


@pytest.mark.parametrize(("dp", "cp"), [(2, 1), (3, 1), (2, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_dealing_by_work_changes_nothing(run_in_world, single, task: str, dp: int, cp: int) -> None:
    """To groups, and in a group of sequences that stay whole."""
    results = run_in_world(dp * cp, distributed_step, task, "merged", "ring", dp, cp, True)
    check(results, single, task, "merged")


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_sasrec_equals_single_process(run_in_world, single, task: str, dp: int) -> None:
    results = run_in_world(dp, distributed_step, task, "merged", "ring", dp, 1, False, "sasrec")
    check(results, single, task, "merged", "sasrec")


def check(results: list, single, task: str, style: str, kind: str = "hstu") -> None:
    loss, _, before, after = results[0]
    want_loss, want_gradients, want_after = single(task, style, kind, before)
    assert abs(loss - want_loss) <= 1e-5 * abs(want_loss)
    for _, gradients, _, _ in results:  # every rank holds the same, averaged gradients
        assert gradients.keys() == want_gradients.keys()
        for name, want in want_gradients.items():
            assert want.norm() > 0, f"{name}: a gradient that is zero shows nothing"
            error = (gradients[name] - want).norm() / want.norm()
            assert error <= 1e-4, f"{name}: gradient off by {error:.1e}"
    for name, want in want_after.items():
        moved = (want - before[name]).norm() / before[name].norm()
        assert moved > 0.1, f"{name}: an update of {moved:.1e} shows no factor"
        errors = (after[name] - want).norm(dim=1) / want.norm(dim=1)
        assert errors.max() <= 1e-4, f"{name}: row {errors.argmax()} off by {errors.max():.1e}"
