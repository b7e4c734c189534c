"""What a step minimises where a network has several exits: the sum over them of what it would minimise for one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.models.early_exits import exits_of, stack_exits
from pipeline.objective import Objective


class JointObjective:
    """The sum over all exits, with equal weights (the MSDNet paper, Section 4). Any objective for one output will do."""

    def __init__(self, of_one: Objective):
        self._of_one = of_one

    def prepare(self, batch: Batch) -> Batch:
        return self._of_one.prepare(batch)

    def losses(self, outputs: Sequence[Tensor], batch: Batch) -> Tensor:
        return torch.stack([self._of_one.losses(output, batch) for output in outputs]).sum(dim=0)

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Those of all exits, (n, exits, classes)."""
        return stack_exits([self._of_one.logits(output) for output in outputs])


def for_all_exits(objective: Objective, network: nn.Module) -> Objective:
    """The objective of all exits of a network; the given one if it has one output."""
    return JointObjective(objective) if exits_of(network) > 1 else objective
