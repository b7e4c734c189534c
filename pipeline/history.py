"""How a run came to be: on how many ranks each part of it was trained, and which fields were changed on the way."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.parsing import flatten, text_to_read
from pipeline.words import counted


@dataclass(frozen=True)
class Segment:
    """A part of a run that was trained alike.

    Attributes:
        step: optimiser step at which it begins, counted from 0 over the whole run.
        epoch: the epoch of that step, counted from 0.
        ranks, grad_accum_steps: how a global batch was divided.
        changed: fields that were changed on purpose at its beginning, key -> (old, new).
    """

    step: int
    epoch: int
    ranks: int
    grad_accum_steps: int
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def microbatches(self) -> int:
        """Parts of a global batch; a batch-norm statistic sees one."""
        return self.ranks * self.grad_accum_steps

    @property
    def batch_split(self) -> str:
        return batch_split(self.ranks, self.grad_accum_steps)


def batch_split(ranks: int, grad_accum_steps: int) -> str:
    """How a global batch is divided, in words."""
    return f"{counted(ranks, 'rank')} x {counted(grad_accum_steps, 'accumulation step')}"


class History:
    """The segments of a run, a part of its state."""

    def __init__(self, config: Config, ranks: int):
        self.segments = [Segment(0, 0, ranks, config.optim.grad_accum_steps)]

    def state_dict(self) -> dict[str, Any]:
        return {"segments": [asdict(segment) for segment in self.segments]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.segments = [
            Segment(**{**segment, "changed": {key: tuple(pair) for key, pair in segment["changed"].items()}})
            for segment in state["segments"]
        ]

    def begin(self, step: int, epoch: int, config: Config, ranks: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """Begin a segment at this step, if it differs from the one before."""
        last = self.segments[-1]
        if len(self.segments) > 1 and last.step == step and not last.changed:
            self.segments.pop()  # of which nothing was trained
        new = Segment(step, epoch, ranks, config.optim.grad_accum_steps, changed)
        if changed or new.batch_split != self.segments[-1].batch_split:
            self.segments.append(new)

    def microbatches_of_last(self, steps: int, done: int) -> list[int]:
        """Into how many microbatches the last batches of the epochs were divided that were trained, each number once.

        Args:
            steps: of an epoch.
            done: steps of the run.
        """
        ends = [*(segment.step for segment in self.segments[1:]), done]
        pairs = zip(self.segments, ends, strict=True)
        return list(dict.fromkeys(own.microbatches for own, end in pairs if end // steps > own.step // steps))

    def values(self, config: Config, *keys: str) -> list[tuple[Any, ...]]:
        """What fields of these keys were in each segment, from the last, which has those of `config`, to the first."""
        now = flatten(asdict(config))
        found = [tuple(now[key] for key in keys)]
        for segment in self.segments[:0:-1]:
            now |= {key: old for key, (old, _) in segment.changed.items()}
            found.append(tuple(now[key] for key in keys))
        return found

    def changes(self) -> tuple[str, ...]:
        """The fields that were changed on the way, in the words of an audit."""
        return tuple(
            f"{key} from {text_to_read(old)} to {text_to_read(new)} after {counted(segment.step, 'step')}"
            for segment in self.segments
            for key, (old, new) in segment.changed.items()
        )

    def lines(self) -> list[str]:
        """What changed on the way, a line for each change; empty if the whole run was trained alike."""
        lines = []
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            where = f"from epoch {after.epoch + 1} on (after {counted(after.step, 'step')} of the run)"
            if before.batch_split != after.batch_split:
                lines.append(f"{where}, a batch is {after.batch_split}; before, {before.batch_split}")
            for key, (old, new) in after.changed.items():
                lines.append(f"{where}, {key} is {text_to_read(new)}; before, {text_to_read(old)}")
        return lines
