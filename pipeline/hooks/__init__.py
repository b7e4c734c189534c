"""The hooks of every run, in the order in which they are called. To add one, write a class and give it a line here.

A checkpoint is saved after all of them (saving.py), so that it holds what they leave.
"""

from collections.abc import Callable

from pipeline.hooks.hook import EpochResult, Hook, StepResult
from pipeline.hooks.pictures import Pictures
from pipeline.hooks.records import Records
from pipeline.hooks.saving import Saving
from pipeline.run import Run

HOOKS: dict[str, Callable[[Run], Hook]] = {
    "records": Records,
    "pictures": Pictures,
}


def create_hooks(run: Run) -> list[Hook]:
    return [create(run) for create in HOOKS.values()]


__all__ = ["HOOKS", "EpochResult", "Hook", "Saving", "StepResult", "create_hooks"]
