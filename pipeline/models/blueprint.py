"""What the modules of a network were when it was built, to tell them from modules that only look like them.

An implementation that computes a whole dense block reads parameters and does not call the modules. That is right only
while calling them would do what the constructor made them do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CHANGEABLE = {"training", "eps", "momentum", "inplace", "p"}  # settings that implementations read, or need not know
TENSORS = (Tensor, nn.Parameter)  # not their subclasses, which may mean something else by an operation

_CALL = nn.Module.__call__
_FORWARD: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential)
}


def remember(*kinds: type[nn.Module]) -> None:
    """Note what `forward` of these classes is, for `difference`; of no others a network may be made."""
    _FORWARD.update({kind: kind.forward for kind in kinds})


class ModuleBlueprint(NamedTuple):
    """What one module was.

    Attributes:
        settings: public attributes that do not change, such as stride.
        attributes: names of all attributes of the instance.
        shapes: of parameters and buffers; None stands for one that is absent, such as a bias.
    """

    kind: type[nn.Module]
    settings: dict[str, Any]
    attributes: frozenset[str]
    shapes: dict[str, torch.Size | None]


Blueprint = dict[str, ModuleBlueprint]


def blueprint(root: nn.Module) -> Blueprint:
    """What the modules below `root`, and `root` itself by the name "", are now."""
    return {
        name: ModuleBlueprint(type(module), _settings(module), frozenset(vars(module)), _shapes(module))
        for name, module in root.named_modules(remove_duplicate=False)
    }


def difference(root: nn.Module, expected: Blueprint) -> str:
    """The first difference between the modules below `root` and what they were, in a few words; empty if there is none.

    Hooks, an overridden `forward`, and tensors that are no plain `Tensor` are differences too.
    """
    if nn.Module.__call__ is not _CALL:
        return "nn.Module.__call__ is replaced"
    modules = dict(root.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        where = name or "features"
        if name not in expected:
            return f"{where} was added"
        before = expected[name]
        if type(module) is not before.kind:
            return f"{where} is a {type(module).__name__}"
        if before.kind not in _FORWARD:
            return f"{where} is a {before.kind.__name__}"
        if before.kind.forward is not _FORWARD[before.kind]:
            return f"{before.kind.__name__}.forward is replaced"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"a hook on {where}"
        for attribute in vars(module).keys() - before.attributes:
            if hasattr(before.kind, attribute):  # a method, such as forward
                return f"{where}.{attribute} is overridden"
        prefix = f"{name}." if name else ""
        for key, value in before.settings.items():
            if getattr(module, key, None) != value:
                return f"{prefix}{key} is {getattr(module, key, None)}, not {value}"
        if _shapes(module) != before.shapes:
            return f"{where} has other parameters or buffers than it was built with"
        for key, tensor in _tensors(module):
            if tensor is not None and type(tensor) not in TENSORS:
                return f"{prefix}{key} is a {type(tensor).__name__}"
    missing = expected.keys() - modules.keys()
    if missing:
        return f"{min(missing)} is missing"
    return "" if list(modules) == list(expected) else "the modules are in another order"


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in CHANGEABLE}


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    return {key: None if tensor is None else tensor.shape for key, tensor in _tensors(module)}
