"""The recommender: sharded embedding tables, a stack of layers, a head.

`DenseModel` holds every dense parameter (DDP wraps it); `Recommender` joins it with the tables and
is what the trainer and the evaluation call. With plain tables and an unwrapped DenseModel it is an
ordinary single-process module, which is how the tests check the distributed one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_modules import EmbeddingCollection

from gr_train.config import Config, ModelConfig
from gr_train.data.sample import DatasetInfo
from gr_train.model.heads import binary_tasks_loss
from gr_train.model.hstu import HSTULayer
from gr_train.model.inputs import InputEncoder, Inputs, init_linear, make_inputs
from gr_train.model.mask import choose_sharding, mask_intervals
from gr_train.model.sasrec import SASRecLayer
from kernels.row_sums import Sum, sum_rows, take_rows
from kernels.sampled_softmax import sampled_softmax_loss
from kernels.transfer import copy_to
from parallel.attention import make_ready
from parallel.embedding.lookup import Routed, route
from parallel.embedding.tables import Table
from parallel.shard import Shard
from parallel.visibility import Visibility


def tables(config: ModelConfig, info: DatasetInfo) -> list[Table]:
    """The embedding tables a model needs. Labels and negatives are items too."""
    items = ("item", "label", "negative") if config.task == "retrieval" else ("item",)
    for name in {"item", "action", "label", "negative"} & info.contextual.keys():
        raise ValueError(
            f"dataset.json: contextual feature {name!r} has a reserved name; rename it"
        )
    return [
        Table("item", info.num_items, config.width, items),
        Table("action", info.num_actions, config.width, ("action",)),
        *(Table(name, size, config.width, (name,)) for name, size in info.contextual.items()),
    ]


class DenseModel(nn.Module):
    """Embedded tokens in, what the label rows say out. The residual stream keeps their dtype."""

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__()
        model, max_length = config.model, config.data.max_length
        self.encoder = InputEncoder(model.width, max_length, model.time_buckets, model.dropout)
        self.sharding = choose_sharding(config)
        count = model.num_layers
        recomputing = count if model.recompute_layers is None else model.recompute_layers
        configs = [model] * recomputing + [replace(model, recompute="none")] * (count - recomputing)
        self.layers = nn.ModuleList(
            HSTULayer(layer, max_length, self.sharding.exchange)
            if model.kind == "hstu"
            else SASRecLayer(layer)
            for layer in configs
        )
        self.norm = nn.LayerNorm(model.width)
        self.head = (
            init_linear(nn.Linear(model.width, len(info.tasks)))
            if model.task == "ranking"
            else nn.Identity()
        )

    def forward(self, embedded: Tensor, inputs: Inputs, seen: Visibility) -> Tensor:
        """[rows, width] -> [label rows, width] for retrieval, logits [label rows, tasks] for
        ranking."""
        x = self.encoder(embedded, inputs)
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(self.norm(take_rows(x, inputs.label_rows)))


@dataclass(frozen=True)
class Prepared:
    """A shard, made ready by the host for one pass of the model; tensors are on the device."""

    inputs: Inputs
    seen: Visibility
    routed: Routed
    negatives: Tensor | None
    loss_factor: float  # from the sum over this rank's labels to what `Recommender.loss` returns


class Recommender:
    """Joins tables and dense model. Calls are collective over all processes.

    `prepare` is the host's work and may run ahead; `loss` and `predict` never wait for the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        info: DatasetInfo,
        embeddings: EmbeddingCollection | ShardedEmbeddingCollection,
        dense: nn.Module,
        world: dist.ProcessGroup | None,
        precision: torch.dtype | None = None,
        fp32_residual: bool = False,
        exchange: str = "ring",
        row_messages: torch.dtype | None = None,
    ) -> None:
        """precision: of the dense model's matrix products; None leaves them in float32.

        fp32_residual: its residual stream is in float32 even so.
        exchange: the dense model's, to be prepared for. row_messages: see `route`.
        """
        self.config, self.info = config, info
        self.embeddings, self.dense, self.world = embeddings, dense, world
        self.precision, self.exchange, self.row_messages = precision, exchange, row_messages
        # What tables give is summed in float32 and rounded to this, and so is the encoder's sum.
        self.residual = torch.float32 if fp32_residual or precision is None else precision
        self.mask = partial(mask_intervals, config.mask, len(info.contextual))
        self.features = [name for table in tables(config, info) for name in table.features]

    def prepare(
        self, shard: Shard, negatives: Tensor | None = None, *, last_only: bool = False
    ) -> Prepared:
        """negatives: int64 [M] item ids on the host, the same on every rank, for retrieval's loss.

        last_only: retrieval predicts from each sequence's last history token alone.
        """
        inputs = make_inputs(
            shard,
            contextual=list(self.info.contextual),
            task=self.config.task,
            style=self.config.input_style,
            time_buckets=self.config.time_buckets,
            last_only=last_only,
        )
        ids = dict(inputs.ids)
        if self.config.task == "retrieval":
            ids["label"] = inputs.label_ids
        if negatives is not None:
            ids["negative"] = negatives
            negatives = copy_to(negatives, shard.device)
        seen = Visibility(shard, self.mask, len(self.info.contextual))
        make_ready(seen, self.exchange)
        size = 1 if self.world is None else self.world.size()
        factor = size / max(inputs.num_labels, 1)
        return Prepared(inputs, seen, self._route(ids, shard.device), negatives, factor)

    def loss(self, batch: Prepared) -> Tensor:
        """The mean loss over the labels of *all* ranks, as a number whose gradient DDP can average.

        Each rank returns world size * its sum / global count: the mean over ranks, of the value and
        of every gradient, is then the global mean. Those of tables are averaged over ranks as well.
        """
        out, embedded = self._forward(batch)
        labels = batch.inputs.labels
        if self.config.task == "retrieval":
            assert batch.negatives is not None
            own, others = embedded
            total = sampled_softmax_loss(
                out, labels, own, batch.negatives, others, self.config.temperature
            )
        else:
            total = binary_tasks_loss(out, labels)
        return total * batch.loss_factor

    def predict(self, batch: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the label rows say, their labels, and the labels' embeddings (retrieval)."""
        out, embedded = self._forward(batch)
        return out, batch.inputs.labels, embedded[0] if embedded else None

    def item_embeddings(self, items: Tensor, device: torch.device) -> Tensor:
        """[n, width] of item ids [n] on the host; every rank may ask for other items."""
        return self._route({"item": items}, device).look_up().values("item")

    def _forward(self, batch: Prepared) -> tuple[Tensor, list[Tensor]]:
        """What the dense model says, and for retrieval the embeddings of labels and negatives."""
        found, inputs, seen = batch.routed.look_up(), batch.inputs, batch.seen
        tokens = [found.term(name, rows) for name, rows in inputs.rows.items()]
        sums = [Sum(seen.shard.rows.num_rows, self.residual, tokens)]
        if self.config.task == "retrieval":
            sums += [found.alone("label"), found.alone("negative")]
        embedded, *others = sum_rows(found.rows, sums, on_gradient=found.on_gradient)
        # Losses and ranks stay outside: they compare items whose scores half precision would tie.
        autocast = torch.autocast(
            seen.shard.device.type, self.precision, enabled=self.precision is not None
        )
        with autocast:
            return self.dense(embedded, inputs, seen), others

    def _route(self, ids: dict[str, Tensor], device: torch.device) -> Routed:
        """Sharded tables want every feature in every call: those not asked for get no ids."""
        none = torch.zeros(0, dtype=torch.int64)
        every = {name: ids.get(name, none) for name in self.features}
        return route(self.embeddings, every, device, self.row_messages)
