"""Whether a run may resume from what its directory holds: from a whole checkpoint, and as the run that it is."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint import CheckpointFolder, FoundCheckpoint
from pipeline.config import OF_WEIGHTS, Config
from pipeline.errors import UserError
from pipeline.followers import FOLLOWERS
from pipeline.history import batch_split
from pipeline.parsing import flatten, value_text
from pipeline.run_dir import traces_of_checkpoints
from pipeline.unused import unused_fields
from pipeline.words import agreed, counted

# What may change between two starts of a run. Where the data lie is free because its fingerprint is compared, and
# the accumulation because it is compared together with the number of ranks.
FREE_TO_CHANGE = {
    "run_dir", "model.activation_checkpointing", "data.dir", "data.train", "data.val", "data.val_labels", "data.threads",
    "data.file_column", "data.label_column",
    "data.download", "data.from_weights", "optim.grad_accum_steps", "train.device", "train.compile", "train.memory_format",
    "train.cudnn_benchmark", "train.deterministic", "optim.fused", "optim.large_batch", "train.eval_batch_size",
    "train.log_every", "train.pictures_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.heartbeat_timeout",
    "train.allow_world_size_change", "train.change",
}  # fmt: skip

# Without these a checkpoint is of another network or other data, and a run that changes them is another run.
NEVER_TO_CHANGE = (
    "model.name", "model.weights", "model.weights_sha256", "data.dataset", "data.labels", "data.loader", "seed",
    "optim.batch_size", "optim.optimizer", "data.holdout", "data.channels", "data.synthetic_images", "data.synthetic_classes",
)  # fmt: skip
OF_THE_DATA = {key for key in NEVER_TO_CHANGE if key.startswith("data.")} - {"data.loader"}

# These may change without being asked for, and the history tells.
TOLD = ("data.corrupt_images", "train.not_finite")


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a run was started with, besides its configuration.

    Attributes:
        classes: class names.
        fingerprint: of the training and the validation images.
        images: how many of each.
        loader: a name in `loader.IMAGE_PIPELINES`.
        ranks: number of ranks.
        class_weights: of the classes in the loss, None for equal ones.
        val_fingerprint: of the validation images alone, by which runs are comparable; None in checkpoints of before.
    """

    classes: list[str]
    fingerprint: str
    images: list[int]
    loader: str
    ranks: int
    class_weights: list[float] | None = None
    val_fingerprint: str | None = None


def find_checkpoint(run_dir: Path) -> FoundCheckpoint | None:
    """Read the newest checkpoint of a run and change nothing; None in a directory where no run has saved one yet.

    Raises:
        UserError: a file cannot be read, or there was a run here and none of its checkpoints is whole.
    """
    folder = CheckpointFolder(run_dir / "checkpoints")
    found, damaged = folder.find()
    if found:
        return found
    traces = [f"{path.name} (damaged)" for path in damaged]
    traces += traces_of_checkpoints(run_dir)
    if traces:
        raise UserError(
            f"{run_dir} holds a run ({', '.join(traces)}) but no checkpoint to resume from: put a copy of its last.pt into "
            f"{folder.last.parent}, or start anew with another --run_dir, or rename {run_dir} first"
        )
    return None


def loader_of(found: FoundCheckpoint | None) -> str | None:
    """The loader of the run that saved a checkpoint. Loaders differ in the last bits, so that the run keeps its own."""
    return found.state.get("conditions", {}).get("loader") if found else None


def recipe_changes(before: Config, now: Config) -> list[str]:
    """What a configuration asks for otherwise than a run of another did, a few words each, as far as configurations tell.

    Not compared is what may change between two starts, and what a run finds itself: what ``auto`` comes to, the checksum of
    its weights, and what it takes over from them.
    """
    old, new = (flatten(dataclasses.asdict(config)) for config in (before, now))
    found = {f"data.{name}" for group in OF_WEIGHTS for name in group if set(group) & set(now.data.from_weights)}
    if new["data.loader"] == "auto":
        found.add("data.loader")
    if old["model.weights"] and new["model.weights"]:  # of two files, here and below, the run compares what they hold
        found |= {"model.weights"} if new["model.weights_sha256"] else {"model.weights", "model.weights_sha256"}
    if None not in (weights := {old["optim.class_weights"], new["optim.class_weights"]}) and "balanced" not in weights:
        found.add("optim.class_weights")
    free = FREE_TO_CHANGE | unused_fields(new) | found
    return [
        f"{key} was {value_text(old[key])} and is now {value_text(value)}"
        for key, value in new.items()
        if key not in free and not key.startswith("published.") and old[key] != value
    ]


def check_same_run(state: Mapping[str, Any], config: Config, now: Conditions) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume from the checkpoint `state` if something that the result depends on has changed unasked.

    Returns:
        The fields that ``train.change`` names and that have changed, key -> (old, new).

    Raises:
        UserError: names what has changed, with both values.
    """
    if not state.keys() >= {"optimizer", "scaler", "progress", "conditions"}:
        raise _refusal(config, ["its checkpoint holds a network but no training"], "put it back")
    defaults = flatten(dataclasses.asdict(Config()))
    old = defaults | flatten(state["config"])  # an older checkpoint lacks fields that came later
    changed: dict[str, tuple[Any, Any]] = {}
    refused: list[str] = []  # in words
    fixed: list[str] = []  # of these what can never change
    on_purpose: list[str] = []  # fields that may change with train.change, and have
    new = flatten(dataclasses.asdict(config))
    before = Conditions(**state["conditions"])
    free = FREE_TO_CHANGE | unused_fields(new)
    for key, value in new.items():
        if key == "data.loader":  # what it has come to is compared
            continue
        if key in free or key.startswith("published.") or old[key] == value:
            continue
        if key == "model.weights" and old[key] and value:  # another path: model.weights_sha256 is compared
            continue
        if key == "optim.class_weights" and before.class_weights and before.class_weights == now.class_weights:
            continue  # another path of the same weights
        if key in NEVER_TO_CHANGE:
            fixed.append(key)
        elif key not in TOLD:
            on_purpose.append(key)
        if key in TOLD or (key in config.train.change and key not in fixed):
            changed[key] = (old[key], value)
        else:
            refused.append(f"{key} was {value_text(old[key])} and is now {value_text(value)}")
    if not set(fixed) & OF_THE_DATA:  # which says it already
        if before.classes != now.classes:
            fixed.append("the classes")
            refused.append(f"the classes were {_difference(before.classes, now.classes)}")
        elif before.fingerprint != now.fingerprint:
            fixed.append("the data")
            refused.append(f"the data in {config.data.dir} were {_named(before)} and are now {_named(now)}")
        elif before.class_weights != now.class_weights and "optim.class_weights" not in on_purpose:
            fixed.append("the class weights")
            refused.append(f"the class weights of {config.optim.class_weights} were others")
    if before.loader != now.loader:
        fixed.append("data.loader")
        refused.append(f"data.loader was {before.loader} and is now {now.loader}")
    was = batch_split(before.ranks, old["optim.grad_accum_steps"])
    is_now = batch_split(now.ranks, config.optim.grad_accum_steps)
    resplit = was != is_now and not config.train.allow_world_size_change
    if resplit:
        refused.append(f"a batch was {was} and is now {is_now}")
    done = state["progress"]["epoch"]
    if refused:
        raise _refusal(config, refused, _way_out(fixed, on_purpose, resplit, done, config.optim.epochs))
    _check_names(config)
    if changed and done >= config.optim.epochs:
        planned, step = old["optim.epochs"], state["progress"]["step"]
        begun = f" and {counted(step, 'step')}" if step else ""
        so_far = f"has {counted(done, 'epoch')}{begun} of {planned}"
        complete = f"is complete ({counted(done, 'epoch')})"
        more = _names([*on_purpose, "optim.epochs"])
        raise UserError(
            f"{config.run_dir} {so_far if done < planned else complete}, and nothing is left "
            f"to train with another {', '.join(changed)}: give more optim.epochs (--train.change {more}), or another --run_dir"
        )
    return changed


def _way_out(fixed: Sequence[str], on_purpose: Sequence[str], resplit: bool, done: int, epochs: int) -> str:
    """What to do about all that has changed, so that nothing of it is refused a second time.

    Args:
        fixed: what can never change.
        on_purpose: fields that have changed and may.
        resplit: a batch is divided otherwise.
        done, epochs: the epochs that the run has, and that it shall have now.
    """
    complete = bool(on_purpose) and done >= epochs
    keys = _names([*on_purpose, "optim.epochs"] if complete else on_purpose)
    flags = ["--optim.epochs N"] if complete else []
    flags += [f"--train.change {keys}"] if keys else []
    flags += ["--train.allow_world_size_change"] if resplit else []
    if not flags:
        fields = ", ".join(name for name in fixed if name in NEVER_TO_CHANGE)
        return f"put it back{f' (a run with another {fields} is another run)' if fields else ''}"
    words = f"{' '.join(flags)}{f' (N above {done}, the epochs that the run has)' if complete else ''}"
    kept = [key for key in on_purpose if FOLLOWERS.get(key) in on_purpose]
    if kept and not complete:
        words += (
            f" ({' and '.join(kept)} neither named nor given: {agreed(len(kept), 'stays', 'stay')} as the run has it)"
        )
    if fixed:
        return f"{' and '.join(fixed)} must be as before; the rest may change with {words}"
    return f"put it back, {'change it on purpose' if keys else 'allow it'} with {words}"


def _names(keys: Sequence[str]) -> str:
    return ",".join(dict.fromkeys(keys))


def _check_names(config: Config) -> None:
    """Refuse names in ``train.change`` whose change makes another run."""
    if wrong := [key for key in config.train.change if key in NEVER_TO_CHANGE]:
        raise UserError(
            f"train.change: a run with another {', '.join(wrong)} is another run: start it with another --run_dir"
        )


def _named(data: Conditions) -> str:
    return f"{' + '.join(map(str, data.images))} images with the fingerprint {data.fingerprint[:12]}"


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    """The first place where two lists of names differ."""
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    was, is_now = (names[place] if place < len(names) else "none" for names in (old, new))
    return f"{len(old)} with '{was}' in place {place} and are now {len(new)} with '{is_now}'"


def _refusal(config: Config, why: Sequence[str], way_out: str) -> UserError:
    return UserError(
        f"cannot resume {config.run_dir}: {'; '.join(why)}; {way_out}, or start anew with another --run_dir"
    )
