"""A run's configuration from a YAML file and from the command line, and back.

Every field can be given in the file (``optim: {lr: 0.2}``) and on the command line (``--optim.lr 0.2``,
which wins). Both are validated by the same types; a mistake is one line naming the key or the flag.
"""

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import renamed
from pipeline.command import ArgumentParser
from pipeline.config import OF_WEIGHTS, Config, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.followers import fields_of_run, following_fields
from pipeline.parsing import Schema, expand, flatten, names_between_commas, value_text
from pipeline.run_dir import CONFIG, has_checkpoint, read_progress
from pipeline.unused import unused_field, unused_in_all

SCHEMA = Schema(
    Config,
    flag=lambda key: f"--{key}",
    example="configs/densenet121.yaml",
    renamed_keys=renamed.KEYS,
    renamed_values=renamed.VALUES,
    elsewhere=renamed.ELSEWHERE,
)


def to_yaml(config: Config, without: Collection[str] = ()) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one.

    Args:
        without: keys to leave out, for a reader.
    """
    return SCHEMA.to_yaml(config, without)


def from_dict(tree: dict[str, Any], origin: str) -> Config:
    """Build a `Config` from nested dictionaries; `origin` (a file's name) begins the error line."""
    return SCHEMA.build(tree, origin)


def from_stored(tree: dict[str, Any], origin: str) -> Config:
    """Build the `Config` that a run has stored, perhaps with an earlier version's names; see `from_dict`."""
    return SCHEMA.build(renamed.upgrade(tree), origin)


def load_config(path: str | Path, overrides: dict[str, Any] | None = None, shared: Collection[str] = ()) -> Config:
    """Read a YAML file and put `overrides` (``{"optim.lr": 0.2}``) over it.

    Fields that belong together follow each other (followers.py). The file's published errors do not hold for another network or
    data set, nor for images that are prepared otherwise.

    Args:
        shared: keys of overrides that other runs get too, which `refuse_flags_without_use` judges over all of them.

    Raises:
        UserError: the file is missing or no mapping, a key is unknown, a value is not of the field's type, or a field is given
            that nothing reads (unused.py).
    """
    overrides = overrides or {}
    tree = SCHEMA.read(Path(path).expanduser())
    other = [
        key for key, value in _published_for(tree).items() if value_text(overrides.get(key, value)) != value_text(value)
    ]
    if other:
        recipe = tree.pop("published", {}).get("recipe")
        if recipe and not {"model.name", "data.dataset"} & set(other):  # what one may still compare with
            tree["published"] = {"recipe": recipe}
    held = names_between_commas(overrides.get("train.change", tree.get("train", {}).get("change", ())))
    held = held if isinstance(held, tuple) else ()  # what else it is, the field's type says
    defaults, file = flatten(dataclasses.asdict(Config())), flatten(tree)
    run_dir = Path(_run_dir(path, tree, overrides))
    stored = run_dir / CONFIG
    held = held if stored.exists() and has_checkpoint(run_dir) else ()  # a new run has nothing to keep
    followed = following_fields(defaults, (file, overrides), held)
    if held:
        saved = read_progress(run_dir).get("followers", {})  # none of a run of before
        followed |= fields_of_run({**_stored_fields(stored), **saved}, overrides, held)
    config = SCHEMA.build(SCHEMA.merged(tree, followed), str(path), _with_fields_of_weights(tree, overrides))
    own = {key: value for key, value in overrides.items() if key not in shared}
    if unused := unused_field(defaults, file, own, flatten(dataclasses.asdict(config))):
        key, needs = unused
        raise _does_nothing(f"--{key}" if key in own else f"{path}: '{key}'", key, needs)
    return config if config.run_dir else dataclasses.replace(config, run_dir=_run_dir(path, tree, overrides))


def _published_for(tree: dict[str, Any]) -> dict[str, Any]:
    """The fields, with the file's values, that its published errors depend on."""
    model, data = tree.get("model", {}), tree.get("data", {})
    of_data = ("dataset", "interpolation", "resize_size", "crop_size")
    return {"model.name": model.get("name", ModelConfig.name)} | {
        f"data.{name}": data.get(name, getattr(DataConfig, name)) for name in of_data
    }


def run_dir_of(path: str | Path, overrides: Mapping[str, Any]) -> str:
    """The run directory of a configuration, as `load_config` has it.

    Raises:
        UserError: the file is missing or no mapping.
    """
    return _run_dir(path, SCHEMA.read(Path(path).expanduser()), overrides)


def _run_dir(path: str | Path, tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    return expand(str(overrides.get("run_dir") or tree.get("run_dir") or f"runs/{Path(path).stem}"))


def _stored_fields(file: Path) -> dict[str, Any]:
    """The fields that a run has written, by key; none if there is no run, or its checkpoint alone can tell what is wrong."""
    with suppress(UserError):
        return flatten(renamed.upgrade(SCHEMA.read(file)))
    return {}


def refuse_flags_without_use(flags: Collection[str], configs: Sequence[Config]) -> None:
    """Refuse a flag, by key, that does nothing in any of the runs that get it."""
    defaults, *runs = (flatten(dataclasses.asdict(config)) for config in (Config(), *configs))
    for key in flags:
        if needs := unused_in_all(key, defaults, runs):
            raise _does_nothing(f"--{key}", key, needs)


def _does_nothing(where: str, key: str, needs: str) -> UserError:
    return UserError(f"{where} does nothing without {needs}: set that, or leave {key} out")


def _with_fields_of_weights(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides with data.from_weights, where there are weights to begin with and the command line does not say it.

    These are the fields that nobody gives. A file that a run has written says which they were: of those the fields that the
    command line does not give.
    """
    file = flatten(tree)
    if not overrides.get("model.weights", file.get("model.weights")) or "data.from_weights" in overrides:
        return overrides
    known, given = names_between_commas(file.get("data.from_weights")), {*overrides}
    if known is None:
        known, given = tuple(name for group in OF_WEIGHTS for name in group), {*file, *overrides}
    elif not isinstance(known, tuple):  # which the field's type refuses
        return overrides
    own = {name for group in OF_WEIGHTS if {f"data.{n}" for n in group} & given for name in group}
    return {**overrides, "data.from_weights": [name for name in known if name not in own]}


def load_stored_config(path: Path) -> Config:
    """Read the configuration that a run has written into its directory; see `from_stored`."""
    if not (tree := SCHEMA.read(path)):  # as a loss of power may leave it: it is not a run of defaults
        raise UserError(f"{path} is empty: put a copy of it back, or start the run again by its own command")
    return from_stored(tree, str(path))


def changed_fields(config: Config) -> dict[str, tuple[Any, Any]]:
    """The fields of a run that are not as the paper's recipe on ImageNet, the default, has them: by key, value and default."""
    own, usual = (flatten(dataclasses.asdict(one)) for one in (config, Config()))
    return {
        key: (value, usual[key])
        for key, value in own.items()
        if value != usual[key] and key != "run_dir" and not key.startswith("published.")
    }


def parse_command_line(
    arguments: list[str], program: str, description: str, options: dict[str, dict[str, Any]] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Parse ``CONFIG.yaml [--section.field VALUE ...]``.

    Args:
        arguments: the words after the program's name.
        options: further flags of this program, name -> what `argparse` wants to know of it.

    Returns:
        The configuration, and a namespace with the options.
    """
    usage = "%(prog)s CONFIG.yaml [--section.field VALUE ...]"
    parser = ArgumentParser(prog=program, usage=usage, description=description)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    for name, details in (options or {}).items():
        parser.add_argument(f"--{name}", **details)
    SCHEMA.add_flags(parser, title="run")
    namespace, unknown = parser.parse_known_args(arguments)
    SCHEMA.refuse_unknown(unknown)
    return load_config(namespace.config, SCHEMA.given(namespace)), namespace
