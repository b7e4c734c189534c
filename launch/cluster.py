"""What a job asks of its cluster: a dataclass, filled from a file that a site writes once, and from flags."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.parsing import STRICT, NonNegative, Positive, Schema


def _time_limit(value: Any) -> str:
    text = str(value)  # of a number too, which SLURM would take for minutes: it is refused
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    numbers = [*parts, days or "0"]
    if len(parts) != 3 or not all(part.isdecimal() for part in numbers) or any(len(part) != 2 for part in parts[1:]):
        raise ValueError(f"a time limit is [DAYS-]HOURS:MINUTES:SECONDS, as in 24:00:00 (got '{text}')")
    return text


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]


@dataclass(frozen=True, config=STRICT)
class Cluster:
    kind: Literal["slurm", "local"] = "slurm"
    """slurm, or local: processes on this machine."""
    nodes: Positive = 1
    """Nodes (machines)."""
    gpus_per_node: NonNegative = 0
    """GPUs of each node, with a rank for each."""
    tasks_per_node: Positive | None = None
    """Ranks of each node, where they are not one a GPU."""
    cpus_per_task: Positive | None = None
    """CPU cores of each rank, DALI's threads included."""
    memory_gb: Positive | None = None
    """Memory of each node in GB."""
    time: TimeLimit = "24:00:00"
    """Time limit of one attempt of the job, [DAYS-]HOURS:MINUTES:SECONDS; a run may take many."""
    warning_seconds: Positive = 120
    """Seconds before the time limit at which the ranks save and leave: more than a step and a save take."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    mail_user: str | None = None
    """Address to which SLURM writes."""
    mail_type: str = "END,FAIL"
    """Events of which SLURM writes."""
    setup: tuple[str, ...] = ()
    """Shell lines that the job's script begins with: modules, containers, environment."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Further options of sbatch by their long names."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun, as in --srun=--mpi=none."""
    parallel: Positive | None = None
    """Runs submitted together that train at once; none: on SLURM all that it starts, on this machine one after another."""
    failures: Positive = 3
    """Failures in a row, without a new checkpoint between them, after which a run is not started again."""

    @model_validator(mode="after")
    def _warning_leaves_time(self) -> "Cluster":
        if self.warning_seconds >= self.seconds:
            raise ValueError(f"warning_seconds {self.warning_seconds} must be less than the time limit {self.time}")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def seconds(self) -> int:
        """The time limit."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        return -(-self.seconds // 60)


SCHEMA = Schema(Cluster, flag=lambda key: f"--{key.replace('_', '-')}", example="launch/site.example.yaml")


# What processes of this machine follow, too. Of several nodes the submission tells.
LOCAL = (
    "kind", "nodes", "gpus_per_node", "tasks_per_node", "time", "warning_seconds", "parallel", "failures",
)  # fmt: skip
_WITHOUT_A_FLAG = ("kind",)  # --cluster says it


def cluster_flags() -> list[str]:
    """The flags of the fields."""
    return [flag for key, flag in zip(SCHEMA.fields, SCHEMA.flags, strict=True) if key not in _WITHOUT_A_FLAG]


def add_flags(parser: ArgumentParser) -> None:
    """Add ``--cluster`` and a flag for each field but the kind; those given are attributes of the parsed namespace."""
    parser.add_argument(
        "--cluster",
        metavar="FILE|local|slurm",
        default="slurm",
        help="a YAML file of the cluster's fields, such as launch/site.example.yaml, or a kind [%(default)s]",
    )
    SCHEMA.add_flags(parser, title="cluster", leave_out=_WITHOUT_A_FLAG)


def read_cluster(options: Namespace) -> Cluster:
    """Build the cluster from ``--cluster`` and the flags of `add_flags`, which win.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not of its type.
    """
    origin = options.cluster
    if origin in ("slurm", "local"):
        tree = {"kind": origin}
    elif Path(origin).exists():
        tree = SCHEMA.read(Path(origin))
    else:
        raise UserError(f"there is no cluster file {origin}: --cluster takes a file, local or slurm")
    given = SCHEMA.given(options)
    cluster = SCHEMA.build(tree, origin, given)
    if "mail_type" in given and cluster.mail_user is None:
        raise UserError("--mail-type does nothing without --mail-user: add that, or leave both out")
    if cluster.kind == "local":
        for key, flag in zip(SCHEMA.fields, SCHEMA.flags, strict=True):
            if key not in LOCAL and (key in given or key in tree):
                where = flag if key in given else f"{origin}: '{key}'"
                raise UserError(f"{where} is for SLURM, and does nothing for processes of this machine: leave it out")
    return cluster
