"""The package as a library: ``from pipeline import create_model, load_config, fit, evaluate``.

>>> config = load_config("configs/demo.yaml", {"optim.epochs": 1})
>>> fit(config)
>>> evaluate("runs/demo/checkpoints/best.pt", "data/fashion-mnist/val").score.top1_error
"""

import dataclasses
import warnings
from pathlib import Path

from pipeline.autotune import for_evaluation
from pipeline.config_file import load_config
from pipeline.data.dataset import to_evaluate
from pipeline.data.image_files import pixel_format
from pipeline.data.index_cache import known_cache
from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.data.scan import scan_classes, scan_label_table
from pipeline.data.sources import open_source
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import Evaluation, check_image_size
from pipeline.evaluation import evaluate as evaluate_network
from pipeline.models import create_model
from pipeline.precision import set_tf32
from pipeline.preprocessing import assumption, mirrored_views
from pipeline.trainer import fit
from pipeline.weights import read_weights

__all__ = ["create_model", "evaluate", "fit", "load_config"]


def evaluate(
    weights: str | Path,
    folder: str | Path,
    crops: int = 1,
    batch_size: int = 64,
    device: str = "auto",
    labels: str | Path | None = None,
    ema: bool | None = None,
) -> Evaluation:
    """Evaluate weights on a folder or archive of images by class, prepared as the weights' own configuration says.

    Args:
        weights: a run's directory (its best checkpoint), a checkpoint, or a file of torchvision, timm or openmmlab; see
            `weights.read_weights`.
        folder: its classes are the network's, or a part of them. Of a table that says which split each line is for, the
            validation split is taken, also of `labels`.
        crops: 1, or 10: five of the image and five of its mirror image, of which a warning tells where the run had
            ``data.hflip`` false.
        batch_size: images at once.
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU.
        labels: CSV file with the labels of the images in the folder, for a network that gives several labels an image.
        ema: take the moving average of the weights, or the raw ones, where there are both; None: of a checkpoint those that its
            run's best epoch is chosen by.

    Raises:
        UserError: the weights or images cannot be read, or do not go together.
    """
    folder = Path(folder).expanduser()
    found = read_weights(weights, ema=ema)
    data = dataclasses.replace(found.data, loader="auto", threads=0)  # the run's machine may have been another
    if text := assumption(str(weights), found.config, found.assumed):
        warnings.warn(text, stacklevel=2)
    if text := mirrored_views(str(weights), found.config, crops, "crops=1"):
        warnings.warn(text, stacklevel=2)
    if (data.labels == "multi") != (labels is not None):
        raise UserError(
            f"{weights} gives {data.labels} labels an image: labels is the CSV file of several, and of no other"
        )
    if labels is not None:
        file = Path(labels).expanduser()
        table = LabelTableSource(str(file), open_source(folder), found.classes, "val")
        index = scan_label_table(table, known_cache(file), pixel_format=pixel_format(data))
    else:
        source = to_evaluate(folder, data)
        index = scan_classes(source, known_cache(folder), pixel_format=pixel_format(data)).with_classes(found.classes)
    with init_distributed(device) as world:
        shard = Shard(world.rank, world.size, world.device, world.cores)
        loader = EvaluationLoader(index, data, shard, batch_size=batch_size, crops=crops)
        set_tf32("fp32")
        network, order = for_evaluation(found.network, found.tuning, "fp32", world.device)
        check_image_size(network, data.crop_size, str(weights), data.channels)
        return evaluate_network(network, loader, world, memory_format=order)
