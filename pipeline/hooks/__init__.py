"""The hooks of every run, in the order in which they are called. To add one, write a class and give it a line here."""

from collections.abc import Callable

from pipeline.hooks.feature_reuse import FeatureReusePictures
from pipeline.hooks.hook import EpochResult, Hook, StepResult
from pipeline.hooks.records import Records
from pipeline.hooks.saving import Saving
from pipeline.run import Run

# Records come before the checkpoint that vouches for them.
HOOKS: dict[str, Callable[[Run], Hook]] = {
    "records": Records,
    "feature_reuse": FeatureReusePictures,
    "saving": Saving,
}


def create_hooks(run: Run) -> list[Hook]:
    return [create(run) for create in HOOKS.values()]


__all__ = ["HOOKS", "EpochResult", "Hook", "StepResult", "create_hooks"]
