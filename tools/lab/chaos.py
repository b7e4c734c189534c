"""Fault tests: disturb training runs, resume them, and compare the result with an undisturbed run's.

``python -m tools.lab.chaos [--faults NAME ...] [--tries N]`` trains a network with two processes again and again. It kills
and freezes processes, sends signals, fills the disk, and damages checkpoints and images; then it starts the same command
again. A run has survived if it resumed from a checkpoint and, for a fault that must end it, said why in one line. Where no
checkpoint can be read it must refuse to start, change nothing, and resume once the cause is removed. It has the same bits if
weights, optimiser, progress and records at its end equal those of the undisturbed run.

Linux only: it looks for the ranks in /proc.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.batches import SEES
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import Config
from pipeline.config_file import from_dict, to_yaml
from pipeline.exits import EXIT_RESUME, EXIT_USER_ERROR
from pipeline.run_dir import RECORDS, STATUS, read_records
from tools.lab.images import write_images
from tools.support.outputs import made_folder
from tools.support.torchrun import torchrun

RANKS = 2
STRIKES_A_RUN = 5
HANG_SECONDS = 10
TORCHRUN_PATIENCE = 40  # seconds that torchrun gives a rank which does not react, and some
PATIENCE = 1800  # seconds for whatever a run should do soon
TRAINS = f"({SEES})"  # what a run prints when its ranks have met and are about to train
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Outcome:
    """How many of the `tries` of a fault survived, and how many ended with the same bits."""

    tries: int
    survived: int
    equal: int


class FaultError(Exception):
    """The run did not do what it should; the message says what it did."""


class Run:
    """One start of the training command: in a session of its own, with its output in a file."""

    def __init__(self, config: Path, run_dir: Path, log: Path, file_size: int | None = None):
        self.run_dir, self.log = run_dir, log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                torchrun(
                    RANKS, "pipeline.train", config, "--run_dir", run_dir, launcher_module="torch.distributed.run"
                ),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)},  # torchrun leaves files behind
                preexec_fn=_limit_files(file_size) if file_size else None,
            )
        self.ranks: dict[int, int] = {}  # process ids, once they train

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.process.pid, *self.ranks.values()):
            _send(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_handlers(self) -> bool:
        """Wait until all ranks hear signals, which is before they import anything slow; False if the run ends before."""

        def all_hear() -> bool:
            self.ranks = _ranks_below(self.process.pid)
            return len(self.ranks) == RANKS and all(map(_hears_signals, self.ranks.values()))

        return self.wait_until(all_hear)

    def wait_for_training(self) -> bool:
        """Wait until the ranks have met and are about to train; False if the run ends before."""
        if not self.wait_until(lambda: TRAINS in self.output()):
            if "train loss" in self.output():  # or strikes would be tried for ever
                raise FaultError(f"the run has trained, and never said {TRAINS}: {self.output()[-2000:]}")
            return False
        self.ranks = _ranks_below(self.process.pid)
        return len(self.ranks) == RANKS

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.01) -> bool:
        """Wait for `condition`; False if the run ends without it."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise FaultError(f"nothing happened: {self.output()[-2000:]}")
            time.sleep(pause)
        return True

    def wait_for_completion(self) -> bool:
        """Wait until the run has saved that it is complete; False if its processes have gone by then."""
        return self.wait_until(lambda: _is_complete(self.run_dir), pause=0.001)

    def wait_for_saves(self, count: int) -> bool:
        """Wait until `count` more checkpoints have been written; False if the run ends before."""
        last = self.run_dir / "checkpoints" / "last.pt"
        before, seen = _changed(last), 0

        def counted() -> bool:
            nonlocal before, seen
            now = _changed(last)
            if now is not None and now != before:
                before, seen = now, seen + 1
            return seen >= count

        return self.wait_until(counted, pause=0.002)

    def end(self, patience: float = PATIENCE) -> int:
        """Wait until every process of the run is gone; return torchrun's exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise FaultError(f"the run did not end: {self.output()[-2000:]}") from None
        end = time.monotonic() + patience
        while any(map(_alive, self.ranks.values())):
            if time.monotonic() > end:
                raise FaultError("a rank outlived the run")
            time.sleep(0.05)
        return code


class Testbed:
    """A data set, a configuration, and an undisturbed run of it to compare others with."""

    def __init__(self, folder: Path, model: str, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self._starts = 0
        write_images(folder / "images" / "train", classes=4, images=168, seed=0)
        write_images(folder / "images" / "val", classes=4, images=32, seed=1)
        self.config = from_dict(
            {
                "run_dir": "set by each start",
                "model": {"name": model},
                "data": {"dir": str(folder / "images"), "crop_size": 32, "resize_size": 36},
                "optim": {"epochs": 2, "batch_size": 16, "milestones": [1], "lr": 0.05},
                "train": {"device": "cpu", "checkpoint_every": 1, "log_every": 1, "heartbeat_timeout": 600},
            },
            "tools.lab.chaos",
        )
        self.file = self.write_config("config.yaml", self.config)
        self.undisturbed = self.new_run_dir()
        with self.start(self.undisturbed) as run:
            run.wait_for_handlers()
            start = time.monotonic()
            run.wait_for_training()
            self.seconds_to_start = time.monotonic() - start
            if run.end() != 0:
                raise FaultError(f"the run failed: {run.output()[-3000:]}")

    def cost_of_a_save(self) -> str:
        """Size and time of the undisturbed run's checkpoints."""
        records = read_records(self.undisturbed)
        seconds = [s for record in records if (s := record.get("speed/checkpoint_seconds"))]
        size = (self.undisturbed / "checkpoints" / "last.pt").stat().st_size
        return f"a checkpoint of {size / 2**20:.0f} MiB takes {statistics.median(seconds):.2f} s (median of {len(seconds)})"

    def write_config(self, name: str, config: Config) -> Path:
        file = self.folder / name
        file.write_text(to_yaml(config))
        return file

    def new_run_dir(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder, prefix="run"))

    def start(self, run_dir: Path, config: Path | None = None, file_size: int | None = None) -> Run:
        self._starts += 1
        return Run(config or self.file, run_dir, self.folder / f"start{self._starts:04d}.log", file_size)

    def finish(self, run_dir: Path, config: Path | None = None) -> str:
        """Start the run and let it come to its end; return its output."""
        with self.start(run_dir, config) as run:
            if run.end() != 0:
                raise FaultError(f"the run failed: {run.output()[-3000:]}")
            return run.output()

    def is_refused(self, run_dir: Path, reason: str, expected: int = EXIT_USER_ERROR) -> bool:
        """Start the run; whether it ends with the expected exit code and `reason` in its output, and leaves every file as it
        was."""
        before = files_in(run_dir)
        with self.start(run_dir) as run:
            code, output = run.end(), run.output()
        return code != 0 and reason in output and f"exitcode  : {expected} (" in output and files_in(run_dir) == before

    def interrupted(self, saves: int) -> Path:
        """The directory of a run that was told to stop after a few checkpoints."""
        run_dir = self.new_run_dir()
        with self.start(run_dir) as run:
            run.wait_for_saves(saves)
            _send(run.process.pid, signal.SIGTERM)
            run.end()
        return run_dir

    def ends_alike(self, run_dir: Path, other: Path | None = None) -> bool:
        """Whether a finished run ended as the undisturbed one; removes it if so."""
        same = same_bits(run_dir, other or self.undisturbed)
        if same:
            shutil.rmtree(run_dir)
        return same


def same_bits(run_dir: Path, other: Path) -> bool:
    """Whether two finished runs have the same weights, optimiser, progress and records."""
    a, b = (load_checkpoint(CheckpointFolder(folder / "checkpoints").last) for folder in (run_dir, other))
    states = all(_equal(a[part], b[part]) for part in ("model", "optimizer", "scaler", "progress"))
    return states and _records(run_dir) == _records(other)


def files_in(folder: Path) -> dict[Path, bytes | str]:
    """What is in a run directory, but for its lock, which names the last process that held it, and its log."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.name not in ("lock", "log.txt")
    }


def kill_a_rank(testbed: Testbed, tries: int) -> Outcome:
    """SIGKILL to one rank at any moment from the first step on"""

    def strike(run: Run) -> bool | None:
        if not run.wait_for_training():
            return None
        time.sleep(testbed.random.uniform(0, 4))
        if run.process.poll() is not None:
            return None
        _send(run.ranks[testbed.random.randrange(RANKS)], signal.SIGKILL)
        return True

    return _strike_again_and_again(testbed, tries, strike)


def kill_while_saving(testbed: Testbed, tries: int) -> Outcome:
    """SIGKILL to rank 0, or to both ranks at once, in the middle of a save"""

    def strike(run: Run) -> bool | None:
        folder = run.run_dir / "checkpoints"
        files = [folder / "last.tmp", folder / "best.tmp"]
        saves_before = testbed.random.randint(0, 2)
        if not run.wait_for_training() or (saves_before and not run.wait_for_saves(saves_before)):
            return None
        if not run.wait_until(lambda: any(file.exists() for file in files), pause=0.0005):
            return None
        time.sleep(testbed.random.uniform(0, 0.08))
        for rank in range(testbed.random.choice((1, RANKS))):
            _send(run.ranks[rank], signal.SIGKILL)
        run.end()
        return any(file.exists() for file in files) or not (folder / "last.pt").exists()

    return _strike_again_and_again(testbed, tries, strike)


def kill_torchrun(testbed: Testbed, tries: int) -> Outcome:
    """SIGKILL to torchrun, which leaves the ranks without a parent; they must save and leave"""

    def strike(run: Run) -> bool | None:
        if not run.wait_for_training():
            return None
        time.sleep(testbed.random.uniform(0, 2))
        _send(run.process.pid, signal.SIGKILL)
        run.end()
        return True

    return _strike_again_and_again(testbed, tries, strike)


def stop_by_signal(testbed: Testbed, tries: int) -> Outcome:
    """SIGTERM, SIGUSR1 or SIGUSR2 to one rank or all, or SIGTERM to torchrun: all leave with a checkpoint, exit code 75"""

    def strike(run: Run) -> bool | None:
        if not run.wait_for_training():
            return None
        time.sleep(testbed.random.uniform(0, 4))
        if run.process.poll() is not None:
            return None
        target = _stop(testbed, run)
        code = run.end()
        if (
            "\nlast (epoch " in run.output()
        ):  # all had been done and saved: torchrun was struck while it looked for that
            return False
        left = run.output().count("interrupted: rank") == RANKS
        if code != 0 and not (left and (target == "torchrun" or "exitcode  : 75" in run.output())):
            raise FaultError(f"{target} struck, but not all ranks left as they should: {run.output()[-3000:]}")
        return code != 0

    return _strike_again_and_again(testbed, tries, strike)


def stop_while_starting(testbed: Testbed, tries: int) -> Outcome:
    """SIGTERM, SIGUSR1 or SIGUSR2 to ranks, or SIGTERM to torchrun, from the imports to the first step: exit code 75"""

    def strike(run: Run) -> bool | None:
        if not (run.run_dir / "checkpoints" / "last.pt").exists() and testbed.random.random() < 0.5:
            run.wait_for_training()  # so that the next start, which is struck, has a checkpoint to load
            run.wait_for_saves(1)
            _send(run.process.pid, signal.SIGTERM)
            return False
        if not run.wait_for_handlers():
            return None
        if TRAINS in run.output():
            raise FaultError("the ranks heard no signal before they trained")
        time.sleep(testbed.random.uniform(0, testbed.seconds_to_start))
        target = _stop(testbed, run)
        code, output = run.end(), run.output()
        if "while starting" not in output:  # it trained already
            return False if code != 0 else None
        left = output.count("interrupted: rank") == RANKS
        if code == 0 or not left or not (target == "torchrun" or "exitcode  : 75" in output):
            raise FaultError(f"{target} struck, but not all ranks left as they should: {output[-3000:]}")
        return True

    return _strike_again_and_again(testbed, tries, strike)


def stop_after_the_last_step(testbed: Testbed, tries: int) -> Outcome:
    """the same signals after the last checkpoint, before the processes have gone: complete; the next start does nothing"""

    def once() -> tuple[bool, Path]:
        while True:
            run_dir = testbed.new_run_dir()
            with testbed.start(run_dir) as run:
                run.wait_for_training()
                run.wait_for_completion()
                time.sleep(testbed.random.uniform(0, 0.5))
                struck = any(map(_alive, run.ranks.values()))
                target = _stop(testbed, run)
                code = run.end()
            if struck:
                break
            shutil.rmtree(run_dir)  # it was too late
        print(f"  struck: {target}, exit code {code}", flush=True)
        before, complete = _results(run_dir), _is_complete(run_dir)
        testbed.finish(run_dir)
        return complete and _results(run_dir) == before, run_dir

    return _repeat(testbed, tries, once)


def _stop(testbed: Testbed, run: Run) -> str:
    """Send torchrun, a rank or all ranks a signal that asks them to stop; return which."""
    target, number = testbed.random.choice(("torchrun", "a rank", "all ranks")), testbed.random.choice(STOP_SIGNALS)
    if target == "torchrun":
        _send(run.process.pid, signal.SIGTERM)
    for rank in {"torchrun": [], "a rank": [testbed.random.randrange(RANKS)], "all ranks": range(RANKS)}[target]:
        _send(run.ranks[rank], number)
    return target


def _strike_again_and_again(testbed: Testbed, tries: int, strike: Callable[[Run], bool | None]) -> Outcome:
    """Strike runs, each a few times, until `tries` strikes have hit what they were meant for.

    Args:
        strike: returns whether it has hit, or None if the run came to its end before.
    """
    hits = survived = equal = 0
    while hits < tries:
        run_dir, hits_of_run, unjudged = testbed.new_run_dir(), 0, 0
        for start in range(STRIKES_A_RUN + 1):
            whole = start == STRIKES_A_RUN or hits + hits_of_run == tries
            must_resume = (run_dir / "checkpoints" / "last.pt").exists()
            with testbed.start(run_dir) as run:
                hit = None if whole else strike(run)
                code = run.end()
                output = run.output()
                if hit is None and code != 0:
                    raise FaultError(f"the run failed by itself: {output[-3000:]}")
            if "while starting" not in output or not must_resume:  # it came so far that it would say so
                survived += unjudged * (_resumed(output) or not must_resume)
                unjudged = 0
            unjudged += bool(hit)
            hits_of_run += bool(hit)
            if code == 0:
                break
        hits += hits_of_run
        equal += hits_of_run * testbed.ends_alike(run_dir)
        print(f"  {hits} of {tries}", flush=True)
    return Outcome(hits, survived, equal)


def freeze_a_rank(testbed: Testbed, tries: int) -> Outcome:
    """SIGSTOP to one rank: the others must end the run in time, and name it"""

    impatient = dataclasses.replace(testbed.config.train, heartbeat_timeout=HANG_SECONDS)
    config = testbed.write_config("impatient.yaml", dataclasses.replace(testbed.config, train=impatient))

    def once() -> tuple[bool, Path]:
        run_dir, victim = testbed.new_run_dir(), testbed.random.randrange(RANKS)
        with testbed.start(run_dir, config) as run:
            run.wait_for_training()
            run.wait_for_saves(testbed.random.randint(1, 4))
            _send(run.ranks[victim], signal.SIGSTOP)
            start = time.monotonic()
            run.end(2 * HANG_SECONDS + TORCHRUN_PATIENCE)
            named = (
                f"rank {victim} (process {run.ranks[victim]} on" in run.output() and "does not respond" in run.output()
            )
            print(f"  ended {time.monotonic() - start:.0f} s after rank {victim} was stopped", flush=True)
        return named and _resumed(testbed.finish(run_dir)), run_dir

    return _repeat(testbed, tries, once)


def fill_the_disk(testbed: Testbed, tries: int) -> Outcome:
    """a limit on the size of files, which ends a save as a full disk does"""

    def once() -> tuple[bool, Path]:
        run_dir = testbed.interrupted(saves=testbed.random.randint(1, 4))
        last = run_dir / "checkpoints" / "last.pt"
        before = last.read_bytes()
        with testbed.start(run_dir, file_size=testbed.random.randrange(2**18, len(before))) as run:
            code, output = run.end(), run.output()
        survived = code != 0 and "cannot write a checkpoint" in output and last.read_bytes() == before
        return survived and _resumed(testbed.finish(run_dir)), run_dir

    return _repeat(testbed, tries, once)


def cut_the_checkpoint(testbed: Testbed, tries: int) -> Outcome:
    """the last checkpoint cut short anywhere"""
    return _damage(testbed, tries, lambda content: content[: testbed.random.randrange(len(content))])


def flip_a_bit(testbed: Testbed, tries: int) -> Outcome:
    """one bit of the last checkpoint flipped"""

    return _damage(testbed, tries, lambda content: _with_a_bit_flipped(testbed.random, content))


def plant_a_pickle(testbed: Testbed, tries: int) -> Outcome:
    """the last checkpoint replaced by a pickle that runs a command when it is loaded"""
    return _damage(testbed, tries, lambda _: pickle.dumps(_Hostile(testbed.folder / "hostile-code-ran")))


def _damage(testbed: Testbed, tries: int, damage: Callable[[bytes], bytes]) -> Outcome:
    """The run must pass over the damaged checkpoint loudly, and go on from the one before."""

    def once() -> tuple[bool, Path]:
        run_dir = testbed.interrupted(saves=testbed.random.randint(2, 5))
        last = run_dir / "checkpoints" / "last.pt"
        last.write_bytes(damage(last.read_bytes()))
        output = testbed.finish(run_dir)
        loud = "last.pt is damaged" in output and _resumed(output)
        return loud and not (testbed.folder / "hostile-code-ran").exists(), run_dir

    return _repeat(testbed, tries, once)


def damage_all_checkpoints(testbed: Testbed, tries: int) -> Outcome:
    """last.pt and previous.pt damaged: two starts refused, no file changed; resumed when a copy of last.pt is back"""

    def once() -> tuple[bool, Path]:
        run_dir = testbed.interrupted(saves=testbed.random.randint(2, 5))
        folder = CheckpointFolder(run_dir / "checkpoints")
        copy = folder.last.read_bytes()
        for file in (folder.last, folder.previous):
            content = file.read_bytes()
            cut, flipped = (
                content[: testbed.random.randrange(len(content))],
                _with_a_bit_flipped(testbed.random, content),
            )
            file.write_bytes(testbed.random.choice((cut, flipped)))
        reason = f"error: {run_dir} holds a run (last.pt (damaged), previous.pt (damaged)"
        refused = [testbed.is_refused(run_dir, reason) for _ in range(2)]
        folder.last.write_bytes(copy)
        resumed = _resumed(testbed.finish(run_dir))
        return all(refused) and resumed, run_dir

    return _repeat(testbed, tries, once)


def fail_to_read(testbed: Testbed, tries: int) -> Outcome:
    """a read error of last.pt (EIO or EISDIR): a start refused, no file changed; resumed when the cause is removed"""

    def once() -> tuple[bool, Path]:
        run_dir = testbed.interrupted(saves=testbed.random.randint(2, 5))
        last, aside = run_dir / "checkpoints" / "last.pt", run_dir / "aside"
        last.rename(aside)
        if testbed.random.choice((True, False)):
            last.symlink_to("/proc/self/mem")  # it opens, and no process has memory at address 0
            reason = f"interrupted: cannot read the checkpoint {last}: Input/output error"  # which may pass
            refused = testbed.is_refused(run_dir, reason, EXIT_RESUME)
            last.unlink()
        else:
            last.mkdir()
            refused = testbed.is_refused(run_dir, f"error: cannot read the checkpoint {last}: Is a directory")
            last.rmdir()
        aside.rename(last)
        resumed = _resumed(testbed.finish(run_dir))
        return refused and resumed, run_dir

    return _repeat(testbed, tries, once)


def remove_an_image(testbed: Testbed, tries: int) -> Outcome:
    """an image removed under the running training, which must name it; put back before the next start"""

    def once() -> tuple[bool, Path]:
        run_dir = testbed.new_run_dir()
        image = testbed.random.choice(sorted((testbed.folder / "images" / "train").rglob("*.jpg")))
        aside = testbed.folder / "removed.jpg"
        try:
            with testbed.start(run_dir) as run:
                run.wait_for_training()
                image.rename(aside)
                code, output = run.end(), run.output()
        finally:
            aside.rename(image)
        named = code != 0 and f"cannot read the image {image}" in output and "exitcode  : 2" in output
        return named and "failed" not in testbed.finish(run_dir), run_dir

    return _repeat(testbed, tries, once)


def skip_a_corrupt_image(testbed: Testbed, tries: int) -> Outcome:
    """an image cut short, with data.corrupt_images skip: a killed run skips what the undisturbed one skips"""
    skipping = dataclasses.replace(testbed.config, data=dataclasses.replace(testbed.config.data, corrupt_images="skip"))
    config, whole = testbed.write_config("skip.yaml", skipping), testbed.new_run_dir()
    image = sorted((testbed.folder / "images" / "train").rglob("*.jpg"))[0]
    content = image.read_bytes()
    image.write_bytes(content[:-100])
    try:
        whole_output = testbed.finish(whole, config)

        def once() -> tuple[bool, Path]:
            run_dir = testbed.new_run_dir()
            with testbed.start(run_dir, config) as run:
                run.wait_for_training()
                run.wait_for_saves(testbed.random.randint(1, 12))
                _send(run.process.pid, signal.SIGKILL)
                run.end()
            resumed = _resumed(testbed.finish(run_dir, config))
            return resumed and f"skipping the image {image}" in whole_output, run_dir

        return _repeat(testbed, tries, once, whole)
    finally:
        image.write_bytes(content)


def _repeat(
    testbed: Testbed, tries: int, once: Callable[[], tuple[bool, Path]], expected: Path | None = None
) -> Outcome:
    """Try a fault `tries` times; `once` returns whether the run survived, and its directory."""
    survived = equal = 0
    for _ in range(tries):
        well, run_dir = once()
        survived += well
        equal += testbed.ends_alike(run_dir, expected)
    return Outcome(tries, survived, equal)


FAULTS: dict[str, tuple[Callable[[Testbed, int], Outcome], int]] = {
    "kill": (kill_a_rank, 30),
    "kill-saving": (kill_while_saving, 50),
    "kill-torchrun": (kill_torchrun, 5),
    "signal": (stop_by_signal, 10),
    "signal-starting": (stop_while_starting, 10),
    "signal-ending": (stop_after_the_last_step, 5),
    "freeze": (freeze_a_rank, 4),
    "disk-full": (fill_the_disk, 5),
    "cut": (cut_the_checkpoint, 5),
    "bit-flip": (flip_a_bit, 5),
    "pickle": (plant_a_pickle, 3),
    "all-damaged": (damage_all_checkpoints, 4),
    "read-error": (fail_to_read, 4),
    "remove-image": (remove_an_image, 3),
    "corrupt-image": (skip_a_corrupt_image, 3),
}


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tools.lab.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"faults to test: {', '.join(FAULTS)} [all]"
    parser.add_argument("--faults", nargs="+", choices=FAULTS, metavar="NAME", default=list(FAULTS), help=names)
    parser.add_argument("--tries", type=positive_integer, help="tries of each fault [3 to 50, by fault]")
    parser.add_argument("--model", default="densenet121", help="network to train, on images of 32 pixels [%(default)s]")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments and places of the faults [%(default)s]"
    )
    parser.add_argument("--output", default="runs/chaos", help="folder for the table and the logs [%(default)s]")
    options = parser.parse_args()
    folder = made_folder(options.output)
    work = Path(tempfile.mkdtemp(dir=folder, prefix="work"))
    print("the undisturbed run", flush=True)
    testbed = Testbed(work, options.model, options.seed)
    print(testbed.cost_of_a_save(), flush=True)
    lines = ["| fault | tries | survived | same bits |", "|---|--:|--:|--:|"]
    failed = False
    for name in options.faults:
        fault, tries = FAULTS[name]
        print(f"{name}: {fault.__doc__}", flush=True)
        try:
            outcome = fault(testbed, options.tries or tries)
        except FaultError as error:
            print(error, file=sys.stderr)
            outcome = Outcome(options.tries or tries, 0, 0)
        failed |= not outcome.tries == outcome.survived == outcome.equal
        lines.append(f"| {name}: {fault.__doc__} | {outcome.tries} | {outcome.survived} | {outcome.equal} |")
        (folder / "chaos.md").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))
    if failed:
        print(f"logs and run directories of the failures: {work}")
        sys.exit(1)
    shutil.rmtree(work)


@dataclass
class _Hostile:
    """A pickle of this makes a file when it is loaded."""

    file: Path

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def _limit_files(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ranks_below(parent: int) -> dict[int, int]:
    """Process ids of torchrun's ranks, by rank."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): int(pid) for word in environment if word.startswith(b"RANK=")}
    return found


def _hears_signals(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM. A rank sets it first, and those of the other signals with it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return all(caught >> (number - 1) & 1 for number in STOP_SIGNALS)


def _resumed(output: str) -> bool:
    """Whether a start has found the run's checkpoint, which may be of its end."""
    return "resuming at" in output or "nothing is left to train" in output


def _is_complete(run_dir: Path) -> bool:
    try:
        return json.loads((run_dir / STATUS).read_text())["complete"]
    except FileNotFoundError:
        return False


def _results(run_dir: Path) -> dict[Path, bytes | str]:
    """The checkpoints, records and status of a run."""
    kept = ("checkpoints", RECORDS, STATUS)
    return {path: content for path, content in files_in(run_dir).items() if path.relative_to(run_dir).parts[0] in kept}


def _with_a_bit_flipped(random: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def _changed(file: Path) -> int | None:
    """The inode of the file, which changes with each save; None before the first."""
    try:
        return os.stat(file).st_ino
    except OSError:
        return None


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested structures of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _records(run_dir: Path) -> list[dict]:
    """The run's records without what differs from run to run. A damaged line, which others pass over, is an error here."""
    lines = [json.loads(line) for line in (run_dir / RECORDS).read_text().splitlines()]
    return [{key: v for key, v in line.items() if not key.startswith(("speed/", "memory/"))} for line in lines]


if __name__ == "__main__":
    exit_on_user_error(main)
