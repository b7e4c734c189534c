"""Fills trees of frozen dataclasses from YAML files and from flags; a mistake is one line naming the key or the flag.

`config.py` declares a run this way, `launch/cluster.py` a job.
"""

import argparse
import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import UserError, did_you_mean
from pipeline.renamed import value_of_today

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

T = TypeVar("T")


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is needed, not {str(value).lower()}")
    return value


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the lower limit comes first")
    return limits


def expand(path: str) -> str:
    """A path in which ``~`` and ``$HOME`` mean what they mean to a shell."""
    return os.path.expanduser(os.path.expandvars(path))


def names_between_commas(names: Any) -> Any:
    """Names between commas, in one text or in several; none: no name."""
    texts = [names] if isinstance(names, str) else names
    if texts in (["none"], ["null"]):
        return ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return names
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


_NUMBER = BeforeValidator(_no_truth_value)  # Python, and so pydantic, takes true for 1
Positive = Annotated[int, Field(gt=0), _NUMBER]
NonNegative = Annotated[int, Field(ge=0), _NUMBER]
Number = Annotated[float, _NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Probability = Annotated[float, Field(ge=0, le=1), _NUMBER]
NonNegativeFloat = Annotated[float, Field(ge=0), _NUMBER]
PositiveFloat = Annotated[float, Field(gt=0), _NUMBER]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
PathText = Annotated[str, AfterValidator(expand)]


class Schema(Generic[T]):
    """A dataclass whose fields are values or further dataclasses of values, and how users give them.

    Args:
        root: the dataclass, of pydantic, with a docstring below each field.
        flag: makes a flag of a key such as ``optim.lr``.
        example: a file to look at, for messages.
        renamed_keys, renamed_values: names of earlier versions, which are refused with the new one.
        elsewhere: other programs' names of fields, and what to say to them.
    """

    def __init__(
        self,
        root: type[T],
        flag: Callable[[str], str],
        example: str,
        renamed_keys: Mapping[str, str] = types.MappingProxyType({}),
        renamed_values: Mapping[str, Mapping[str, str]] = types.MappingProxyType({}),
        elsewhere: Mapping[str, str] = types.MappingProxyType({}),
    ):
        self._root, self._flag, self._example = root, flag, example
        self._renamed_keys, self._renamed_values, self._elsewhere = renamed_keys, renamed_values, elsewhere
        self._adapter = TypeAdapter(root)
        self._sections: dict[str, dict[str, Any]] = {"": {}}  # section -> key -> field
        for name, field in _fields_of(root).items():
            if dataclasses.is_dataclass(field.annotation):
                inner = _fields_of(field.annotation).items()
                self._sections[name] = {f"{name}.{key}": value for key, value in inner}
            else:
                self._sections[""][name] = field
        self.fields = {key: field for section in self._sections.values() for key, field in section.items()}
        self.flags = [flag(key) for key in self.fields]

    def add_flags(self, parser: argparse.ArgumentParser, title: str, leave_out: tuple[str, ...] = ()) -> None:
        """Add a flag for each field; those given become attributes of the parsed namespace, named by their keys.

        Args:
            title: heading of the top level's fields in the help; a section's heading is its name.
        """
        for section, fields in self._sections.items():
            group = parser.add_argument_group(section or title)
            for key, field in fields.items():
                if key in leave_out:
                    continue
                default = field.get_default(call_default_factory=True)
                text = f"{field.description} [{_default_text(default)}]".replace("%", "%%")
                options: dict[str, Any] = dict(dest=key, default=argparse.SUPPRESS, help=text)
                options["metavar"] = _type_name(field.annotation)
                if _is_list_of_words(field.annotation):
                    options["action"] = "append"
                elif field.annotation is bool or "true" in self._renamed_values.get(key, {}):
                    alone = self._renamed_values.get(key, {}).get("true", "true")  # what true is called today
                    options |= dict(nargs="?", const=alone, type=_no_configuration)
                group.add_argument(self._flag(key), **options)

    def given(self, namespace: argparse.Namespace) -> dict[str, Any]:
        """The fields that the command line gave, by key."""
        return {key: self._from_text(key, getattr(namespace, key)) for key in self.fields if hasattr(namespace, key)}

    def is_list(self, key: str) -> bool:
        """Whether the field holds several values, which a command line separates by commas."""
        return _is_tuple(self.fields[key].annotation)

    def refuse_unknown(self, words: list[str], other_flags: tuple[str, ...] = ()) -> None:
        """Refuse what `argparse` did not know.

        Args:
            other_flags: those that the program has beside the fields', which may be meant.

        Raises:
            UserError: `words` is not empty; names the first, and what it may be meant for.
        """
        if not words:
            return
        flag = words[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"'{flag}' belongs to no argument; --help lists all")
        key = flag.lstrip("-")
        if key in self._renamed_keys:
            raise UserError(f"{flag} is now called {self._flag(self._renamed_keys[key])}")
        last = key.rpartition(".")[2].replace("-", "_")
        if last in self._elsewhere:
            raise UserError(f"unknown argument {flag}: {self._advice(last)}")
        same = [self._flag(known) for known in self.fields if known.rpartition(".")[2].replace("-", "_") == last]
        hint = f" (did you mean '{same[0]}'?)" if same else did_you_mean(flag, [*self.flags, *other_flags])
        raise UserError(f"unknown argument {flag}{hint}; --help lists all")

    def read(self, path: Path) -> dict[str, Any]:
        """Read a YAML file into nested dictionaries.

        Raises:
            UserError: it cannot be read, is not valid YAML, or no mapping of fields and sections.
        """
        try:
            tree = yaml.load(path.read_text(), _Loader)
        except OSError as error:
            raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:  # a key given twice included
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        tree = {} if tree is None else tree
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise UserError(f"{path} must be a mapping of fields, as in {self._example}")
        for section, fields in self._sections.items():
            if section and not isinstance(tree.get(section, {}), dict):
                raise UserError(f"{path}: '{section}' must be a mapping of fields, such as {next(iter(fields))}")
        return tree

    def merged(self, tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Nested dictionaries with `overrides`, by key, over them; a field that is a mapping takes further entries."""
        result = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
        for key, value in overrides.items():
            section, _, name = key.rpartition(".")
            target = result.setdefault(section, {}) if section else result
            old = target.get(name)
            target[name] = old | value if isinstance(value, dict) and isinstance(old, dict) else value
        return result

    def build(self, tree: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None) -> T:
        """Make the dataclass of nested dictionaries.

        Args:
            origin: where they are from, for messages.
            overrides: fields by key that the command line gave, over the others.

        Raises:
            UserError: a key is unknown, or a value is not of its field's type.
        """
        overrides = overrides or {}
        try:
            return self._adapter.validate_python(self.merged(tree, overrides))
        except ValidationError as failure:
            error = failure.errors()[0]
        names = [str(part) for part in error["loc"]]
        key = ".".join(names[:2] if names and names[0] in self._sections else names[:1])
        where, what = f"{origin}: '{key}'" if key else origin, self._explain(key, error)
        if key in overrides:
            where = self._flag(key)
        elif flags := [self._flag(k) for k in overrides if _names_key(what, k, section=key)]:
            where += f" with {', '.join(flags)}"
        raise UserError(f"{where}{what}")

    def to_yaml(self, value: T, without: Collection[str] = ()) -> str:
        """The whole tree as YAML that `read` and `build` turn into an equal one; `without` names keys to leave out."""
        tree = self._adapter.dump_python(value, mode="json")
        for key in without:
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree).pop(name)
        return yaml.safe_dump(tree, sort_keys=False)

    def _explain(self, key: str, error: Any) -> str:
        """What is wrong with a key's value, and what is needed; error is pydantic's."""
        kind, value = error["type"], error["input"]
        if kind == "unexpected_keyword_argument":
            if key in self._renamed_keys:
                return f" is now called '{self._renamed_keys[key]}'"
            last = key.rpartition(".")[2]
            if last in self._elsewhere:
                return f" is not a known key: {self._advice(last)}"
            if key in self.fields:
                section, _, name = key.rpartition(".")
                return f" is not a key of the top level: write '{name}' below '{section}:'"
            known = [*self.fields, *(section for section in self._sections if section)]
            return f" is not a known key{did_you_mean(key, known)}"
        if kind == "value_error":  # of a check of ours
            return f": {error['ctx']['error']}"
        field = self.fields.get(key)
        new = value_of_today(self._renamed_values.get(key, {}), value)
        if new:
            return f": '{str(value).lower() if isinstance(value, bool) else value}' is now called '{new}'"
        got = f" (got {value!r})"
        if kind in ("missing", "too_short", "too_long", "tuple_type", "unexpected_positional_argument") and field:
            example = field.get_default(call_default_factory=True)
            shown = ",".join(map(str, example)) if isinstance(example, tuple) and example else "a,b"
            return f": {_count(field.annotation)} values are needed, such as {shown}{got}"
        return f": {_PLAIN.get(kind, error['msg']).format(**error.get('ctx', {}))}{got}"

    def _advice(self, name: str) -> str:
        advice = self._elsewhere[name]
        return f"use {advice}" if advice.startswith("-") else advice

    def _from_text(self, key: str, text: Any) -> Any:
        """A command line's word, or words, as a value that the field's type can validate."""
        annotation = self.fields[key].annotation
        if isinstance(text, list):
            return dict(self._name_and_value(key, word) for word in text) if _origin(annotation) is dict else text
        if _is_tuple(annotation):
            if text.strip().lower() in ("none", "null"):
                return []
            return [part.strip() for part in text.strip("[]() ").split(",") if part.strip()]
        if _is_union(annotation) and text.lower() in ("none", "null"):
            return None
        return text

    def _name_and_value(self, key: str, word: str) -> tuple[str, str]:
        name, sign, value = word.partition("=")
        if not sign:
            raise UserError(f"{self._flag(key)} {word}: NAME=VALUE is needed")
        return name.lstrip("-"), value


def _no_configuration(word: str) -> str:
    """The value of a flag that needs none, which would also take the program's argument for its own."""
    if word.endswith((".yaml", ".yml")):
        raise argparse.ArgumentTypeError(f"'{word}' is no value of it: give {word} before the flags")
    return word


def _fields_of(dataclass: Any) -> dict[str, Any]:
    """The fields of a pydantic dataclass by name, with their descriptions and defaults."""
    return dataclass.__pydantic_fields__


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"optim.lr": 0.1, ...}``, every leaf of a configuration as `dataclasses.asdict` gives it."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def value_text(value: Any) -> str:
    """A value as a command line gives it."""
    if isinstance(value, tuple | list):
        return ",".join(map(value_text, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else "none" if value in ("", None) else str(value)


def text_to_read(value: Any) -> str:
    """As `value_text`, with twelve digits of a number at most: 0.1 * 66 / 256 is 0.02578125, and no 0.025781250000000002."""
    if isinstance(value, tuple | list):
        return ",".join(map(text_to_read, value)) or "none"
    return value_text(float(f"{value:.12g}") if isinstance(value, float) else value)


_PLAIN = {  # pydantic's kinds of error in plain words
    "literal_error": "choose {expected}",
    "int_parsing": "a whole number is needed",
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_parsing": "a number is needed",
    "float_type": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool_parsing": "true or false is needed",
    "bool_type": "true or false is needed",
    "string_type": "text is needed",
    "greater_than": "a number above {gt} is needed",
    "greater_than_equal": "at least {ge} is needed",
    "less_than": "a number below {lt} is needed",
    "less_than_equal": "at most {le} is possible",
    "dataclass_type": "a mapping of fields is needed",
    "dict_type": "a mapping of names to values is needed",
}


def _names_key(text: str, key: str, section: str) -> bool:
    """Whether a message names a field: one on a section by its name there, one on the whole (empty) by its key."""
    of, _, name = key.rpartition(".")
    word = name if section else key
    return (not section or of == section) and bool(re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.]*\w)", text))


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, of which YAML would keep the last, and reads 24:00:00 and 010 as text."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_int(self, node):
        # YAML 1.1 takes 24:00 for a number of base 60 and 010 for 8, which cannot be told from others afterwards.
        is_plain = ":" not in node.value and not re.fullmatch(r"[-+]?0[\d_]+", node.value)
        return self.construct_yaml_int(node) if is_plain else node.value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation)


def _is_union(annotation: Any) -> bool:
    return _origin(annotation) in (typing.Union, types.UnionType)


def _is_tuple(annotation: Any) -> bool:
    return _origin(annotation) is tuple


def _is_list_of_words(annotation: Any) -> bool:
    """Whether a flag is given once for each word, which may hold commas, or for each NAME=VALUE."""
    return _origin(annotation) is dict or (_is_tuple(annotation) and typing.get_args(annotation)[0] is str)


def _count(annotation: Any) -> str:
    parts = typing.get_args(annotation)
    return "some" if ... in parts else str(len(parts))


def _default_text(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default in ("", None, {}) else str(default)


def _type_name(annotation: Any) -> str:
    """What a flag's value is called in the help."""
    if _origin(annotation) is Literal:
        return "{" + ",".join(map(str, typing.get_args(annotation))) + "}"
    if _origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return _type_name(typing.get_args(annotation)[0]).upper()
    if _origin(annotation) is dict:
        return "NAME=VALUE"
    if _is_list_of_words(annotation):
        return "WORDS"
    if _is_tuple(annotation):
        return ",".join(_type_name(part) for part in typing.get_args(annotation) if part is not ...) + (
            ",..." if ... in typing.get_args(annotation) else ""
        )
    if annotation is bool:
        return "true|false"
    return annotation.__name__.upper()
