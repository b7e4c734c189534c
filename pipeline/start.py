"""Where a run starts from: its checkpoint, or weights that the configuration names (``model.weights``), or drawn ones.

A run that resumes does not read the weights' file again, which may be gone: what was taken from it stands in the checkpoint.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import FoundCheckpoint, check_weights
from pipeline.class_names import imagenet_ids
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.external_weights import channels_of, convolution_for_channels, match, name_network, outputs_of, recognise
from pipeline.models import create_network
from pipeline.models.parts import classifier_of, first_convolution
from pipeline.parsing import flatten
from pipeline.preprocessing import for_channels, of_channels, preprocessing_of, preprocessing_of_timm
from pipeline.resume import find_checkpoint
from pipeline.weights import OwnWeights, checksum, read_file, weights_file


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run begins with.

    Attributes:
        origin: the file, as the configuration names it.
        sha256: of the file.
        state: of the run's network but with the file's outputs, under the network's own names.
        first: name of the entry in `state` that sees the images, empty if no convolution does.
        classifier: names of the entries in `state` that belong to the classifier.
        outputs: how many the file has.
        classes: their names, None if they are not known.
        data: how images were prepared for these weights.
        assumed: fields of `data` that the source does not say; see `preprocessing.assumption`.
        note: as `Weights` has it.
        seen: fingerprints of all images of their run, and of its validation images, as `Weights` has them.
        seed: of their run, None if it is not known.
    """

    origin: str
    sha256: str
    state: dict[str, Tensor]
    first: str
    classifier: tuple[str, ...]
    outputs: int
    classes: tuple[str, ...] | None
    data: DataConfig
    assumed: tuple[str, ...]
    note: str
    seen: tuple[str | None, str | None]
    seed: int | None

    def for_channels(self, channels: int) -> "InitialWeights":
        """These weights for images of `channels` channels."""
        if self.data.channels == channels or not self.first:
            return self
        state = {**self.state, self.first: convolution_for_channels(self.state[self.first], channels)}
        how = "summed over the three colours" if channels == 1 else "repeated for the three colours, a third each"
        note = f"{f'{self.note}; ' if self.note else ''}first convolution {how}"
        return dataclasses.replace(self, state=state, note=note)

    def new_classifier(self, classes: Sequence[str]) -> str:
        """Why a run with these classes needs another classifier than the file's; empty if it has the same ones, in order."""
        if self.outputs != len(classes):
            return f"{self.outputs} outputs there, {len(classes)} here"
        if self.classes is None:
            return "its classes are not known"
        if self.classes != tuple(classes):
            odd = next(there for there, here in zip(self.classes, classes, strict=True) if there != here)
            return f"other classes there, as '{odd}'"
        return ""


@dataclass(frozen=True)
class Start:
    """Where a run starts from.

    Attributes:
        config: the run's, completed by what belongs to its initial weights.
        checkpoint: what it resumes from, None if it is new.
        weights: what a new run begins with, None if they are drawn.
    """

    config: Config
    checkpoint: FoundCheckpoint | None
    weights: InitialWeights | None


def find_start(config: Config) -> Start:
    """Read a run's newest checkpoint or, for a new run, its initial weights; nothing is changed.

    Raises:
        UserError: see `find_checkpoint` and `read_initial_weights`.
    """
    found = find_checkpoint(Path(config.run_dir))
    if not config.model.weights:
        return Start(config, found, None)
    if found:
        before = flatten(found.state["config"])
        taken = {name: before[f"data.{name}"] for name in config.data.from_weights if f"data.{name}" in before}
        return Start(_completed(config, before.get("model.weights_sha256"), taken), found, None)
    weights = read_initial_weights(config.model)
    taken = {name: getattr(weights.data, name) for name in config.data.from_weights}
    channels = taken.get("channels", config.data.channels)
    taken |= {name: of_channels(taken[name], channels) for name in ("mean", "std") if name in taken}
    return Start(_completed(config, weights.sha256, taken), None, weights.for_channels(channels))


def _completed(config: Config, sha256: str | None, data: Mapping[str, Any]) -> Config:
    """The configuration with the file's checksum and the fields of its data section that come from the weights' source."""
    model = dataclasses.replace(config.model, weights_sha256=config.model.weights_sha256 or sha256)
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    channels = fields.get("channels", config.data.channels)
    for name in ("mean", "std"):
        if (numbers := len(fields.get(name, getattr(config.data, name)))) != channels:
            raise UserError(
                f"data.{name} has {numbers} numbers, and the weights {config.model.weights} are for images of {channels} "
                f"channels: give as many, or data.channels {numbers}"
            )
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **fields))


def read_initial_weights(model: ModelConfig) -> InitialWeights:
    """Read what ``model.weights`` names, for the network that ``model.name`` names.

    Raises:
        UserError: as `weights.read_weights`; or the file's checksum is another than ``model.weights_sha256``; or timm's cache
            does not have the file.
    """
    assert model.weights is not None
    published = _timm_pretrained(model.weights) if model.weights.startswith("timm:") else None
    path = weights_file(model.weights) if published is None else _in_timm_cache(model.weights, published)
    found = read_file(path)
    digest = checksum(path)
    if model.weights_sha256 and model.weights_sha256.lower() != digest:
        raise UserError(
            f"model.weights: {path} has the SHA-256 {digest}, and model.weights_sha256 is {model.weights_sha256}: give the "
            "file that this is the checksum of"
        )
    own = found if isinstance(found, OwnWeights) else None
    state = found.state
    outputs = len(own.classes) if own else outputs_of(state, model.name, path)
    with torch.device("meta"):
        network = create_network(model, outputs)
    try:
        matched, note = match(network.state_dict(), state, model.weights)
    except UserError as error:
        theirs = own.config.model.name if own else recognise(state, outputs)
        raise name_network(error, theirs, model.name, "--model.name") from None
    note = own.note.partition(" (--")[0] if own else note  # without the flags, which the tools have
    first, channels = first_convolution(network), channels_of(matched, network)
    if channels != 3:
        with torch.device("meta"):
            network = create_network(model, outputs, channels)
    check_weights(network.state_dict(), matched, model.weights)
    classes: tuple[str, ...] | None
    if own:
        classes, data, assumed = own.classes, own.config.data, own.assumed
    else:
        classes = imagenet_ids() if outputs == 1000 else None
        if published:
            data, assumed = preprocessing_of_timm(model.weights, published), ()
        else:
            data, assumed = preprocessing_of(model.name, network, outputs, state)
        data = for_channels(data, channels)
    head = tuple(f"{module}." for module in classifier_of(network))
    classifier = tuple(name for name in matched if name.startswith(head))
    seen = (own.fingerprint, own.val_fingerprint) if own else (None, None)
    seed = own.config.seed if own else None
    return InitialWeights(
        model.weights, digest, matched, first, classifier, outputs, classes, data, assumed, note, seen, seed
    )


def _timm_pretrained(name: str) -> dict[str, Any]:
    """timm's description of the weights ``timm:NAME.TAG``."""
    import timm  # takes seconds to import

    plain = name.removeprefix("timm:")
    network, _, tag = plain.partition(".")
    tagged = timm.list_models(f"{network}.*", pretrained=True)
    if not tag or plain not in tagged:
        known = f"choose timm:{', timm:'.join(tagged)}" if tagged else f"it has none for '{network}'"
        raise UserError(f"model.weights: timm knows no weights '{name}' (timm:NAME.TAG): {known}, or give a file")
    about = timm.get_pretrained_cfg(plain)
    assert about is not None, plain
    return about.to_dict()


def _in_timm_cache(name: str, about: Mapping[str, Any]) -> Path:
    """The file of timm's weights, where timm puts it on this machine when it downloads."""
    from huggingface_hub import try_to_load_from_cache  # which timm downloads with

    if about.get("hf_hub_id"):
        for file in (about.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"):
            found = file and try_to_load_from_cache(about["hf_hub_id"], file)
            if isinstance(found, str):
                return Path(found)
    if about.get("url"):
        kept = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(about["url"]))
        if os.path.exists(kept):
            return Path(kept)
    plain = name.removeprefix("timm:")
    raise UserError(
        f"model.weights: {name} is not in timm's cache: fetch it on a machine with a network, python -c \"import timm; "
        f"timm.create_model('{plain}', pretrained=True)\", or give model.weights a copy of the file"
    )
