"""How an epoch is cut into batches, and a batch into microbatches, of which each batch-norm statistic sees one."""

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.data.plan import split, steps_per_epoch, together
from pipeline.errors import UserError
from pipeline.words import counted, sizes_text

SEES = "what a batch norm sees"  # of the images of a batch


def microbatches_of(config: Config, ranks: int, split_text: str) -> int:
    """Into how many microbatches a global batch is cut: ranks times gradient accumulation steps.

    Args:
        split_text: that in words.

    Raises:
        UserError: they cannot be equal, or would divide a pair of images that are mixed.
    """
    microbatches = ranks * config.optim.grad_accum_steps
    unit = microbatches * together(config.data)
    if config.optim.batch_size % unit:
        pairs = " into pairs of images that are mixed" if config.data.mixes else ""
        raise UserError(
            f"optim.batch_size {config.optim.batch_size} cannot be split evenly over {split_text}{pairs}: choose a multiple of "
            f"{unit}"
        )
    return microbatches


def statistic_images(images: int, microbatches: int, together: int) -> tuple[int, int]:
    """The smallest and the largest number of images in a batch-norm statistic of a batch.

    Args:
        images: of the batch.
        together: so many images stay in one microbatch.
    """
    # A part without images gets a replacement.
    sizes = [len(part) or 1 for part in split(0, images, microbatches, together)]
    return min(sizes), max(sizes)


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch.

    Attributes:
        images: of the training set.
        size: images of a batch; the last one may have fewer.
        microbatches: ranks times gradient accumulation steps.
        together: so many images stay in one microbatch.
    """

    images: int
    size: int
    microbatches: int
    together: int = 1

    @property
    def steps(self) -> int:
        return steps_per_epoch(self.images, self.size)

    @property
    def last(self) -> int:
        """Images of the last batch."""
        return self.images - (self.steps - 1) * self.size

    @property
    def statistic_of_last(self) -> tuple[int, int]:
        """The smallest and the largest number of images in a batch-norm statistic of the last batch."""
        return statistic_images(self.last, self.microbatches, self.together)

    def text(self, divided: str) -> str:
        """Batches and steps in a few words.

        Args:
            divided: over what a batch is divided, as ``2 ranks x 1 accumulation step``.
        """
        of_batch, last = f" at once ({SEES})", ""
        sizes = sizes_text(self.statistic_of_last)
        if self.images < self.size:
            of_batch, last = "", f", of all {counted(self.images, 'image')} ({sizes} at once: {SEES})"
        elif self.last < self.size:
            last = f", the last one of {counted(self.last, 'image')} ({sizes} at once)"
        return (
            f"batch {self.size} = {divided} x {counted(self.size // self.microbatches, 'image')}{of_batch}; "
            f"{counted(self.steps, 'step')} an epoch{last}"
        )
