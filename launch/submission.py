"""From configurations to jobs: checks, the code as it is now, and SLURM's or the local twin's start."""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import submitit

from launch.cluster import Cluster
from launch.records import Job, add_event, write_job
from launch.task import TrainingTask
from pipeline.config import Config, to_yaml
from pipeline.errors import UserError

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("pipeline", "launch")


def submit(configs: list[Config], cluster: Cluster) -> list[Job]:
    """Start a job for each configuration; several are one array on SLURM.

    Raises:
        UserError: there is no SLURM, or it refuses the request.
    """
    if cluster.kind == "local" and cluster.nodes > 1:
        raise UserError("--cluster local is one machine: --nodes must be 1")
    folder = _new_folder(configs)
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "runs.json").write_text(json.dumps([config.run_dir for config in configs]))
    for config in configs:
        Path(config.run_dir, "submitted.yaml").write_text(to_yaml(config))
    ids = _start_slurm(configs, cluster, folder) if cluster.kind == "slurm" else _start_local(configs, cluster, folder)
    jobs = [Job(i, cluster.kind, socket.gethostname(), str(folder), cluster.ranks, cluster.failures) for i in ids]
    for config, job in zip(configs, jobs, strict=True):
        write_job(Path(config.run_dir), job)
        add_event(Path(config.run_dir), "submit", job=job.id, cluster=dataclasses.asdict(cluster))
    return jobs


def script(configs: list[Config], cluster: Cluster) -> str:
    """The script that `submit` would give to sbatch."""
    folder = Path(configs[0].run_dir).parent / "jobs" / "TIME"
    executor = _executor(configs, cluster, folder)
    if len(configs) > 1:
        executor.parameters["map_count"] = len(configs)
    # submitit shows a script only after it has submitted it; these are the parts of which it makes one.
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _executor(configs: list[Config], cluster: Cluster, folder: Path) -> submitit.SlurmExecutor:
    try:
        executor = submitit.SlurmExecutor(folder / "%j")
    except RuntimeError:
        raise UserError("there is no SLURM on this machine (no srun): use --cluster local, or torchrun") from None
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
        setup=[f"cd {folder / 'code'}", f"export PYTHONPATH={folder / 'code'}", *cluster.setup],
        teardown=[f"{executor.python} -m launch.after {folder} $?"],
        srun_args=[
            "--kill-on-bad-exit=1",
            *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
            *cluster.srun,
        ],
        additional_parameters={"requeue": True, **cluster.sbatch},
    )
    executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
    return executor


def _start_slurm(configs: list[Config], cluster: Cluster, folder: Path) -> list[str]:
    executor = _executor(configs, cluster, folder)
    tasks = [TrainingTask(config.run_dir) for config in configs]
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
    times = cluster.minutes * 60, cluster.warning_seconds
    for config in configs:
        command = [sys.executable, "-m", "launch.local", config.run_dir, folder, cluster.ranks, *times]
        with open(folder / "controller.log", "ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder / "code",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ids.append(str(process.pid))
    return ids


def _new_folder(configs: list[Config]) -> Path:
    """The submission's own folder, beside the first run's."""
    jobs, name = Path(configs[0].run_dir).parent / "jobs", time.strftime("%Y%m%d-%H%M%S")
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        taken = {file.name for file in jobs.iterdir()}
        names = (f"{name}-{os.getpid()}-{i}" for i in itertools.count(1))
        folder = jobs / next(free for free in names if free not in taken)
        folder.mkdir()
        for config in configs:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {error.filename} ({error.strerror}): set --run_dir") from None
    return folder
