"""G2: images that are generated on the GPU, and the same network's answers there and on the CPU."""

from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import World
from tools.support.gpu_checks.check import Finding, Setting, require
from tools.support.gpu_checks.networks import FLOAT32, worst


def colours(setting: Setting) -> Finding:
    """Training batches with all augmentation are the CPU's, and an image has the same pixels in each batch."""
    from pipeline.config import DataConfig

    far = 0.0
    for side in (17, 224) if setting.on_gpu else (17,):  # kernels are chosen by how many pixels there are, too
        config = DataConfig(loader="synthetic", crop_size=side, resize_size=side)
        own, cpus = (generated(22, config, device, 8) for device in (setting.device, torch.device("cpu")))
        far = max(far, *((image - cpus[row][0]).abs().max().item() for row, (image, _) in own.items()))
        require(far < 1e-4, f"pixels differ from the CPU's by {far:.1e}")
        require(all(label == cpus[row][1] for row, (_, label) in own.items()), "labels differ from the CPU's")
        require_same_in_other_batches(own, 22, config, setting.device)
    return Finding(f"22 images, at most {far:.1e} from the CPU's, the same in other batches")


def generated(images: int, config: Any, device: torch.device, batch_size: int) -> dict[int, tuple[Tensor, int]]:
    """An epoch's generated images as they are trained on, and their labels, by their row in the index."""
    from pipeline.data.loader import Shard, TrainingLoader
    from pipeline.data.synthetic import synthetic_index

    index, shard = synthetic_index(images, 3, config.crop_size, "train"), Shard(0, 1, device, 1)
    loader = TrainingLoader(index, config, shard, seed=1, batch_size=batch_size, accumulation=1)
    return {
        int(row): (image.cpu(), int(label))
        for batch in loader.batches(0)
        for row, image, label in zip(batch.ids, batch.images.clone(), batch.labels, strict=True)
    }


def require_same_in_other_batches(
    found: dict[int, tuple[Tensor, int]], images: int, config: Any, device: torch.device
) -> None:
    for batch_size in (5, images):
        other = generated(images, config, device, batch_size)
        differing = sum(not torch.equal(image, other[row][0]) for row, (image, _) in found.items())
        require(not differing, f"{differing} of {images} images are others in batches of {batch_size}")


def augmentation(setting: Setting) -> Finding:
    """Batches with all operations of RandAugment and TrivialAugment, cutout, and erasing with noise are nearly the CPU's."""
    from pipeline.config import DataConfig
    from pipeline.data.policies import SPACES

    far = 0.0
    for space in SPACES:
        config = DataConfig(
            loader="synthetic",
            crop_size=32,
            resize_size=32,
            auto_augment=space,  # type: ignore[arg-type]
            color_jitter=0,
            pca_noise=0,
            cutout=8,
            random_erasing=0.5,
            erasing_fill="noise",
        )
        own, cpus = (generated(64, config, device, 64) for device in (setting.device, torch.device("cpu")))
        apart = [(image - cpus[row][0]).abs().mean() for row, (image, _) in own.items()]
        far = max(far, torch.stack(apart).mean().item())
        require(far < 2e-3, f"{space}: pixels differ from the CPU's by {far:.1e} in the mean")
        require_same_in_other_batches(own, 64, config, setting.device)
    return Finding(f"{len(SPACES)} spaces, at most {far:.1e} from the CPU's in the mean, the same in other batches")


def evaluation(setting: Setting) -> Finding:
    """Single and ten crops with a smaller last batch give the CPU's answers and totals."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import EvaluationLoader, Shard
    from pipeline.data.synthetic import synthetic_index
    from pipeline.evaluation import evaluate
    from pipeline.models import create_model

    far = 0.0
    for crops in (1, 10):
        found = []
        for device in (torch.device("cpu"), setting.device):
            torch.manual_seed(1)
            network = create_model("densenet_bc10_k3", 7).to(device)
            config = DataConfig(loader="synthetic", crop_size=16, resize_size=16)
            index, shard = synthetic_index(11, 7, 16, "val"), Shard(0, 1, device, 1)
            loader = EvaluationLoader(index, config, shard, batch_size=4, crops=crops)
            found.append(evaluate(network, loader, World(0, 0, 1, 1, device), keep_logits=True))
        logits = [torch.from_numpy(answers.logits) for answers in found if answers.logits is not None]
        far = max(far, worst(logits[1:], logits[:1]))
        require(far < FLOAT32, f"{crops} crops: logits differ from the CPU's by {far:.1e}")
        require(len(found[0].top5) == len(found[1].top5) == 11, "images are missing")
        require(found[0].score.images == found[1].score.images == 11, "the totals count other images")
    return Finding(f"1 and 10 crops of 11 images, logits at most {far:.1e} from the CPU's")
