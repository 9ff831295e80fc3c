"""The dense model's residual stream is of the dtype that the config asks for."""

from __future__ import annotations

import pytest
import torch

from gr_train.config import Config, ModelConfig, TrainConfig
from gr_train.data.collate import collate
from gr_train.model.inputs import make_inputs
from gr_train.model.recommender import DenseModel
from kernels.masks import hstu_intervals
from parallel.layout import ZigzagLayout
from parallel.shard import shard_batch
from parallel.visibility import Visibility
from tests.gr_train.samples import INFO, make_samples


@pytest.mark.parametrize(
    ("autocast", "fp32_residual", "want"),
    [
        (True, False, torch.bfloat16),
        (True, True, torch.float32),
        (False, False, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_residual_stream(kind: str, autocast: bool, fp32_residual: bool, want: torch.dtype) -> None:
    model = ModelConfig(kind=kind, width=16, qk_dim=8, v_dim=8)
    config = Config(model=model, train=TrainConfig(fp32_residual=fp32_residual))
    dense = DenseModel(config, INFO)
    context = list(INFO.contextual)
    batch = collate(
        make_samples([3, 9], [0, 0], num_contextual=len(context)),
        task=model.task,
        style=model.input_style,
        num_contextual=len(context),
        max_length=config.data.max_length,
    )
    shard = shard_batch(batch, ZigzagLayout(1), None)
    inputs = make_inputs(
        shard, contextual=context, task=model.task, style=model.input_style, last_only=False
    )
    embedded = {name: torch.randn(len(ids), 16) for name, ids in inputs.ids.items()}
    streams: list[torch.dtype] = []
    for layer in dense.layers:
        layer.register_forward_hook(lambda _, x, out: streams.extend([x[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dense(embedded, inputs, Visibility(shard, hstu_intervals))
    assert streams == [want] * 4
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in dense.parameters())
