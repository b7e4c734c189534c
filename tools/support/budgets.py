"""The budgets in a report of tools/anytime.py."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError


def limits_of(budget: dict[str, Any]) -> np.ndarray:
    """The thresholds of a budget in a report: None stands for one that no image reaches."""
    return np.array([math.inf if limit is None else limit for limit in budget["thresholds"]])


def read_budget(report: Path, million: float, model: str, crop_size: int) -> np.ndarray:
    """The thresholds, (E), of a report's dearest budget whose mean cost is at most so many million multiply-accumulates.

    Args:
        report: the file, or the folder that it lies in.
        model, crop_size: of the network that answers, and of its images.

    Raises:
        UserError: the file is no report of this command, or of another network or crop size, or all its budgets cost more.
    """
    report = report / "report.json" if report.is_dir() else report
    try:
        whole = json.loads(report.read_text())
        found = whole["budgets"]
        of = whole.get("model", model), whole.get("crop_size", crop_size)
        if of != (model, crop_size):
            raise UserError(
                f"--thresholds {report} is of {of[0]} at {of[1]} pixels, and what answers is {model} at {crop_size}: give the "
                "report of that (python -m tools.anytime --report DIR)"
            )
        affordable = [b for b in found if b["multiply_accumulates"] <= 1e6 * million]
        if found and not affordable:
            least = min(b["multiply_accumulates"] for b in found) / 1e6
            raise UserError(f"--budget {million:g}: the least of {report} is {math.ceil(100 * least) / 100:.2f}")
        return limits_of(max(affordable, key=lambda b: b["multiply_accumulates"]))
    except OSError as error:
        raise UserError(f"cannot read --thresholds {report}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--thresholds {report} holds no budgets: give the report.json of tools.anytime --report DIR"
        ) from None
