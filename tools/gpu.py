"""Whether this machine's GPU trains right, and how fast: `python -m tools.gpu [--device cpu] [--json FILE]`.

The checks are G0 to G9; each is ok, FAIL or skipped with the reason. On a GPU each group has a process and a share of the
time of its own, so that a crash or a hang costs that group alone; what a group leaves of its share the next ones have. No
network is needed, nor DALI, pydantic or submitit: what needs them is skipped. With
`--device cpu` the same checks run on tiny networks: that shows that they work, and nothing of a GPU.
FILE has all figures, for `python -m tools.lab.scaling --measured FILE`; a Markdown table goes to FILE with .md in its end's
place. The exit code is 1 if a check failed.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.compilation import in_words
from pipeline.distributed import is_usable
from pipeline.errors import UserError
from tools.support.gpu_checks import CHECKS, GROUPS
from tools.support.gpu_checks.check import Setting
from tools.support.markdown import table

PROCESSES = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
MARGIN = 5.0  # seconds that a group has to end by itself
# How the time is shared out: about the seconds that the groups took on an H200 whose host is slow, and the rest for G9.
SHARES = {"G0": 25, "G1": 65, "G2": 20, "G3": 35, "G4": 60, "G5": 20, "G6": 95, "G7": 40, "G8": 80, "G9": 120}
Row = dict[str, Any]


def main() -> None:
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine has no GPU that torch can use; --device cpu tries the checks themselves"
        )
    file = Path(options.json)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {file}: cannot make its folder: {error.strerror}") from None
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    ends = deadlines(options.groups, time.monotonic(), 60 * options.minutes)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for group in options.groups:
            setting = Setting(device, Path(folder) / group, ends[group])
            found = run_apart(group, setting) if setting.on_gpu else run_group(group, setting)
            for row in found:
                print(line(row), flush=True)
            rows += found
            write({"device": options.device, "checks": rows}, file)  # after each: a crash loses no more
    counts = Counter(row["status"] for row in rows)
    print(
        f"\n{counts['ok']} ok, {counts['FAIL']} FAIL, {counts['skipped']} skipped; in {file} and {file.with_suffix('.md')}"
    )
    if counts["FAIL"]:
        sys.exit(1)


def deadlines(groups: list[str], start: float, seconds: float) -> dict[str, float]:
    """By when each group must have ended, so that those after it have their shares of the time."""
    total, spent, found = sum(SHARES[group] for group in groups), 0, {}
    for group in groups:
        spent += SHARES[group]
        found[group] = start + seconds * spent / total
    return found


def run_group(group: str, setting: Setting, notes: Path | None = None) -> list[Row]:
    """Run a group's checks here; add a line of JSON to `notes` after each."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    rows, lost = [], ""
    for check in of_group(group):
        if lost:
            rows.append(_row(check.title, group, "skipped", lost))
        else:
            with redirect_stdout(StringIO()):
                rows.append(check.run(setting))
            if rows[-1]["status"] == "FAIL" and not is_usable(setting.device):
                lost = f"not reached: the GPU could not be used any more after {check.title}"
        if notes:
            with notes.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def run_apart(group: str, setting: Setting) -> list[Row]:
    """Run a group's checks in a process of their own, which is killed at the deadline."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    left = setting.deadline - time.monotonic()
    if left < MARGIN:
        return [
            _row(check.title, group, "skipped", "no time was left: give more --minutes") for check in of_group(group)
        ]
    notes = setting.folder / "outcomes"
    inner = Setting(setting.device, setting.folder, setting.deadline - MARGIN)
    process = PROCESSES.Process(target=run_alone, args=(group, inner, notes))
    process.start()
    try:
        process.join(left)
        ended = "no time was left" if process.exitcode is None else f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # there is no such group before it has begun
            if process.pid:  # and what it has started, which would keep the GPU's memory
                os.killpg(process.pid, signal.SIGKILL)
    whole_lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
    rows = [json.loads(text) for text in whole_lines]
    for i, check in enumerate(of_group(group)[len(rows) :]):
        if i:
            rows.append(_row(check.title, group, "skipped", f"not reached: {ended}"))
            continue
        kept = inner.kept()
        rows.append(_row(check.title, group, "FAIL", f"{ended}; until then: {kept.text}" if kept else ended))
        rows[-1]["figures"] = kept and kept.figures
    return rows


def run_alone(group: str, setting: Setting, notes: Path) -> None:
    """`run_group` in a group of processes of its own, all of which can be ended at once."""
    os.setsid()
    warnings.filterwarnings(
        "ignore", module="torch"
    )  # of the profiler, the compiler and so on, which a user cannot act on
    run_group(group, setting, notes)


def of_group(group: str) -> list[Any]:
    return [check for check in CHECKS if check.group == group]


def _row(title: str, group: str, status: str, text: str) -> Row:
    return {"group": group, "check": title, "status": status, "text": text, "figures": None, "seconds": 0.0}


def line(row: Row) -> str:
    return f"{row['group']} {row['check']:<26} {row['status']:<8} {row['seconds']:6.1f} s  {row['text']}"


def write(results: dict[str, Any], file: Path) -> None:
    """Write the results as JSON, and as Markdown beside it."""
    file.write_text(json.dumps(results, indent=2) + "\n")
    file.with_suffix(".md").write_text(report(results) + "\n")


def report(results: dict[str, Any]) -> str:
    """The outcomes and the speeds as Markdown tables."""
    rows = [[row["group"], row["check"], row["status"], row["text"]] for row in results["checks"]]
    lines = table(["", "check", "outcome", f"seen on {results['device']}"], rows, names=4)
    speeds = [
        row
        for check in results["checks"]
        if check["check"] == "speed"
        for row in (check["figures"] or {"rows": []})["rows"]
    ]
    if speeds:
        titles = [
            "network",
            "implementation",
            "precision",
            "memory format",
            "batch",
            "images/s",
            "launches",
            "peak, GiB",
        ]
        cells = [
            [
                row["model"], f"{row['implementation']} {in_words(row['compile'])}".rstrip(), row["precision"],
                row["memory_format"], str(row["batch_size"]),
                f"{row['images_per_s']:,.0f}", "-" if row["launches"] is None else f"{row['launches']:,}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
            ]
            for row in speeds
        ]  # fmt: skip
        lines += ["", *table(titles, cells, names=4)]
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="G", help="of G0 to G9 [all]")
    parser.add_argument("--minutes", type=positive_integer, default=8, metavar="N", help="in which all must end [8]")
    parser.add_argument("--json", metavar="FILE", default="runs/gpu/gpu.json", help="[runs/gpu/gpu.json]")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
