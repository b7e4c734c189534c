"""What a submission would resume: checked before a job waits in a queue."""

from pathlib import Path

from launch.cluster import Cluster
from pipeline.config import Config
from pipeline.data.dataset import fingerprint_of
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import steps_per_epoch


def epochs_done(config: Config, cluster: Cluster, train: DatasetIndex, val: DatasetIndex) -> float:
    """How many epochs the run has that the job would resume, of which the last may be a part; 0 for a new run.

    Raises:
        UserError: the run may not resume so; what `resume.check_same_run` says. What `auto` finds for the loader, and class
            weights, are not looked at.
    """
    if not Path(config.run_dir, "checkpoints").is_dir():
        return 0.0
    from pipeline.resume import Conditions, check_same_run, loader_of  # takes seconds to import, as torch does
    from pipeline.start import find_start

    start = find_start(config)
    if start.checkpoint is None:
        return 0.0
    state = start.checkpoint.state
    now = Conditions(
        classes=list(train.classes),
        fingerprint=fingerprint_of(train, val),
        images=[len(train), len(val)],
        loader=config.data.loader if config.data.loader != "auto" else loader_of(start.checkpoint) or "",
        ranks=cluster.ranks,
        class_weights=state.get("conditions", {}).get("class_weights"),
    )
    check_same_run(state, start.config, now)
    steps = steps_per_epoch(len(train), config.optim.batch_size)
    return state["progress"]["epoch"] + state["progress"]["step"] / steps
