"""The optimisers by name, and the learning rate as a pure function of the step."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
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


def of_timm(name: str, parameters: Parameters, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name, with its own defaults for what the configuration has no field for (betas, epsilon)."""
    from timm.optim import create_optimizer_v2  # takes seconds to import

    given: list[Any] = list(parameters)
    return create_optimizer_v2(given, name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)


# Of timm's optimisers those that resume to the same bits, which tests/test_optim.py holds.
TIMM = (
    "adabelief",
    "adamw",
    "adan",
    "adopt",
    "lamb",
    "lambc",
    "larc",
    "lars",
    "lion",
    "madgrad",
    "nadamw",
    "rmsproptf",
)

OPTIMIZERS: dict[str, Callable[[Parameters, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    **{name: partial(of_timm, name) for name in TIMM},
}


def create_optimizer(network: nn.Module, config: OptimConfig, name: str = "") -> torch.optim.Optimizer:
    """Build the optimiser that the configuration names, for all parameters.

    Weight decay is on all of them, or without ``optim.decay_norms`` on those of two dimensions or more: neither on norms nor
    on biases. Parameters that are treated alike are a group.

    Args:
        name: the network's, for messages.

    Raises:
        UserError: there is none of that name; or `parts_of` does not know the network that optim.layer_decay is for.
    """
    create = look_up(OPTIMIZERS, config.optimizer, "optim.optimizer")
    if config.head_lr is None and config.layer_decay == 1 and config.decay_norms:
        return create(network.parameters(), config)
    scales = _learning_rate_scales(network, config, name)
    groups: dict[tuple[float, bool], list[torch.Tensor]] = {}
    for entry, parameter in network.named_parameters():
        groups.setdefault((scales[entry], config.decay_norms or parameter.dim() > 1), []).append(parameter)
    return create(
        [
            {"params": alike, "lr_scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
            for (scale, decays), alike in groups.items()
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


def state_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Any]:
    """An optimiser's state dictionary, in which parameters have their numbers in the network's order, however grouped."""
    state, places = optimizer.state_dict(), _places(optimizer, network)
    groups = [{**group, "params": [places[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {places[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def load_state(optimizer: torch.optim.Optimizer, network: nn.Module, state: dict[str, Any]) -> None:
    """Resume what `state_of` gave under the optimiser's own groups and hyperparameters.

    A group takes over only what it lacks before the first step: a count of steps that some optimisers keep there.
    What belongs to a parameter is laid out as the parameter is: torch's kernels for many parameters at once need that.
    """
    groups, places = optimizer.state_dict()["param_groups"], _places(optimizer, network)
    kept = {key: value for key, value in state["param_groups"][0].items() if key not in {"lr_scale", *groups[0]}}
    optimizer.load_state_dict(
        {
            "state": {i: state["state"][place] for i, place in enumerate(places) if place in state["state"]},
            "param_groups": [{**copy.deepcopy(kept), **group} for group in groups],
        }
    )
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    _begin_momentum(optimizer)


def _places(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[int]:
    """The place in the network's order of each parameter, in the order of the optimiser's groups."""
    order = {id(parameter): place for place, parameter in enumerate(network.parameters())}
    return [order[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`, times its own "lr_scale" if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1)


def rates_of_parts(optimizer: torch.optim.Optimizer, config: OptimConfig, rate: float) -> dict[str, float]:
    """Learning rates of parts whose rate is another than `rate`, by the part's name: the classifier's, and with
    optim.layer_decay that of the first part that trains. Empty where all have the same."""
    rates = {}
    if config.head_lr is not None:
        rates["classifier"] = rate * config.head_lr / config.lr
    if config.layer_decay != 1:
        trained = (group for group in optimizer.param_groups if any(p.requires_grad for p in group["params"]))
        rates["first trained part"] = rate * next(trained)["lr_scale"]  # groups are in the network's order
    return {part: own for part, own in rates.items() if own != rate}


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the optimiser step `step`, counted from 0 over the whole run."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs or config.warmup_epochs >= config.epochs:
        return config.lr * min(1, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "one_cycle":
        return _one_cycle(config.lr, step, config.epochs * steps_per_epoch)
    if config.schedule != "step":
        progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        remaining = _cosine(progress) if config.schedule == "cosine" else (1 - progress) ** config.poly_power
        return config.min_lr + (config.lr - config.min_lr) * remaining
    drops = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return config.lr * config.lr_gamma**drops


def _cosine(progress: float) -> float:
    """From 1 to 0 along half a wave."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(peak: float, step: int, steps: int) -> float:
    """torch's OneCycleLR with its defaults (Smith and Topin 2018), the momentum left as it is."""
    start, end, top = peak / 25, peak / 25e4, 0.3 * steps - 1
    if step < top:
        return peak + (start - peak) * _cosine(step / top)
    return end + (peak - end) * _cosine((step - top) / (steps - 1 - top))
