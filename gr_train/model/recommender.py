"""The recommender: sharded embedding tables, a stack of layers, a head.

`DenseModel` holds every dense parameter (DDP wraps it); `Recommender` joins it with the tables and
is what the trainer and the evaluation call. With plain tables and an unwrapped DenseModel it is an
ordinary single-process module, which is how the tests check the distributed one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gr_train.config import Config, ModelConfig
from gr_train.data.sample import DatasetInfo
from gr_train.model.heads import binary_tasks_loss, sampled_softmax_loss
from gr_train.model.hstu import HSTULayer
from gr_train.model.inputs import InputEncoder, Inputs, init_linear, make_inputs
from gr_train.model.mask import choose_exchange, mask_intervals
from gr_train.model.sasrec import SASRecLayer
from kernels.backend import compute_dtype
from parallel.embedding.lookup import lookup
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
    """Embedded tokens in, what the label rows say out."""

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__()
        model, max_length = config.model, config.data.max_length
        self.mask, self.num_contextual = model.mask, len(info.contextual)
        self.fp32_residual = config.train.fp32_residual
        self.encoder = InputEncoder(model.width, max_length, model.time_buckets, model.dropout)
        exchange = choose_exchange(config.parallel.exchange, model.mask)
        count = model.num_layers
        recomputing = count if model.recompute_layers is None else model.recompute_layers
        configs = [model] * recomputing + [replace(model, recompute="none")] * (count - recomputing)
        self.layers = nn.ModuleList(
            HSTULayer(layer, max_length, exchange) if model.kind == "hstu" else SASRecLayer(layer)
            for layer in configs
        )
        self.norm = nn.LayerNorm(model.width)
        self.head = (
            init_linear(nn.Linear(model.width, len(info.tasks)))
            if model.task == "ranking"
            else nn.Identity()
        )

    def forward(self, embedded: dict[str, Tensor], inputs: Inputs, shard: Shard) -> Tensor:
        """[label rows, width] for retrieval, logits [label rows, tasks] for ranking."""
        seen = Visibility(shard, partial(mask_intervals, self.mask, self.num_contextual))
        x = self.encoder(embedded, inputs, shard)
        if not self.fp32_residual:
            x = x.to(compute_dtype(x))
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(self.norm(x.index_select(0, inputs.label_rows)))


class Recommender:
    """Joins tables and dense model. Calls are collective over all processes."""

    def __init__(
        self,
        config: ModelConfig,
        info: DatasetInfo,
        embeddings: nn.Module,
        dense: nn.Module,
        world: dist.ProcessGroup | None,
        precision: torch.dtype | None = None,
    ) -> None:
        """precision: of the dense model's matrix products; None leaves them in float32."""
        self.config, self.info = config, info
        self.embeddings, self.dense, self.world = embeddings, dense, world
        self.precision = precision
        self.features = [name for table in tables(config, info) for name in table.features]

    def loss(self, shard: Shard, negatives: Tensor | None = None) -> Tensor:
        """The mean loss over the labels of *all* ranks, as a number whose gradient DDP can average.

        negatives: int64 [M] item ids, the same on every rank (retrieval).
        Each rank returns world size * its sum / global count: the mean over ranks, of the value and
        of every gradient, is then the global mean. TorchRec averages gradients over ranks as well.
        """
        inputs = self._inputs(shard, last_only=False)
        if self.config.task == "retrieval":
            assert negatives is not None
            hidden, found = self._forward(
                shard, inputs, {"label": inputs.labels, "negative": negatives}
            )
            total = sampled_softmax_loss(
                hidden,
                inputs.labels,
                found["label"],
                negatives,
                found["negative"],
                self.config.temperature,
            )
        else:
            logits, _ = self._forward(shard, inputs, {})
            total = binary_tasks_loss(logits, inputs.labels)
        count = torch.full((), inputs.labels.numel(), dtype=torch.float32, device=shard.device)
        size = 1
        if self.world is not None:
            dist.all_reduce(count, group=self.world)
            size = self.world.size()
        return total * size / count.clamp(min=1)

    def predict(self, shard: Shard) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the label rows say, their labels, and the labels' embeddings (retrieval).

        Retrieval predicts from each sequence's last history token alone.
        """
        inputs = self._inputs(shard, last_only=True)
        labels = {"label": inputs.labels} if self.config.task == "retrieval" else {}
        out, found = self._forward(shard, inputs, labels)
        return out, inputs.labels, found.get("label")

    def item_embeddings(self, items: Tensor) -> Tensor:
        """[n, width] of item ids [n]; every rank may ask for other items."""
        return self._lookup({"item": items})["item"]

    def _inputs(self, shard: Shard, *, last_only: bool) -> Inputs:
        return make_inputs(
            shard,
            contextual=list(self.info.contextual),
            task=self.config.task,
            style=self.config.input_style,
            last_only=last_only,
        )

    def _forward(
        self, shard: Shard, inputs: Inputs, more: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self._lookup({**inputs.ids, **more})
        # Losses and ranks stay outside: they compare items whose scores half precision would tie.
        autocast = torch.autocast(
            shard.device.type, self.precision, enabled=self.precision is not None
        )
        with autocast:
            return self.dense(found, inputs, shard), found

    def _lookup(self, ids: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sharded tables want every feature in every call: those not asked for get no ids."""
        none = next(iter(ids.values()))[:0]
        return lookup(self.embeddings, {name: ids.get(name, none) for name in self.features})
