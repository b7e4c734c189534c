"""What a job asks of its cluster: a dataclass, filled from a file that a site writes once, and from flags."""

import dataclasses
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipeline.errors import UserError, did_you_mean

Positive = Annotated[int, Field(gt=0)]
TimeLimit = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Cluster:
    kind: Literal["slurm", "local"] = "slurm"
    """slurm, or local: processes on this machine."""
    nodes: Positive = 1
    """Machines."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each machine, with a rank for each."""
    tasks_per_node: Positive | None = None
    """Ranks of each machine, where they are not one a GPU."""
    cpus_per_task: Positive | None = None
    """CPU cores of each rank, DALI's threads included."""
    memory_gb: Positive | None = None
    """Memory of each machine in GB."""
    time: TimeLimit = "24:00:00"
    """Time limit of one start of the job, [DAYS-]HOURS:MINUTES:SECONDS; a run may take many."""
    warning_seconds: Positive = 120
    """Seconds before the time limit at which the ranks save and leave: more than a step and a save take."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Features that the machines must have."""
    mail_user: str | None = None
    """Address to which SLURM writes."""
    mail_type: str = "END,FAIL"
    """Events of which SLURM writes."""
    setup: tuple[str, ...] = ()
    """Shell lines that the job's script begins with: modules, containers, environment."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Further options of sbatch by their long names."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun."""
    failures: Positive = 3
    """Failures in a row, without a new checkpoint between them, after which a run is not started again."""

    @model_validator(mode="after")
    def _warning_leaves_time(self) -> "Cluster":
        if self.warning_seconds >= self.minutes * 60:
            raise ValueError(f"warning_seconds {self.warning_seconds} must be less than the time limit {self.time}")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


_FIELDS = {field.name: Cluster.__pydantic_fields__[field.name] for field in dataclasses.fields(Cluster)}
_ADAPTER = TypeAdapter(Cluster)


def add_flags(parser: ArgumentParser) -> None:
    """Add ``--cluster`` and a flag for each field; those given are attributes of the parsed namespace."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster", metavar="FILE|local|slurm", default="slurm", help="a YAML file of these fields, or a kind"
    )
    for name, field in _FIELDS.items():
        if name == "kind":
            continue
        many = name in ("setup", "sbatch", "srun")
        default = "none" if many or field.default is None else field.default
        text = f"{field.description} [{default}]"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            action="append" if many else "store",
            metavar="NAME=VALUE" if name == "sbatch" else name.upper(),
            default=SUPPRESS,
            help=text.replace("%", "%%"),
        )


def read_cluster(options: Any) -> Cluster:
    """Build the cluster from ``--cluster`` and the flags of `add_flags`, which win.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not of its type.
    """
    origin = options.cluster
    tree = {"kind": origin} if origin in ("slurm", "local") else _read_yaml(Path(origin))
    flags = {name: value for name, value in vars(options).items() if name in _FIELDS}
    if "sbatch" in flags:
        flags["sbatch"] = tree.get("sbatch", {}) | dict(_name_and_value(word) for word in flags["sbatch"])
    try:
        return _ADAPTER.validate_python(tree | flags)
    except ValidationError as failure:
        error = failure.errors()[0]
        if error["type"] == "value_error":  # of a check above, which names the fields
            raise UserError(f"{origin}: {error['ctx']['error']}") from None
        key = str(error["loc"][0])
        where = f"--{key.replace('_', '-')}" if key in flags else f"{origin}: '{key}'"
        if error["type"] == "unexpected_keyword_argument":
            raise UserError(f"{where} is not a known key{did_you_mean(key, _FIELDS)}") from None
        raise UserError(f"{where}: {error['msg']} (got {error['input']!r})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read the cluster file {path} ({error.strerror}): --cluster takes a file, local or slurm"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"{path} must be a mapping of fields such as partition")
    tree = tree or {}
    if isinstance(tree.get("time"), int):  # YAML takes 24:00:00 for a number of base 60
        tree["time"] = f"{tree['time'] // 3600}:{tree['time'] // 60 % 60:02}:{tree['time'] % 60:02}"
    return tree


def _name_and_value(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not sign:
        raise UserError(f"--sbatch {word}: NAME=VALUE is needed, as in --sbatch reservation=night")
    return name.lstrip("-"), value
