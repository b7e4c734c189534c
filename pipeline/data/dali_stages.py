"""The DALI pipeline of dali.py cut short after one of its stages, for measuring what each stage costs on CPU, and how exact
a GPU decodes."""

from collections.abc import Iterable, Iterator

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListGPU

from pipeline.config import DataConfig, Interpolation
from pipeline.data.dali import DaliPlans
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan

CPU = torch.device("cpu")

# How many of the image pipeline's arrays a pipeline takes that ends so. "full decode" is no stage but a bound: every image
# decoded whole and nothing else.
ARRAYS = {"read": 1, "full decode": 1, "decode": 3, "resize": 6}


class CutPipeline(DaliPlans):
    """Runs plans of one view up to and including the stage `last`; the results stay DALI's, of any size."""

    def __init__(
        self,
        last: str,
        index: DatasetIndex,
        resize: Interpolation,
        threads: int,
        batch_size: int,
        device: torch.device = CPU,
    ):
        super().__init__(index, DataConfig(interpolation=resize), threads, device, batch_size, views=1)
        self._last = last

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, list]]:
        """Yield each plan with its images, n arrays that stay valid until the next."""
        for plan, output in self._outputs(plans):
            images = output.as_cpu() if isinstance(output, TensorListGPU) else output
            yield plan, [images[i] for i in range(len(plan))]

    def _define(self) -> Pipeline:
        @pipeline_def(**self._options)
        def define():
            content, *arrays = fn.external_source(source=self._next_arrays, num_outputs=ARRAYS[self._last], batch=True)
            if self._last == "read":
                return fn.copy(content)
            if self._last == "full decode":
                return fn.decoders.image(content, device=self._decoder, **self._decoding)
            images = self._decoded(content, *arrays[:2])
            return images if self._last == "decode" else self._resized(images, *arrays[2:])

        return define()

    def _next_arrays(self) -> tuple:
        return super()._next_arrays()[: ARRAYS[self._last]]
