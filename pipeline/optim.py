"""The optimiser, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from pipeline.config import OptimConfig


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD with weight decay on every parameter, batch-norm and biases included, as in the paper (Section 4.2)."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the optimiser step `step`, counted from 0 over the whole run."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * min(1, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "cosine":
        progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    drops = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return config.lr * config.lr_gamma**drops
