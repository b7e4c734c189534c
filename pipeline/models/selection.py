"""Which implementation of the dense block a forward pass takes, chosen once and again when something has changed."""

import re
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from pipeline.models.backends import BACKENDS, candidates
from pipeline.models.blueprint import HOOKS, TENSORS, Blueprint, blueprint, difference

_BLOCK = re.compile(r"(?:denseblock|transition)(\d+)\.")


@dataclass(frozen=True)
class Selection:
    """A backend by its name, or "eager", and why not the one asked for or a faster one."""

    method: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})" if self.reason else self.method


class Selector:
    """Chooses for one network.

    Args:
        features: the network's modules up to the classifier, as they were built.

    Attributes:
        held: nobody changes the modules now, so that they need not be compared.
    """

    held = False

    def __init__(self, features: nn.Module):
        self._blueprint: Blueprint = blueprint(features)
        self._last: _Decision | None = None

    def select(self, features: nn.Module, x: Tensor, wanted: str) -> Selection:
        """The implementation for images x: what is wanted, or else the nearest to it that is right.

        Raises:
            UserError: there is no `wanted`.
        """
        if wanted == "eager":
            return Selection("eager")
        if torch.compiler.is_compiling():
            return Selection("eager", "torch.compile traces the modules")
        reason = _interception() if type(x) in TENSORS else f"the input is a {type(x).__name__}"
        if reason:
            return Selection("eager", reason)
        circumstances = (wanted, features.training, *_circumstances(x))
        last = self._last  # one read and one write: threads may share a network
        if (
            last is None
            or last.circumstances != circumstances
            or (not self.held and last.network.has_changed(features))
        ):
            selection = _select(features, x, wanted, self._blueprint)
            last = self._last = _Decision(circumstances, _State(features), selection)
        return last.selection

    def hold(self) -> None:
        """Select once more, and then compare the modules no longer."""
        self.held, self._last = True, None

    def __getstate__(self) -> dict[str, Any]:  # of a copy or a pickled network: without its last decision
        return {"_blueprint": self._blueprint, "_last": None}


class _State:
    """What a selection depends on in a network's modules. It is compared often, so without a walk over the modules."""

    def __init__(self, features: nn.Module):
        self._features = features
        self._modules = list(features.modules())
        self._attributes = [vars(module) for module in self._modules]
        self._hooks = [attributes[key] for attributes in self._attributes for key in HOOKS]
        self._children = [attributes["_modules"] for attributes in self._attributes]
        self._groups = [attributes[key] for attributes in self._attributes for key in ("_parameters", "_buffers")]
        self._known_tensors = self._tensors()  # which live on, so that no address is used twice
        self._known_values, self._known_layouts = self._values(), self._layouts(self._known_tensors)

    def has_changed(self, features: nn.Module) -> bool:
        tensors = self._tensors()
        if features is not self._features or len(tensors) != len(self._known_tensors):
            return True
        if not all(map(is_, tensors, self._known_tensors)):
            return True
        try:
            return self._values() != self._known_values or self._layouts(tensors) != self._known_layouts
        except (RuntimeError, ValueError):  # an attribute that was set to a tensor or array, which == cannot compare
            return True

    def _tensors(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._groups)))

    def _values(self) -> list[Any]:
        """Classes and their `forward`, the numbers of hooks, children, and all attributes; most compare by identity."""
        kinds = [type(module) for module in self._modules]
        values = chain.from_iterable(map(dict.values, chain(self._children, self._attributes)))
        return [nn.Module.__call__, *kinds, *(kind.forward for kind in kinds), *map(len, self._hooks), *values]

    def _layouts(self, tensors: list[Tensor | None]) -> list[Any]:
        present = [tensor for tensor in tensors if tensor is not None]
        types = [*map(attrgetter("dtype", "device", "layout"), present)]
        dense = [tensor for tensor in present if tensor.layout is torch.strided]
        trained = map(attrgetter("requires_grad"), present)
        return [*types, *trained, *map(Tensor.stride, dense), *map(Tensor.size, dense), *map(Tensor.is_neg, dense)]


@dataclass(frozen=True)
class _Decision:
    circumstances: tuple[Any, ...]
    network: _State
    selection: Selection


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """All outside of the modules on which a selection depends."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (
        x.device,
        x.dtype,
        x.layout,
        x.dim(),
        x.numel() == 0,
        x.requires_grad,
        torch.get_autocast_dtype(device) if autocast else None,
        torch.is_grad_enabled(),
    )


def _interception() -> str:
    """Who wants to see each operation or module call, in a few words; empty if nobody does."""
    if torch.jit.is_tracing():
        return "torch.jit traces the modules"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func needs each operation"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives need each operation"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode of torch needs each operation"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a function mode of torch needs each operation"
    return "a hook on all modules" if _has_any_global_hook() else ""


def _select(features: nn.Module, x: Tensor, wanted: str, built: Blueprint) -> Selection:
    names = candidates(wanted)
    frozen = _frozen_parts(features, x)
    reason = _unsupported(features, x, built, frozen)
    if reason:
        return Selection("eager", reason)
    still = next((norm for norm in _norms_of_other_mode(features) if _part(norm) in frozen), "")
    reasons: list[str] = []
    for name in names:
        reason = BACKENDS[name].unsupported(features, x)
        if still and not BACKENDS[name].FROZEN_PARTS:
            reason = reason or f"{still} is frozen"
        if not reason:
            return Selection(name, reasons[0] if reasons else "")
        reasons.append(reason)
    return Selection("eager", reasons[0] if reasons else "")


def _part(name: str) -> int:
    """What a module or parameter belongs to: 0 for the stem, i for the i-th block and its transition, -1 for the end."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else -1 if name.startswith("norm5") else 0


def _norms_of_other_mode(features: nn.Module) -> list[str]:
    """Names of the batch norms that train while the network does not, or the other way."""
    return [
        name
        for name, module in features.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.training != features.training
    ]


def _frozen_parts(features: nn.Module, x: Tensor) -> set[int]:
    """The stem and the first blocks, as far as nothing in them trains, and no gradient goes through them."""
    if not features.training or (x.requires_grad and torch.is_grad_enabled()):
        return set()
    moving = {_part(name) for name, parameter in features.named_parameters() if parameter.requires_grad}
    for name, module in features.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.training:
            moving.add(_part(name))
    frozen, part = set(), 0
    while part not in moving and part <= max(moving, default=0):
        frozen.add(part)
        part += 1
    return frozen


def _unsupported(features: nn.Module, x: Tensor, built: Blueprint, frozen: set[int]) -> str:
    """Why no backend can compute the stages and the modules must be called; empty if one may be able to."""
    if x.dim() != 4 or x.layout is not torch.strided:
        return "the input is no batch of images"
    if x.numel() == 0:
        return "the batch is empty"
    if "denseblock1.denselayer1.conv2" not in built:
        return "no bottlenecks"
    reason = difference(features, built)
    if reason:
        return reason
    if not features.training and torch.is_grad_enabled():
        return "gradients in evaluation mode"
    epsilons = set()
    for name, module in features.named_modules():
        if isinstance(module, nn.Dropout) and module.training:
            return "dropout"
        if isinstance(module, nn.BatchNorm2d):
            if module.training != features.training and _part(name) not in frozen:
                return f"{name} is frozen" if features.training else f"{name} is in training mode"
            if module.momentum is None:
                return f"{name}.momentum is None"
            if not name.endswith("norm2"):  # the others share statistics
                epsilons.add(module.eps)
    return "batch norms with different epsilons" if len(epsilons) > 1 else ""
