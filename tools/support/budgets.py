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


def read_budget(report: Path, million: float) -> np.ndarray:
    """The thresholds, (E), of a report's dearest budget whose mean cost is at most so many million multiply-accumulates.

    Args:
        report: the file, or the folder that it lies in.

    Raises:
        UserError: the file is no report of this command, or all its budgets cost more.
    """
    report = report / "report.json" if report.is_dir() else report
    try:
        found = json.loads(report.read_text())["budgets"]
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
