"""A network that is evaluated, and the images that it is evaluated on."""

from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.weights import Weights


@dataclass(frozen=True)
class Candidate:
    """A file of weights, ready to be evaluated."""

    file: str
    name: str
    weights: Weights
    data: DataConfig
    index: DatasetIndex
    multiply_accumulates: int
