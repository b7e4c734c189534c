"""Weights from anywhere into our networks and timm's, and out again.

Read are checkpoints of this project, safetensors and PyTorch files (without running code in them) of torchvision, timm,
openmmlab (mmpretrain, openmixup) and of ports of the authors' Torch code. Written are torchvision's names, which timm has too.

What this project writes says how images are prepared and what the classes are called. Of other files that is known where they
are as torchvision offers them, or of a network for which timm has one set of weights; else it is assumed, and said
(`preprocessing.assumption`).
"""

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.audit import AuditRow, audit, in_one_line
from pipeline.checkpoint import is_checkpoint, load_checkpoint, load_weights
from pipeline.class_names import imagenet_ids
from pipeline.config import BestBy, Config, DataConfig, ModelConfig
from pipeline.config_file import from_stored
from pipeline.errors import UserError
from pipeline.external_weights import channels_of, match, name_network, outputs_of, recognise
from pipeline.measured import Measured
from pipeline.models import create_model, create_network
from pipeline.paper import setting_for
from pipeline.preprocessing import PREPROCESSING, for_channels, preprocessing_of
from pipeline.run_dir import why_no_best
from pipeline.words import counted

METADATA = "densenet-pipeline"  # the key of a file's metadata under which ours is, as JSON
EXTERNAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
)  # where others keep the weights among other things
EXTERNAL_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")
OPENMMLABS_RAW = "ema_state_dict"  # its EMAHook exchanges the two: beside this, state_dict is the average
REFUSED_TYPE = re.compile(r"GLOBAL (\S+)")  # in what torch.load says
AVERAGED = "moving average of the weights"
RAW = "raw weights, not their moving average"


@dataclass(frozen=True)
class Weights:
    """A network with its weights, and what is known of it.

    Attributes:
        origin: the file.
        network: on the CPU, in evaluation mode.
        config: the run's; of external weights the model and how images are prepared, all else at its default.
        classes: names of the outputs.
        run_classes: what their run called them, where they have other names since; else empty.
        microbatches: ranks times gradient accumulation steps of the run, None if that is not known.
        measured: what the run's own audit compares besides the configuration, None if that is not known.
        note: how the names of external weights were understood, or which of a run's two sets of weights these are; else empty.
        averaged: they are the moving average of a run's weights.
        epochs: whole epochs that they were trained for, None if that is not known.
        step: steps of the next epoch that they were trained for besides.
        best_epoch: the run's best when they were saved, counted from 1; None if there is none, or if that is not known.
        best_weights: by which weights' error that was found, ``raw`` or ``ema``; None if that is not known.
        tuning: what the run has measured to be the fastest on its GPU (`autotune.Tuning`); None if it has not.
        assumed: fields of `PREPROCESSING` that the file does not say, and nobody has given.
        fingerprint: of the run's images (`dataset.fingerprint_of`), None if it is not known.
        val_fingerprint: of its validation images alone (`DatasetIndex.fingerprint`), None if it is not known.
        given: fields of `PREPROCESSING` that were given in place of those in `config`.
    """

    origin: str
    network: nn.Module
    config: Config
    classes: tuple[str, ...]
    microbatches: int | None
    note: str = ""
    averaged: bool = False
    epochs: int | None = None
    step: int = 0
    best_epoch: int | None = None
    best_weights: str | None = None
    tuning: Mapping[str, Any] | None = None
    assumed: tuple[str, ...] = ()
    measured: Measured | None = None
    fingerprint: str | None = None
    val_fingerprint: str | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run_classes: tuple[str, ...] = ()

    @property
    def data(self) -> DataConfig:
        """How images are prepared."""
        return dataclasses.replace(self.config.data, **self.given)

    @property
    def audit_rows(self) -> list[AuditRow] | None:
        """The training beside the paper's, as in its run's ``audit.md``; None if that is not known."""
        return None if self.microbatches is None else audit(self.config, self.microbatches, self.measured)

    @property
    def audit(self) -> str | None:
        """How the training differed from the paper's, None if that is not known."""
        rows = self.audit_rows
        return None if rows is None else in_one_line(rows, setting_for(self.config).paper)

    @property
    def is_best(self) -> bool:
        """They are known to be those of the run's best epoch so far."""
        return self.epochs is not None and self.best_epoch == self.epochs and not self.step

    @property
    def trained(self) -> str:
        """Which epoch the weights are of, of those planned when they were saved, and the run's best one then; empty if they do
        not say it."""
        if self.epochs is None:
            return ""
        planned = self.config.optim.epochs  # which a run may have raised since
        text = f"epoch {self.epochs} of {planned if self.epochs == planned else f'the {planned} then planned'}"
        text += f" and {counted(self.step, 'step')} of the next" if self.step else ""
        if self.best_epoch is None:
            return text
        train = self.config.train
        judged = self.best_weights or (train.best_by if train.ema_decay else "raw")
        several = train.ema_decay or judged != "raw"  # else there are only raw ones
        best = f"the best so far by the {judged} weights" if several else "the best so far"
        return f"{text}, {best}" if self.is_best else f"{text} ({best}: {self.best_epoch})"


class OwnWeights(NamedTuple):
    """What a checkpoint or a safetensors file of this project holds; see `Weights`."""

    state: dict[str, Tensor]
    config: Config
    classes: tuple[str, ...]
    microbatches: int | None
    note: str = ""
    averaged: bool = False
    epochs: int | None = None
    step: int = 0
    best_epoch: int | None = None
    best_weights: str | None = None
    tuning: Mapping[str, Any] | None = None
    assumed: tuple[str, ...] = ()
    measured: Measured | None = None
    fingerprint: str | None = None
    val_fingerprint: str | None = None
    run_classes: tuple[str, ...] = ()


class ExternalWeights(NamedTuple):
    """What a file of others holds.

    Attributes:
        averaged: it is known to be a moving average.
    """

    state: dict[str, Tensor]
    averaged: bool = False


def read_weights(
    path: str | Path, model: str | None = None, classes: tuple[str, ...] | None = None, ema: bool | None = None
) -> Weights:
    """Read weights onto the CPU, whoever has written them.

    Args:
        model: the network of external weights, which one of `DENSENETS` is found by itself.
        classes: names of its outputs; those of 1000 are ImageNet's WordNet ids unless given, others are their numbers.
        ema: of a file that holds both, take the moving average of the weights, or the raw ones. None: of a checkpoint those
            that its run's best epoch is chosen by (``train.best_by``), of an external file its ``state_dict``.

    Raises:
        UserError: the file is missing, damaged, holds something else, or weights that do not fit the network.
    """
    path = weights_file(path)
    found = read_file(path, ema)
    if not isinstance(found, OwnWeights):
        return _external(path, found, model, classes)
    if model and model != found.config.model.name:
        raise UserError(f"{path} holds weights of {found.config.model.name}, not of {model}")
    if classes and len(classes) != len(found.classes):
        raise UserError(
            f"{path} has {counted(len(found.classes), 'output')}: give as many class names, not {len(classes)}"
        )
    network = create_network(found.config.model, len(found.classes), found.config.data.channels)
    load_weights(network, found.state, str(path))
    known = found._asdict()
    if classes and classes != found.classes:
        known |= {"classes": classes, "run_classes": found.run_classes or found.classes}
    del known["state"]
    return Weights(str(path), network.eval(), **known)


def weights_file(path: str | Path) -> Path:
    """The file that a path to weights means: of a run's directory its best checkpoint.

    Raises:
        UserError: it is another folder, or that of a run without a best checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    for best in (path / "checkpoints" / "best.pt", path / "best.pt"):
        if best.exists():
            return best
    if reason := why_no_best(path.parent if path.name == "checkpoints" else path):
        raise UserError(reason)
    raise UserError(f"{path} is a folder without checkpoints/best.pt: give a run's directory, or a file of weights")


def checksum(file: str | Path) -> str:
    """SHA-256 of a file of weights, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights {file}: {error.strerror}") from None


def write_safetensors(weights: Weights, path: Path) -> None:
    """Write weights with their configuration, class names and audit as metadata.

    Raises:
        UserError: the file cannot be written.
    """
    state = {  # cloned, as safetensors takes no tensor twice
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.network.state_dict().items()
    }
    _write(path, save(state, metadata={"format": "pt", METADATA: _about(weights)}))


def write_torch(weights: Weights, path: Path) -> None:
    """Write the state dictionary for ``torch.load``, with the metadata of `write_safetensors` among its own.

    A module's state dictionary has metadata by the names of its modules, which ``torch.save`` keeps; ``load_state_dict`` reads
    no others.
    """
    state = weights.network.state_dict()
    vars(state)["_metadata"][METADATA] = {"about": _about(weights)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(path, buffer.getvalue())


def _about(weights: Weights) -> str:
    """What is known of weights, as JSON."""
    about = {
        "config": dataclasses.asdict(dataclasses.replace(weights.config, data=weights.data)),
        "classes": weights.classes,
        "run_classes": weights.run_classes,
        "microbatches": weights.microbatches,
        "measured": weights.measured and dataclasses.asdict(weights.measured),
        "fingerprint": weights.fingerprint,
        "val_fingerprint": weights.val_fingerprint,
        "epochs": weights.epochs,
        "step": weights.step,
        "best_epoch": weights.best_epoch,
        "best_weights": weights.best_weights,
        "audit": weights.audit,
        "averaged": weights.averaged,
        "assumed": weights.assumed,
    }
    return json.dumps(about)


def read_file(path: Path, ema: bool | None = None) -> OwnWeights | ExternalWeights:
    """What a file of this project, or an external one, holds; see `read_weights`."""
    try:
        with path.open("rb") as file:
            safetensors = file.read(9)[8:] == b"{"
            checkpoint = is_checkpoint(file)
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror}") from None
    if checkpoint:
        return _of_checkpoint(load_checkpoint(path), str(path), ema)
    found = _read_safetensors(path) if safetensors else _read_torch(path, ema)
    if not safetensors and not isinstance(found, OwnWeights):
        return found
    averaged = isinstance(found, OwnWeights) and found.averaged
    if ema is not None and ema != averaged:
        _refuse_choice(path, ema)
    return found


def _of_checkpoint(state: dict[str, Any], origin: str, ema: bool | None) -> OwnWeights:
    config = from_stored(state["config"], origin)
    conditions = state.get("conditions", {})
    ranks = conditions.get("ranks")
    microbatches = ranks and ranks * config.optim.grad_accum_steps
    both = "ema" in state
    if ema and not both:
        _refuse_choice(origin, ema)
    averaged = both and (config.train.best_by == "ema" if ema is None else ema)
    progress = state.get("progress", {})
    note = f"{AVERAGED} (--no-ema: the raw ones)" if averaged else "raw weights (--ema: their average)" if both else ""
    weights = state["ema"]["model"] if averaged else state["model"]
    return OwnWeights(
        weights,
        config,
        tuple(state["classes"]),
        microbatches,
        note,
        averaged,
        epochs=progress.get("epoch"),
        step=progress.get("step", 0),
        best_epoch=progress.get("best_epoch", -1) + 1 or None,  # there from 0, and -1 for none
        best_weights=progress.get("best_weights"),
        tuning=state.get("tuning"),
        measured=_measured(state.get("measured")),
        fingerprint=conditions.get("fingerprint"),
        val_fingerprint=conditions.get("val_fingerprint"),
    )


def _refuse_choice(origin: str | Path, ema: bool) -> None:
    here, lacking = ("one set of weights", "moving average") if ema else ("the moving average of weights", "raw ones")
    raise UserError(f"{origin} holds {here} and no {lacking} beside it: leave out --{'' if ema else 'no-'}ema")


def _read_safetensors(path: Path) -> OwnWeights | ExternalWeights:
    """As `read_file`."""
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = (file.metadata() or {}).get(METADATA)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, or no safetensors file ({' '.join(str(error).split())})") from None
    return ExternalWeights(state) if about is None else _own(state, about, path)


def _own(state: dict[str, Tensor], text: Any, path: Path) -> OwnWeights:
    """Tensors with what a file of this project says of them; see `_about`."""
    try:
        about = json.loads(text)
        microbatches, classes = about.get("microbatches", about.get("passes")), tuple(map(str, about["classes"]))
        averaged = about.get("averaged") is True  # files of before do not say
        trained = {"epochs": about.get("epochs"), "step": about.get("step", 0), "best_epoch": about.get("best_epoch")}
        if not isinstance(about["config"], dict) or not (
            microbatches is None or (isinstance(microbatches, int) and microbatches > 0)
        ):
            raise ValueError("config or microbatches")
        if not all(number is None or isinstance(number, int) for number in trained.values()):
            raise ValueError("epochs")
        if (best_weights := about.get("best_weights")) not in (None, *get_args(BestBy)):
            raise ValueError("best_weights")
        assumed = tuple(about.get("assumed", ()))
        if not set(assumed) <= set(PREPROCESSING):
            raise ValueError("assumed")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has metadata that this version does not understand ({error})") from None
    config = from_stored(about["config"], str(path))
    note = AVERAGED if averaged else RAW if config.train.ema_decay and "averaged" in about else ""
    measured = _measured(about.get("measured"))
    fingerprints = {key: about.get(key) for key in ("fingerprint", "val_fingerprint")}
    run_classes = tuple(map(str, about.get("run_classes", ())))
    known = {
        "best_weights": best_weights, "assumed": assumed, "measured": measured, "run_classes": run_classes, **fingerprints
    }  # fmt: skip
    return OwnWeights(state, config, classes, microbatches, note, averaged, **trained, **known)


def _measured(state: Any) -> Measured | None:
    """From what `dataclasses.asdict` gave, also by way of JSON; None of a version that measured something else."""
    try:
        return TypeAdapter(Measured).validate_python(state)
    except ValidationError:
        return None


def _read_torch(path: Path, ema: bool | None) -> OwnWeights | ExternalWeights:
    """As `_read_safetensors`, without running code that the file may hold."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about pickle protocols, besides what goes wrong
            torch.serialization.safe_globals([argparse.Namespace]),  # which timm and torchvision save too
            path.open("rb") as file,
        ):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = REFUSED_TYPE.search(str(error))
        raise UserError(
            f"{path} is no file of weights, or holds more than tensors and plain values"
            f"{f' ({refused[1]})' if refused else ''}: torch.save the state dictionary alone"
        ) from None
    except MemoryError:
        raise
    except Exception:  # over damaged bytes torch stumbles in any way
        raise UserError(f"{path} is damaged, or no file of weights") from None
    nest = next(
        (key for key in _keys_of_weights(found, ema) if isinstance(found, dict) and isinstance(found.get(key), dict)),
        None,
    )
    state = found[nest] if nest else found
    metadata = vars(state).get("_metadata") if isinstance(state, OrderedDict) else None
    about = metadata.get(METADATA) if isinstance(metadata, dict) else None
    if ema and nest is None and about is None:
        raise UserError(f"{path} has no moving average of weights ({', '.join(EXTERNAL_EMA_KEYS)}): leave out --ema")
    if isinstance(state, dict):
        # torch.optim.swa_utils.AveragedModel counts beside the weights, and openmmlab's averages do.
        state = {name: value for name, value in state.items() if name not in ("n_averaged", "steps")}
    if (
        not state
        or not isinstance(state, dict)
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(
            f"{path} holds no state dictionary: nothing but tensors by name, or that under one of {', '.join(EXTERNAL_KEYS)}"
        )
    if about is None:
        return ExternalWeights(state, bool(ema) or (ema is None and _is_openmmlabs_average(found)))
    return _own(state, about.get("about") if isinstance(about, dict) else None, path)


def _keys_of_weights(found: Any, ema: bool | None) -> tuple[str, ...]:
    """Under which keys a file of others may have the weights that are asked for."""
    if _is_openmmlabs_average(found):
        return (OPENMMLABS_RAW,) if ema is False else ("state_dict",)
    return EXTERNAL_EMA_KEYS if ema else EXTERNAL_KEYS


def _is_openmmlabs_average(found: Any) -> bool:
    """Whether a file has openmmlab's average as its ``state_dict``, known by the steps that it counts in the other one."""
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        return False
    return isinstance(found.get(OPENMMLABS_RAW), dict) and "steps" in found[OPENMMLABS_RAW]


def _external(path: Path, found: ExternalWeights, model: str | None, classes: tuple[str, ...] | None) -> Weights:
    state, averaged = found
    outputs = outputs_of(state, model, path)
    if classes is None:
        classes = imagenet_ids() if outputs == 1000 else tuple(map(str, range(outputs)))
    elif len(classes) != outputs:
        raise UserError(f"{path} has {counted(outputs, 'output')}: give as many class names, not {len(classes)}")
    name = model or recognise(state, outputs)
    if name is None:
        raise UserError(
            f"{path} holds the weights of none of the paper's networks: name it with --model, as densenet_bc22_k6 or "
            "timm:resnet50"
        )
    network = create_model(name, num_classes=outputs)
    try:
        matched, note = match(network.state_dict(), state, str(path))
    except UserError as error:
        raise name_network(error, recognise(state, outputs), name, "--model") from None
    data, assumed = preprocessing_of(name, network, outputs, state)
    if (channels := channels_of(matched, network)) != 3:
        network, data = create_model(name, num_classes=outputs, in_channels=channels), for_channels(data, channels)
    load_weights(network, matched, str(path))
    config = Config(model=ModelConfig(name=name), data=data)
    return Weights(str(path), network.eval(), config, classes, None, note, averaged, assumed=assumed)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
