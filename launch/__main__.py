"""Train on a cluster: ``python -m launch CONFIG.yaml ... [--nodes N] [--cluster FILE|local|slurm] [--dry-run]``.

Flags such as --optim.lr 0.2 override the configurations, --grid optim.lr=0.1,0.2 makes a run of each value. Several
runs become one job array. ``python -m launch status|logs|cancel|resume RUN ...`` looks after runs, or all in a folder.
"""

import argparse
import dataclasses
import errno
import itertools
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.cluster import Cluster, add_flags, cluster_flags, read_cluster
from launch.description import Turns, describe, processes
from launch.log import is_held_here, lock_of
from launch.names import refuse_missing_files, refuse_unknown_names
from launch.records import CANCEL, NO_CANCEL, SUBMITTED, Job, add_event, config_of, find_job, read_events, read_job
from launch.status import (
    ENDED,
    Queue,
    Status,
    is_alive,
    is_waiting_or_running,
    logs_of,
    read_status,
    runs_below,
    slurm_queue,
    to_text,
)
from launch.submission import UnknownJobError, refuse_impossible, script, submit
from pipeline.command import ArgumentParser, exit_on_user_error
from pipeline.config import Config
from pipeline.config_file import SCHEMA, load_config, load_stored_config, refuse_flags_without_use, run_dir_of
from pipeline.errors import UserError
from pipeline.run_dir import CONFIG, Before, is_complete, read_progress
from pipeline.words import counted

CHANGING = ("cancel", "resume")  # the verbs that do nothing at all where one of several runs is not found
VERBS = ("status", "logs", *CHANGING)
NAMED = 3  # changes of a recipe, in one line


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in VERBS:
        look_after(sys.argv[1], sys.argv[2:])
    else:
        start(sys.argv[1:])


def start(arguments: list[str]) -> None:
    """Submit the configurations that the command line names, or say what would be submitted."""
    parser = ArgumentParser(
        prog="python -m launch",
        usage="%(prog)s CONFIG.yaml ... [--nodes N] [--cluster FILE|local|slurm] [--section.field VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="configurations, one run each")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="a run of each value of a field; of lists KEY=[A,B],[C]",
    )
    parser.add_argument("--images-per-second", type=_speed, metavar="N", help="speed of one rank, for the estimate")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the script, submit nothing")
    add_flags(parser)
    SCHEMA.add_flags(parser, title="run")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    own_flags = ("--cluster", "--grid", "--images-per-second", "--dry-run", *cluster_flags())
    SCHEMA.refuse_unknown(unknown, own_flags)
    cluster, overrides = read_cluster(options), SCHEMA.given(options)
    varied = [word.partition("=")[0] for word in options.grid]
    for key in varied:
        if key in overrides or varied.count(key) > 1:
            raise UserError(f"{key} is given twice: give all its values to one --grid {key}=A,B")
    configs = [
        read_config(file, overrides, values, several=len(options.configs) > 1, gpus=cluster.gpus_per_node > 0)
        for file in options.configs
        for values in itertools.product(*(grid_values(word) for word in options.grid))
    ]
    refuse_flags_without_use(list(overrides), configs)
    run_dirs = [config.run_dir for config in configs]
    for run_dir in run_dirs:
        if run_dirs.count(run_dir) > 1:
            raise UserError(f"two of the runs have the run directory {run_dir}: give each config its own run_dir")
    asked = [config for config in configs if not _is_complete(config)]
    others = [text for config in configs if config not in asked and (text := _as_another_run(config))]
    if others and not asked:
        raise UserError(others[0])
    for text in others:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    configs = asked
    if not configs:
        return
    refuse_impossible(cluster, len(configs), submits=not options.dry_run)
    refuse_unknown_names(configs)
    refuse_missing_files(configs)
    with leaving_nothing_if_refused(run_dirs):
        turns = Turns(min(len(configs), cluster.parallel or (1 if cluster.kind == "local" else len(configs))))
        for config in configs:
            _refuse_if_running(Path(config.run_dir))
            print(describe(config, cluster, options.images_per_second, turns, not options.dry_run), end="\n\n")
        if not options.dry_run:
            for config in configs:  # once more, as the images may have taken long to index
                _refuse_if_running(Path(config.run_dir))
            report(configs, submit(configs, cluster), cluster)
            return
    print(script(configs, cluster) if cluster.kind == "slurm" else processes(configs, cluster))


def _speed(text: str) -> float:
    """Images a second, from 0.01 on: of less the run's end has no date."""
    with suppress(ValueError):
        if 0.01 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"a number of 0.01 or more is needed (got '{text}')")


def read_config(
    file: str, overrides: dict[str, Any], values: tuple[tuple[str, str], ...], several: bool, gpus: bool
) -> Config:
    """Read one run's configuration, with paths that hold wherever the job starts.

    Args:
        overrides: fields by key that the command line gave.
        values: of the fields of the grid, by key, as they were written.
        several: it is one of several files, so that a run directory of the command line is a folder for all.
        gpus: the job asks for GPUs, so that it fails where it finds none and does not train on CPU.
    """
    grid = SCHEMA.given(argparse.Namespace(**dict(values)))
    folder = Path(run_dir_of(file, overrides | grid))
    folder = folder / Path(file).stem if several and "run_dir" in overrides else folder
    suffix = "".join(f"-{key.rpartition('.')[2]}{_in_a_file_name(value)}" for key, value in values)
    run_dir = os.path.abspath(f"{folder}{suffix}")  # before the rest: what is changed in a run follows from what it was
    fields = overrides | grid | {"run_dir": run_dir}
    config = with_absolute_paths(load_config(file, fields, shared=overrides.keys() - grid.keys()))
    if not gpus or config.train.device != "auto":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda"))


def with_absolute_paths(config: Config) -> Config:
    """The configuration for a process that begins in another folder."""
    data, model, optim = config.data, config.model, config.optim
    data = dataclasses.replace(data, dir=os.path.abspath(data.dir))
    if model.weights and not model.weights.startswith("timm:"):
        model = dataclasses.replace(model, weights=os.path.abspath(model.weights))
    if optim.class_weights and optim.class_weights != "balanced":
        optim = dataclasses.replace(optim, class_weights=os.path.abspath(optim.class_weights))
    return dataclasses.replace(config, model=model, data=data, optim=optim)


def grid_values(word: str) -> list[tuple[str, str]]:
    """Key and value, as it was written, of each run of ``--grid KEY=A,B`` or, for a field that is a list, ``KEY=[A,B],[C]``.

    Raises:
        UserError: the key is unknown, or it is not clear where a value ends.
    """
    key, sign, text = word.partition("=")
    if not sign or not text:
        raise UserError(f"--grid {word}: KEY=A,B is needed, as in --grid optim.lr=0.1,0.2")
    if key not in SCHEMA.fields:
        SCHEMA.refuse_unknown([f"--{key}"])
    if SCHEMA.is_list(key):
        if not re.fullmatch(r"\[[^][]*\](,\[[^][]*\])*", text):
            raise UserError(
                f"--grid {word}: {key} is a list; write each value in brackets, as in --grid '{key}=[1,2],[3,4]'"
            )
        values = re.findall(r"\[[^][]*\]", text)
    else:
        if "[" in text:
            raise UserError(
                f"--grid {word}: {key} is no list; write its values without brackets, as in --grid {key}=A,B"
            )
        values = text.split(",")
    if "" in values or len(set(values)) < len(values):
        raise UserError(f"--grid {word}: a value is empty or stands twice")
    return [(key, value) for value in values]


def _in_a_file_name(value: str) -> str:
    return value.strip("[]").replace(",", "-").replace(os.sep, "-").replace(" ", "")


@contextmanager
def leaving_nothing_if_refused(run_dirs: list[str]) -> Iterator[None]:
    """Remove what was written about the images into run directories, if this is left by a mistake of the user."""
    before = {Path(run_dir): Before(Path(run_dir)) for run_dir in run_dirs}
    try:
        yield
    except UnknownJobError:
        raise
    except UserError:
        for run_dir, directory in before.items():
            if not is_held_here(run_dir):  # by a training that has begun meanwhile
                directory.put_back()
        raise


def look_after(verb: str, arguments: list[str]) -> None:
    """``status``, ``logs``, ``cancel`` or ``resume``."""
    parser = ArgumentParser(prog=f"python -m launch {verb}")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or a folder of runs")
    if verb == "logs":
        parser.add_argument("--follow", action="store_true", help="go on as the logs grow")
    options = parser.parse_intermixed_args(arguments)
    runs, failed = _runs_of(options.runs, verb)
    if verb == "status" and runs:
        queue, statuses = None, []
        try:
            queue = _queue_for(runs)
        except UserError as error:  # of runs elsewhere there is something to say all the same
            failed.append(error)
            runs = [run for run in runs if not _is_slurms(run)]
        for run in runs:
            try:
                statuses.append(read_status(run, queue))
            except UserError as error:
                failed.append(error)
        if statuses:
            print(to_text(statuses), flush=True)
    elif verb == "logs" and not (failed and options.follow):  # following never ends, and the error would not be shown
        show_logs(runs, options.follow)
    elif verb in CHANGING and not failed:
        failed = cancel_all(runs) if verb == "cancel" else resume_all(runs)
    for failure in failed[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failed:
        raise failed[-1]


def _runs_of(folders: list[str], verb: str) -> tuple[list[Path], list[UserError]]:
    """The runs that are meant, each once, whatever names it is given under; and what is wrong with the other names."""
    changes = verb in CHANGING
    found, failed = dict[str, Path](), list[UserError]()
    for folder in folders:
        try:
            runs = runs_below(Path(folder), of_grid=not changes)  # no other run by a slip of the pen
        except UserError as error:
            failed.append(error)
            continue
        if changes:  # of a folder the jobs are meant
            runs = [run for run in runs if (run / "job.json").exists()] or runs
        for run in runs:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values()), failed


def show_logs(runs: list[Path], follow: bool) -> None:
    """All attempts' logs as one, each line with the rank whose it is, in the order in which they grow."""
    places: dict[Path, int] = {}
    of_one_name = len({run.name for run in runs}) < len(runs)
    called = {run: str(run) if of_one_name else run.name for run in runs}
    while True:
        for run in runs:
            for whose, file in logs_of(run):
                with open(file, errors="replace") as stream:
                    stream.seek(places.get(file, 0))
                    for line in iter(stream.readline, ""):
                        print(f"{f'{called[run]} ' if len(runs) > 1 else ''}{whose}: {line}", end="", flush=True)
                    places[file] = stream.tell()
        if not follow:
            return
        time.sleep(1)


def cancel(run: Path) -> None:
    """End a run's job; its ranks write a checkpoint first."""
    job, queue = read_job(run), _queue_for([run])
    if job.kind == "local" and job.host != socket.gethostname():
        raise UserError(f"{run} runs in processes of {job.host}: cancel it there")
    status = read_status(run, queue)
    if status.state in ENDED:
        print(f"{run}: has ended already ({status.state})")
        return
    if job.kind == "slurm" and shutil.which("scancel") is None:
        raise UserError(
            f"{run} is SLURM's job {job.id}, and there is no SLURM on this machine: cancel it where there is"
        )
    known = is_alive(job, run) if job.kind == "local" else is_waiting_or_running(job, queue)
    if not known and (job.kind == "local" or is_held_here(run)):
        process, _ = lock_of(run)
        raise UserError(
            f"{run} is trained by process {process}, and its job {job.id} has gone: kill {process} ends it with a checkpoint"
        )
    try:
        add_event(run, CANCEL, job=job.id)  # before the job may end by it: no further attempt shall follow
    except OSError as error:
        remedy = "its owner can cancel it" if error.errno in (errno.EACCES, errno.EPERM) else "make room there"
        raise UserError(f"{run} cannot be written ({error.strerror}): {remedy}") from None
    try:
        _tell_to_end(run, job, status)
    except ProcessLookupError:
        print(f"{run}: has just ended")
        return
    except (OSError, UserError) as error:
        add_event(run, NO_CANCEL, job=job.id)
        raise UserError(f"{run} goes on: {error}") from None
    print(f"{run}: job {job.id} is told to end")


def _tell_to_end(run: Path, job: Job, status: Status) -> None:
    """
    Raises:
        UserError: SLURM refuses.
        ProcessLookupError: it has just ended.
        OSError: the process is another user's.
    """
    if job.kind == "local":
        os.kill(int(job.id), signal.SIGTERM)
        return
    # A signal of ours lets the ranks save for as long as that takes; scancel's own kills after the site's KillWait.
    events = [event for event in read_events(run) if event.get("job") == job.id and event["event"] in ("start", "end")]
    trains = status.state == "running" and events and events[-1]["event"] == "start"
    done = subprocess.run(["scancel", *(["--signal=USR2"] if trains else []), job.id], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scancel {job.id}: {' '.join(done.stderr.split())}")


def cancel_all(runs: list[Path]) -> list[UserError]:
    """Cancel runs; return what stood in the way of some: the others have a right to their end."""
    failed = []
    for run in runs:
        try:
            cancel(run)
        except UserError as error:
            failed.append(error)
    return failed


def resume_all(runs: list[Path]) -> list[UserError]:
    """Submit runs again that are not complete, as they were submitted before; together those that take turns (--parallel)."""
    failed, groups = list[UserError](), list[tuple[Cluster, list[Config]]]()
    for run in runs:
        try:
            config, cluster = as_submitted(run)
            if _is_complete(config):
                if text := _as_another_run(config):
                    print(f"warning: {text}", file=sys.stderr, flush=True)
                continue
            together = cluster.kind == "local" or cluster.parallel
            alike = next((configs for other, configs in groups if together and other == cluster), None)
            if alike is None:
                groups.append((cluster, [config]))
            else:
                alike.append(config)
        except UserError as error:
            failed.append(error)
    for cluster, configs in groups:
        try:
            report(configs, submit(configs, cluster), cluster)
        except UserError as error:
            failed.append(error)
    return failed


def as_submitted(run: Path) -> tuple[Config, Cluster]:
    """What a run is, and what it asked of its cluster.

    Raises:
        UserError: it is running, or was never submitted.
    """
    _refuse_if_running(run)
    asked = next((event for event in reversed(read_events(run)) if event["event"] == "submit"), None)
    if asked is None:
        raise UserError(f"{run} was never submitted by python -m launch: its own command resumes it")
    config = load_stored_config(config_of(run, read_events(run)))
    config = dataclasses.replace(config, run_dir=os.path.abspath(run))  # which may have been moved
    return with_absolute_paths(config), Cluster(**asked["cluster"])


def _is_complete(config: Config) -> bool:
    """Whether a run has all the epochs of its configuration already; it is said if it was the same recipe."""
    run = Path(config.run_dir)
    complete = is_complete(run, config.optim.epochs)
    if complete and not _as_another_run(config):
        print(
            f"{run}: is complete ({_epochs_of(run)}), and nothing is left to train; submit it with --optim.epochs N "
            "--train.change optim.epochs to train it to epoch N"
        )
    return complete


def _as_another_run(config: Config) -> str:
    """That a complete run was another one than its configuration asks for now, in a line; empty if it was not."""
    from pipeline.resume import recipe_changes  # which loads torch

    run, changes = Path(config.run_dir), list[str]()
    with suppress(UserError):  # of a run whose configuration is gone nothing can be said
        own = run / CONFIG
        changes = recipe_changes(load_stored_config(own if own.exists() else run / SUBMITTED), config)
    more = f", and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return (
        f"{run} is complete ({_epochs_of(run)}) as another run than this one ({'; '.join(changes[:NAMED])}{more}), and nothing "
        "is trained: give another --run_dir"
        if changes
        else ""
    )


def _epochs_of(run: Path) -> str:
    return counted(read_progress(run)["epoch"], "epoch")


def report(configs: list[Config], jobs: list[Job], cluster: Cluster) -> None:
    """Say which job each run has become."""
    at_once = cluster.parallel or 1
    for number, (config, job) in enumerate(zip(configs, jobs, strict=True)):
        waits = cluster.kind == "local" and number >= at_once
        when = "those before it have ended" if at_once == 1 else f"fewer than {at_once} of those before it train"
        turn = f"; begins when {when} (--parallel)" if waits else ""
        print(f"job {job.id}: {config.run_dir}, logs in {job.folder}{turn}")


def _queue_for(runs: list[Path]) -> Queue:
    """SLURM's queue, if one of the runs is SLURM's.

    Raises:
        UserError: SLURM does not answer. Without its word a job that waits would be taken for one that is gone.
    """
    return slurm_queue() if any(map(_is_slurms, runs)) else None


def _is_slurms(run: Path) -> bool:
    with suppress(UserError):  # which the run's own status says
        return (job := find_job(run)) is not None and job.kind == "slurm"
    return False


def _refuse_if_running(run: Path) -> None:
    status = read_status(run, _queue_for([run]))
    if status.state in ENDED:
        return
    why = f" ({status.reason})" if status.reason else ""
    if status.job:
        raise UserError(
            f"{run} is the run of job {status.job.id}, which is {status.state}{why}: cancel it, or set --run_dir"
        )
    process, host = lock_of(run)
    raise UserError(f"{run} is trained by process {process} on {host}{why}: wait for its end, or set --run_dir")


if __name__ == "__main__":
    exit_on_user_error(main)
