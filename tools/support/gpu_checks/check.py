"""What a check is, and what it finds."""

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.precision import set_tf32


class Skipped(Exception):  # noqa: N818 - no error
    """A check cannot look; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where checks run.

    Attributes:
        folder: theirs to write into.
        deadline: of `time.monotonic`; what can be shortened ends by then.
    """

    device: torch.device
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def keep(self, found: "Finding") -> None:
        """Keep what a check has seen so far, in case that its process ends."""
        file = self.folder / "kept"
        file.with_suffix(".new").write_text(json.dumps(found))
        file.with_suffix(".new").replace(file)

    def kept(self) -> "Finding | None":
        """What the check that was begun last has kept."""
        file = self.folder / "kept"
        return Finding(*json.loads(file.read_text())) if file.exists() else None

    def forget(self) -> None:
        (self.folder / "kept").unlink(missing_ok=True)


class Finding(NamedTuple):
    """What a check has seen, in a line, and figures for the JSON file."""

    text: str
    figures: Any = None


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        group: G0 to G9.
        needs: modules without which it cannot run.
    """

    group: str
    title: str
    look: Callable[[Setting], Finding]
    needs: tuple[str, ...] = ()

    def run(self, setting: Setting) -> dict[str, Any]:
        """Its outcome: group, title, status (ok, FAIL or skipped), text, figures and seconds."""
        start = time.monotonic()
        setting.forget()
        set_tf32("fp32")  # torch begins with TF32, and a check before this one may have left it on
        torch.backends.cudnn.benchmark = False
        if torch.are_deterministic_algorithms_enabled():  # as a run has left it
            torch.use_deterministic_algorithms(False)
        try:
            status, found = "ok", self._look(setting)
        except Skipped as reason:
            status, found = "skipped", Finding(str(reason))
        except Exception as error:
            lines = str(error).splitlines() or [""]
            status, found = "FAIL", Finding(f"{type(error).__name__}: {lines[0]}")
        return {
            "group": self.group,
            "check": self.title,
            "status": status,
            "text": found.text,
            "figures": found.figures,
            "seconds": round(time.monotonic() - start, 2),
        }

    def _look(self, setting: Setting) -> Finding:
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise Skipped(f"{name} is not installed or does not load ({error})") from None
        return self.look(setting)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)
