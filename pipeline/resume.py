"""Whether a run may go on from a checkpoint: under the conditions that it was started with, and no others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.parsing import flatten

# What may change between two starts of a run. Where the data lie is free because its fingerprint is compared, and
# the accumulation because it is compared together with the number of ranks.
FREE_TO_CHANGE = {
    "run_dir", "model.activation_checkpointing", "data.dir", "data.train", "data.val", "data.val_labels", "data.threads",
    "data.download", "data.corrupt_images", "optim.grad_accum_steps", "train.device", "train.compile", "train.eval_batch_size",
    "train.log_every", "train.reuse_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.heartbeat_timeout",
    "train.allow_world_size_change",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a run was started with, besides its configuration.

    Attributes:
        classes: class names.
        fingerprint: of the training and the validation images.
        images: how many of each.
        loader: "dali", "reference" or "synthetic".
        ranks: number of ranks.
    """

    classes: list[str]
    fingerprint: str
    images: list[int]
    loader: str
    ranks: int


def check_same_run(state: dict[str, Any], config: Config, now: Conditions) -> None:
    """Refuse to go on from the checkpoint `state` if something that the result depends on has changed.

    Raises:
        UserError: names what has changed, with both values.
    """
    if not state.keys() >= {"optimizer", "scaler", "progress", "conditions"}:
        _refuse(config, "its checkpoint holds a network but no training")
    old, new = flatten(state["config"]), flatten(dataclasses.asdict(config))
    for key, value in new.items():
        if key in old and key not in FREE_TO_CHANGE and not key.startswith("published.") and old[key] != value:
            _refuse(config, f"{key} was {old[key]} and is now {value}")
    before = Conditions(**state["conditions"])
    if before.classes != now.classes:
        _refuse(config, f"the classes were {_difference(before.classes, now.classes)}")
    if before.fingerprint != now.fingerprint:
        _refuse(config, f"the data in {config.data.dir} were {_named(before)} and are now {_named(now)}")
    if before.loader != now.loader:
        _refuse(config, f"the loader was {before.loader} and is now {now.loader}")
    was, is_now = (
        batch_split(before.ranks, old["optim.grad_accum_steps"]),
        batch_split(now.ranks, config.optim.grad_accum_steps),
    )
    if was != is_now and not config.train.allow_world_size_change:
        _refuse(
            config,
            f"a batch was {was} and is now {is_now}",
            "put it back, allow it with --train.allow_world_size_change true",
        )


def batch_split(ranks: int, accumulation: int) -> str:
    """How a global batch is divided, in words."""
    return f"{ranks} ranks x {accumulation} accumulation steps"


def _named(data: Conditions) -> str:
    return f"{' + '.join(map(str, data.images))} images with the fingerprint {data.fingerprint[:12]}"


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    """The first place where two lists of names differ."""
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    was, is_now = (names[place] if place < len(names) else "none" for names in (old, new))
    return f"{len(old)} with '{was}' in place {place} and are now {len(new)} with '{is_now}'"


def _refuse(config: Config, why: str, way_out: str = "put it back") -> None:
    raise UserError(f"cannot resume {config.run_dir}: {why}; {way_out}, or start anew with another --run_dir")
