"""The dense optimizer and the schedule, which the tables' fused optimizer follows."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.optim.keyed import KeyedOptimizer

from gr_train.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on vectors (norms, biases)."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=parameters[0].is_cuda,  # one launch, where the default makes some ten
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up, then constant or a cosine to zero at the last step."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)


def follow_schedule(tables: KeyedOptimizer, lr: float, schedule: LambdaLR) -> None:
    """Set the tables' learning rate to lr times the schedule's factor of this step.

    Before the step's backward pass, which is where the tables are updated.
    """
    factor = schedule.lr_lambdas[0](schedule.last_epoch)
    for group in tables.param_groups:
        group["lr"] = lr * factor
    tables.step()  # hands the rate to the kernels; updates nothing itself
