"""Which fields follow others: what changing one part of a recipe means for its other parts.

A configuration is made in layers: the defaults, which are the paper's recipe, then the file, then the command line. A layer
that gives a field without the one that belongs to it means both: a crop size takes its resize size along, the number of
epochs the epochs after which the learning rate drops.
"""

from collections.abc import Mapping
from typing import Any

# What follows which field.
FOLLOWERS = {
    "data.resize_size": "data.crop_size",
    "optim.milestones": "optim.epochs",
    "optim.warmup_epochs": "optim.epochs",
}
TRUE = ("true", "t", "yes", "y", "on", "1")  # as pydantic reads a truth value
WARMUP_EPOCHS = 5.0  # of Goyal et al. 2017, for 90 epochs; of few a fifth, which ends before a drop at a third of them


def following_fields(
    defaults: Mapping[str, Any], layers: tuple[Mapping[str, Any], ...], held: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields, by key, that follow others which a layer gives without them.

    Args:
        defaults: all fields.
        layers: fields as a file or a command line gives them, not checked yet; a later one wins.
        held: fields that are changed on purpose in a run that resumes: they take another along if that is held too; else the
            run keeps it (`fields_of_run`).
    """
    state, followed = dict(defaults), dict[str, Any]()
    merged = {**defaults, **{key: value for layer in layers for key, value in layer.items()}}
    large_batch = str(merged["optim.large_batch"]).lower() in TRUE
    for layer in layers:
        new: dict[str, Any] = {}
        if _follows("data.resize_size", held):
            new |= _resize_size(state, layer)
        if _follows("optim.milestones", held) and merged["optim.schedule"] == "step":
            new |= _milestones(state, layer)
        if large_batch and "optim.batch_size" not in held:
            new |= _learning_rates(state, layer)
        followed = {key: value for key, value in followed.items() if key not in layer} | new
        state |= {**layer, **new}
    warms_up_itself = merged["optim.schedule"] == "one_cycle"
    if large_batch and not warms_up_itself and not any("optim.warmup_epochs" in layer for layer in layers):
        epochs = _number(merged["optim.epochs"])
        followed["optim.warmup_epochs"] = min(WARMUP_EPOCHS, (epochs or 5 * WARMUP_EPOCHS) / 5)
    return followed


def fields_of_run(run: Mapping[str, Any], given: Mapping[str, Any], held: tuple[str, ...]) -> dict[str, Any]:
    """The fields that a run keeps which resumes with another field that they follow in a new run.

    Args:
        run: all fields of the run as it was.
        given: those of the command line, which it does not keep.
        held: as of `following_fields`.
    """
    return {key: run[key] for key in FOLLOWERS if not _follows(key, held) and key not in given and key in run}


def _follows(key: str, held: tuple[str, ...]) -> bool:
    return FOLLOWERS[key] not in held or key in held


def _resize_size(state: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, int]:
    crop, before, resize = (
        _number(v) for v in (layer.get("data.crop_size"), *_of(state, "data.crop_size", "data.resize_size"))
    )
    if "data.resize_size" in layer or not (crop and before and resize):
        return {}
    return {"data.resize_size": resize_with(int(crop), int(before), int(resize))}


def resize_with(crop_size: int, crop_before: int, resize_before: int) -> int:
    """The resize size, in pixels, that belongs to a crop size as `resize_before` belonged to `crop_before`."""
    return round(crop_size * resize_before / crop_before)


def _milestones(state: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Rounded down; a drop before the first epoch is none. Fractions of the epochs need not follow."""
    epochs, before = _number(layer.get("optim.epochs")), _number(state["optim.epochs"])
    drops = [_number(drop) for drop in state["optim.milestones"]] if _is_list(state["optim.milestones"]) else [None]
    if "optim.milestones" in layer or not (epochs and before) or not all(d is not None and d == int(d) for d in drops):
        return {}
    scaled = (int(drop) * int(epochs) // int(before) for drop in drops if drop)
    return {"optim.milestones": tuple(dict.fromkeys(drop for drop in scaled if drop))}


def _learning_rates(state: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, float]:
    """Of the network, and of the classifier where it has one of its own."""
    batch, before = _number(layer.get("optim.batch_size")), _number(state["optim.batch_size"])
    if "optim.lr" in layer or not (batch and before):
        return {}
    rates = {key: _number(state[key]) for key in ("optim.lr", "optim.head_lr") if key not in layer}
    return {key: rate * (batch / before) for key, rate in rates.items() if rate}


def _of(state: Mapping[str, Any], *keys: str) -> list[Any]:
    return [state[key] for key in keys]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _number(value: Any) -> float | None:
    """None if it is none, or none that can be counted with: the field's own type says so."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < 1e9 else None
