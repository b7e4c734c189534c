"""The optimisers by name, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from itertools import chain, groupby
from typing import Any

import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.errors import look_up
from pipeline.models.parts import classifier_of, parts_of

Parameters = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


def sgd(parameters: Parameters, config: OptimConfig) -> torch.optim.SGD:
    """The paper's: momentum without dampening, and weight decay on every parameter (Section 4.2)."""
    given: list[Any] = list(parameters)
    optimizer = torch.optim.SGD(
        given,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=(config.fused and _on_gpu(given)) or None,  # None: torch chooses among its others
    )
    _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Have torch's fused kernel find a momentum of 0 where there is none yet, which gives the bits of none.

    It leaves memory uninitialised if the first step overflows, and takes no group in which only some parameters have one.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _on_gpu(parameters: list[Any]) -> bool:
    """Whether all of them, tensors or groups of them, are on GPUs."""
    tensors = chain.from_iterable(given["params"] if isinstance(given, dict) else [given] for given in parameters)
    return all(tensor.device.type == "cuda" for tensor in tensors)


OPTIMIZERS: dict[str, Callable[[Parameters, OptimConfig], torch.optim.Optimizer]] = {"sgd": sgd}


def create_optimizer(network: nn.Module, config: OptimConfig, name: str = "") -> torch.optim.Optimizer:
    """Build the optimiser that the configuration names, for all parameters, batch-norm's and biases included.

    Args:
        name: the network's, for messages.

    Raises:
        UserError: there is none of that name; or `parts_of` does not know the network that optim.layer_decay is for.
    """
    create = look_up(OPTIMIZERS, config.optimizer, "optim.optimizer")
    if config.head_lr is None and config.layer_decay == 1:
        return create(network.parameters(), config)
    scales = _learning_rate_scales(network, config, name)
    parameters = network.named_parameters()  # in their order, by which a checkpoint numbers them
    return create(
        [
            {"params": [parameter for _, parameter in group], "lr_scale": scale}
            for scale, group in groupby(parameters, key=lambda item: scales[item[0]])
        ],
        config,
    )


def _learning_rate_scales(network: nn.Module, config: OptimConfig, name: str) -> dict[str, float]:
    """Each parameter's learning rate as a multiple of optim.lr, by the parameter's name."""
    names = [entry for entry, _ in network.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if config.layer_decay != 1:
        part = parts_of(network, name)
        last = max(part.values())
        scales = {entry: config.layer_decay ** (last - part[entry]) for entry in names}
    if config.head_lr is not None:
        head = tuple(f"{module}." for module in classifier_of(network))
        scales |= {entry: config.head_lr / config.lr for entry in names if entry.startswith(head)}
    return scales


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Resume an optimiser's state under its own groups and hyperparameters, which `state` has as they were.

    Groups keep the order of the network's parameters, so that another division into groups changes no parameter's number.
    What belongs to a parameter is laid out as the parameter is: torch's kernels for many parameters at once need that.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    _begin_momentum(optimizer)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`, times its own "lr_scale" if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1)


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
