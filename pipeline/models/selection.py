"""Which implementation of the dense block a forward pass takes, chosen once and again when something has changed."""

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
        return [*types, *map(Tensor.stride, dense), *map(Tensor.size, dense), *map(Tensor.is_neg, dense)]


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
    reason = _unsupported(features, x, built)
    if reason:
        return Selection("eager", reason)
    reasons: list[str] = []
    for name in names:
        reason = BACKENDS[name].unsupported(features, x)
        if not reason:
            return Selection(name, reasons[0] if reasons else "")
        reasons.append(reason)
    return Selection("eager", reasons[0] if reasons else "")


def _unsupported(features: nn.Module, x: Tensor, built: Blueprint) -> str:
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
            if module.training != features.training:
                return f"{name} is frozen" if features.training else f"{name} is in training mode"
            if module.momentum is None:
                return f"{name}.momentum is None"
            if not name.endswith("norm2"):  # the others share statistics
                epsilons.add(module.eps)
    return "batch norms with different epsilons" if len(epsilons) > 1 else ""
