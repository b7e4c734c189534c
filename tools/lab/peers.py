"""What others load images with: torchvision's DataLoader and DALI's usual pipeline, for tools/lab/loader.py to time."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from pipeline.config import DataConfig
from pipeline.data.decoding import decode
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.data.reader import Reader


class PhotoSet(Dataset):
    """The images of an index as a data set for torchvision's loader."""

    def __init__(self, index: DatasetIndex, transform: Callable[[Image.Image], Tensor]):
        self._index, self._transform = index, transform
        self._reader: Reader | None = None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self._reader = self._reader or Reader(self._index)  # each worker opens its own
        return self._transform(decode(self._reader.read(i), self._index.location(i))), int(self._index.labels[i])


def torchvision_training(
    index: DatasetIndex, config: DataConfig, workers: int, batch_size: int, jitter: bool
) -> DataLoader:
    """The usual training transform."""
    crop = transforms.RandomResizedCrop(
        config.crop_size, config.scale, config.ratio, functional.InterpolationMode.BICUBIC
    )
    colors = [transforms.ColorJitter(*[config.color_jitter] * 3)] if jitter else []
    steps = [crop, transforms.RandomHorizontalFlip(), *colors, *_normalised(config)]
    photos = PhotoSet(index, transforms.Compose(steps))
    return DataLoader(photos, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


def torchvision_evaluation(index: DatasetIndex, config: DataConfig, workers: int, batch_size: int) -> DataLoader:
    """The usual evaluation transform, of one crop."""
    resize = transforms.Resize(config.resize_size, functional.InterpolationMode.BICUBIC)
    photos = PhotoSet(
        index, transforms.Compose([resize, transforms.CenterCrop(config.crop_size), *_normalised(config)])
    )
    return DataLoader(photos, batch_size, num_workers=workers, persistent_workers=True)


def _normalised(config: DataConfig) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(config.mean, config.std)]


class UsualDali:
    """DALI's pipeline as its examples have it, on CPU, without colours: for training, or with `evaluation` for one crop."""

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        threads: int,
        batch_size: int,
        antialias: bool = False,
        evaluation: bool = False,
    ):
        self._reader = Reader(index)
        self._contents: Iterator[list[np.ndarray]] = iter(())
        normalise: dict[str, Any] = {
            "mean": [255 * value for value in config.mean],
            "std": [255 * value for value in config.std],
            "output_layout": "HWC",
            "dtype": types.DALIDataType.FLOAT,
        }
        size = [config.crop_size] * 2
        crop: dict[str, Any] = {"random_area": list(config.scale), "random_aspect_ratio": list(config.ratio)}
        linear: dict[str, Any] = {"interp_type": types.DALIInterpType.INTERP_LINEAR, "antialias": antialias}
        # As in dali.py: DALI's types are those of all its modes at once.
        options: dict[str, Any] = {"device_id": None, "prefetch_queue_depth": 2}

        @pipeline_def(batch_size=batch_size, num_threads=threads, **options)
        def define():
            content = fn.external_source(source=lambda: next(self._contents), batch=True)
            if evaluation:
                images: Any = fn.resize(fn.decoders.image(content), resize_shorter=config.resize_size, **linear)
                return fn.crop_mirror_normalize(images, crop=size, **normalise)
            images = fn.resize(fn.decoders.image_random_crop(content, **crop), size=size, **linear)
            return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), **normalise)

        self._pipeline = define()
        self._pipeline.build()

    def run(self, plans: list[BatchPlan]) -> Iterator[object]:
        """Yield the batches with the images of these plans; whatever else they say, DALI draws by itself."""
        read = self._reader.read_ahead(plans)
        self._contents = ([content.result() for content in contents] for _, contents in read)
        while True:
            try:
                yield self._pipeline.run()
            except StopIteration:
                break
        self._pipeline.reset()
