"""Checkpoints on disk: atomic, checksummed, loaded without running code, the last two and the best kept.

A file is what `torch.save` writes; its SHA-256 stands in the zip archive's comment, where `torch.load` and
every zip tool pass over it.
"""

import hashlib
import io
import itertools
import os
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from pipeline import renamed
from pipeline.errors import StorageError, UserError, first_line, is_out_of_memory
from pipeline.paths import is_present
from pipeline.run_dir import CHECKSUM_LENGTH, io_as_user_error

FORMAT = 3
_CHECKSUM_AT_END = re.compile(rb"\x40\x00[0-9a-f]{64}\Z")  # a zip comment of that length
_REQUIRED = {"format": int, "model": dict, "config": dict, "classes": list}


class DamagedCheckpointError(UserError):
    """A file's checksum does not match."""


class CheckpointFolder:
    """The checkpoints of one run: ``last.pt``, the one before as ``previous.pt``, and ``best.pt``."""

    def __init__(self, folder: Path):
        self.last = folder / "last.pt"
        self.previous = folder / "previous.pt"
        self.best = folder / "best.pt"

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Write `state` as the last checkpoint, and as the best one too if it is. Returns when the disk has it.

        Raises:
            StorageError, UserError: it cannot be written, which may pass, or not; the last checkpoint before is as it was.
        """
        content = _serialise(state)
        try:
            if best:
                os.replace(_write_temporary(self.best, content), self.best)
            temporary = _write_temporary(self.last, content)
            if self.last.exists():
                os.replace(self.last, self.previous)
            os.replace(temporary, self.last)
            _sync_folder(self.last.parent)
        except OSError as error:
            kind = StorageError if error.errno in StorageError.NUMBERS else UserError
            raise kind(
                f"cannot write a checkpoint to {self.last.parent} ({error.strerror}); older ones are kept"
            ) from None

    def remove_temporary(self) -> None:
        """Remove what a process that was killed while it saved has left."""
        for path in (self.last, self.best):
            _temporary(path).unlink(missing_ok=True)

    def find(self) -> tuple["FoundCheckpoint | None", list[Path]]:
        """Read the newest whole checkpoint; nothing is changed.

        Returns:
            It, or None; and the damaged files that are newer than it.

        Raises:
            StorageError, UserError: a file cannot be read, which may pass, or not.
        """
        damaged: list[Path] = []
        for path in (self.last, self.previous):
            if is_present(path):
                try:
                    return FoundCheckpoint(load_checkpoint(path), path, tuple(damaged)), damaged
                except DamagedCheckpointError:
                    damaged.append(path)
                except UserError as error:
                    if isinstance(cause := error.__cause__, OSError) and cause.errno in StorageError.NUMBERS:
                        raise StorageError(str(error)) from None
                    raise
        return None, damaged


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint.

    Attributes:
        path: its file.
        damaged: files that are newer and damaged.
    """

    state: dict[str, Any]
    path: Path
    damaged: tuple[Path, ...]

    def set_damaged_aside(self) -> None:
        """Rename the damaged files, so that they cannot take the place of a good one, and say so."""
        for path in self.damaged:
            aside = next(
                name for i in itertools.count() if not (name := path.with_suffix(f".damaged{i or ''}")).exists()
            )
            with io_as_user_error(path.parent):
                os.replace(path, aside)
            warnings.warn(
                f"{path} is damaged and now called {aside.name}; resuming from {self.path.name}", stacklevel=2
            )


def is_checkpoint(file: BinaryIO) -> bool:
    """Whether a file is a checkpoint of this project, damaged perhaps. Moves its position."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - CHECKSUM_LENGTH - 2))
    return _CHECKSUM_AT_END.search(file.read()) is not None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code that it may hold.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if not _is_whole(content):
        raise DamagedCheckpointError(
            f"{path} is damaged, or not a checkpoint of this project (its checksum does not match)"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} holds more than tensors and plain values: {first_line(error)}") from None
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in _REQUIRED.items()):
        raise UserError(f"{path} is not a checkpoint of this project")
    if state["format"] not in (2, FORMAT):
        raise UserError(f"{path} is a checkpoint of format {state['format']}; this version reads 2 and {FORMAT}")
    return _upgrade(state)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Copy a state dictionary into `model`.

    Raises:
        UserError: see `check_weights`.
    """
    check_weights(model.state_dict(), weights, origin)
    model.load_state_dict(weights)


def check_weights(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Refuse a state dictionary that a network with the state dictionary `own` cannot take.

    Raises:
        UserError: a name or a shape differs, or a tensor is none of real numbers one by one; names the first.
    """
    for name in own:
        if name not in weights:
            raise UserError(f"{origin} has no '{name}': it holds the weights of another architecture")
        if weights[name].shape != own[name].shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(own[name].shape)} in the network"
            raise UserError(
                f"{origin}: '{name}' has another shape ({shapes}): another architecture or number of classes"
            )
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{origin}: '{name}' is sparse, quantized, complex or empty: dense real numbers are needed")
        if name not in own:
            raise UserError(
                f"{origin} has '{name}', which the network lacks: it holds the weights of another architecture"
            )


def _upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content under today's names. Of format 2 are those of versions before the names of the field."""
    for old, new in (("epoch_totals", "epoch_metrics"), ("window_totals", "window_metrics")):
        if old in state:
            state[new] = {"by_rank": state.pop(old)}
    state["config"] = renamed.upgrade(state["config"])
    if "history" not in state and "conditions" in state:
        start = {"step": 0, "epoch": 0, "ranks": state["conditions"]["ranks"], "changed": {}}
        start["grad_accum_steps"] = state["config"]["optim"]["grad_accum_steps"]
        state["history"] = {"segments": [start]}
    return state


def _serialise(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    if content[-22:-18] != b"PK\5\6" or content[-2:] != b"\0\0":  # end of the central directory, no comment yet
        raise RuntimeError("torch.save no longer ends with an empty zip comment")
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + struct.pack("<H", CHECKSUM_LENGTH) + digest


def _is_whole(content: bytes) -> bool:
    original = content[: -CHECKSUM_LENGTH - 2] + b"\0\0"
    return content[-CHECKSUM_LENGTH:] == hashlib.sha256(original).hexdigest().encode()


def _write_temporary(path: Path, content: bytes) -> Path:
    """Write `content` beside `path`, down to the disk: a crash leaves the file at `path` as it was."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # its part may be what fills the disk
        raise
    return temporary


def _temporary(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _sync_folder(path: Path) -> None:
    """Have the disk know the folder's new names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
