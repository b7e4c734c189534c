"""A network that is evaluated, and the images that it is evaluated on."""

from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.weights import Weights


@dataclass(frozen=True)
class Candidate:
    """A file of weights, ready to be evaluated.

    Attributes:
        seen: which of the images it has been trained on, in words; empty if none is known to be.
        chosen_by: which of them the run's best epoch was chosen by, in words, where it is not just all of them; else empty.
        sha256: of the file as it was read, in hexadecimal digits: a run that goes on replaces it.
    """

    file: str
    name: str
    weights: Weights
    data: DataConfig
    index: DatasetIndex
    multiply_accumulates: int
    seen: str = ""
    chosen_by: str = ""
    sha256: str = ""
