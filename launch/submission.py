"""From configurations to jobs: checks, the code as it is now, and SLURM's or the local twin's start."""

import dataclasses
import errno
import itertools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import submitit

from launch.cluster import Cluster
from launch.records import JOB_BEGAN, SUBMITTED, Job, add_event, config_file, write_job, write_submission
from launch.task import TrainingTask
from launch.turns import take_turn, visible_gpus
from pipeline.config import Config
from pipeline.config_file import to_yaml
from pipeline.errors import UserError
from pipeline.machine import present_gpus
from pipeline.provenance import COPY_OF, commit
from pipeline.run_dir import replace_file
from pipeline.words import agreed

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("pipeline", "launch")


class UnknownJobError(UserError):
    """Jobs are there that their runs' directories do not tell of."""


def submit(configs: list[Config], cluster: Cluster) -> list[Job]:
    """Start a job for each configuration; several are one array on SLURM. What is refused leaves no job and no folder.

    Raises:
        UserError: there is no SLURM, or it refuses the request.
        UnknownJobError: a run's directory cannot be written after all.
    """
    refuse_impossible(cluster, len(configs), submits=True)
    with _new_folder(configs) as folder:
        _write(configs, cluster, folder)
        start = _start_slurm if cluster.kind == "slurm" else _start_local
        ids = start(configs, cluster, folder)
    jobs = [Job(i, cluster.kind, socket.gethostname(), str(folder)) for i in ids]
    unknown: list[str] = []
    for config, job in zip(configs, jobs, strict=True):
        if error := _note(config, job, cluster):
            reason = f"{config.run_dir} cannot be written ({error.strerror})"
            unknown.append(job.id)
    if unknown:
        command = "scancel" if cluster.kind == "slurm" else "kill"
        raise UnknownJobError(
            f"the jobs are submitted, but {reason}, so that status and cancel do not know {len(unknown)} of them: end "
            f"{agreed(len(unknown), 'it', 'them')} with {command} {' '.join(unknown)}"
        )
    return jobs


def _note(config: Config, job: Job, cluster: Cluster) -> OSError | None:
    """Write into a run's directory which job it has; return why that cannot be done."""
    run_dir = Path(config.run_dir)
    try:
        replace_file(run_dir / SUBMITTED, to_yaml(config))
        write_job(run_dir, job)
        add_event(run_dir, "submit", job=job.id, folder=job.folder, cluster=dataclasses.asdict(cluster))
    except OSError as error:
        return error
    return None


def _write(configs: list[Config], cluster: Cluster, folder: Path) -> None:
    """Fill the submission's folder: the code as it is now, the configurations, and what the ranks need to know.

    Raises:
        UserError: it cannot be written.
    """
    run_dirs = [config.run_dir for config in configs]
    try:
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / package, folder / "code" / package, ignore=ignored)
        (folder / "code" / "pipeline" / COPY_OF).write_text(commit(REPOSITORY / "pipeline"))
        write_submission(
            folder, run_dirs, cluster.ranks, cluster.seconds, cluster.warning_seconds, cluster.failures,
            cluster.parallel or 1,
        )  # fmt: skip
        config_file(folder, 0).parent.mkdir()
        for index, config in enumerate(configs):
            config_file(folder, index).write_text(to_yaml(config))
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise UserError(f"cannot write {folder} ({why}): make room there, or set --run_dir") from None


def refuse_impossible(cluster: Cluster, runs: int, submits: bool) -> None:
    """Refuse what this machine cannot start, before images are indexed for hours.

    Args:
        runs: how many are submitted together.
        submits: not a dry run, which needs no SLURM.

    Raises:
        UserError: there is no SLURM, or several nodes of one machine are asked for, or more GPUs than a run has that shares
            them with others.
    """
    at_once, gpus = min(cluster.parallel or 1, runs), len(visible_gpus(len(present_gpus())))
    each = max(1, gpus // at_once)  # as `gpus_for_part` divides them
    if cluster.kind == "local" and at_once > 1 and each < cluster.gpus_per_node <= gpus:
        raise UserError(
            f"--parallel {at_once} leaves a run {each} of this machine's {gpus} GPUs, and it asks for "
            f"{cluster.gpus_per_node}: --parallel {gpus // cluster.gpus_per_node} at most"
        )
    if cluster.kind == "local" and cluster.nodes > 1:
        raise UserError("--cluster local is one machine: --nodes must be 1")
    if submits and cluster.kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("there is no SLURM on this machine (no sbatch): use --cluster local, or torchrun")


def script(configs: list[Config], cluster: Cluster) -> str:
    """The script that `submit` would give to sbatch; it can be shown where there is no SLURM."""
    folder = Path(configs[0].run_dir).parent / "jobs" / "TIME"
    executor = _executor(configs, cluster, folder)
    if len(configs) > 1:
        executor.parameters["map_count"] = len(configs)
    # submitit shows a script only after it has submitted it; these are the parts of which it makes one.
    return executor._make_submission_file_text(executor._submitit_command_str, "")


class _Executor(submitit.SlurmExecutor):
    """Has each rank begin with `launch.rank` in place of submitit's command, which would hear no signal for a while."""

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m launch.rank {shlex.quote(str(self.folder))}"

    @classmethod
    def affinity(cls) -> int:
        """Above 0: `submit` looks for SLURM itself, and `script` does not need it."""
        return 2


def _executor(configs: list[Config], cluster: Cluster, folder: Path) -> _Executor:
    executor = _Executor(folder / "%j")
    wanted = dict(
        job_name=Path(configs[0].run_dir).name if len(configs) == 1 else f"{len(configs)}-trainings",
        time=cluster.minutes,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.ranks_per_node,
        gpus_per_node=cluster.gpus_per_node or None,
        cpus_per_task=cluster.cpus_per_task,
        mem=cluster.memory_gb and f"{cluster.memory_gb}GB",
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        mail_user=cluster.mail_user,
        mail_type=cluster.mail_type if cluster.mail_user else None,
        signal_delay_s=cluster.warning_seconds,
        stderr_to_stdout=True,
        setup=[
            f"cd {shlex.quote(str(folder / 'code'))}",
            f"export PYTHONPATH={shlex.quote(str(folder / 'code'))}",
            f"export LAUNCH_GRACE_SECONDS={cluster.warning_seconds}",
            f"export {JOB_BEGAN}=$(date +%s)",
            *cluster.setup,
            "set +e",  # of setup: with it the shell would leave after srun's failure, without what decides on another attempt
        ],
        teardown=[f"{executor.python} -m launch.after {shlex.quote(str(folder))} $?"],
        srun_args=[
            "--kill-on-bad-exit=1",
            *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
            *cluster.srun,
        ],
        array_parallelism=cluster.parallel if len(configs) > 1 else None,
        additional_parameters={"requeue": True, **cluster.sbatch},
    )
    executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
    return executor


def _start_slurm(configs: list[Config], cluster: Cluster, folder: Path) -> list[str]:
    executor = _executor(configs, cluster, folder)
    tasks = [TrainingTask(folder) for _ in configs]
    try:
        if len(tasks) == 1:
            return [executor.submit(tasks[0]).job_id]
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        return [job.job_id for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())[-300:]}") from None


def _start_local(configs: list[Config], cluster: Cluster, folder: Path) -> list[str]:
    ids = []
    turns = [take_turn(folder, index) for index in range(len(configs))]  # all, before any controller looks
    for index, (config, turn) in enumerate(zip(configs, turns, strict=True)):
        command = [sys.executable, "-m", "launch.local", config.run_dir, folder, index]
        with turn, open(folder / "controller.log", "ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder / "code",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[turn.fileno()],
            )
        ids.append(str(process.pid))
    return ids


@contextmanager
def _new_folder(configs: list[Config]) -> Iterator[Path]:
    """Make the submission's own folder, beside the first run's, and the run directories.

    If this is left by an exception, those that were not there before and hold nothing else are removed again.
    """
    jobs, name = Path(configs[0].run_dir).parent / "jobs", time.strftime("%Y%m%d-%H%M%S")
    run_dirs = [Path(config.run_dir) for config in configs]
    new = [folder for folder in (jobs, *run_dirs) if not folder.exists()]
    folder = None
    try:
        try:
            jobs.mkdir(parents=True, exist_ok=True)
            taken = {file.name for file in jobs.iterdir()}
            names = (f"{name}-{os.getpid()}-{i}" for i in itertools.count(1))
            folder = jobs / next(free for free in names if free not in taken)
            folder.mkdir()
            for run_dir in run_dirs:
                run_dir.mkdir(parents=True, exist_ok=True)
                if not os.access(run_dir, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
        except OSError as error:
            raise UserError(f"cannot make or write {error.filename} ({error.strerror}): set --run_dir") from None
        yield folder
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for empty in new:
            with suppress(OSError):
                empty.rmdir()
        raise
