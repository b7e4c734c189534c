"""Whether a job will know the names, and find the files, that its configuration gives, before it has waited for its turn."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import UserError, look_up
from pipeline.parsing import flatten
from pipeline.run_dir import has_checkpoint
from pipeline.unused import LOADERS_OF_FILES, WITHOUT_NESTEROV

# Names that need no look into the registries: to load those, and torch with them, takes seconds.
USUAL = {
    "model.name": (
        "densenet121", "densenet161", "densenet169", "densenet201", "densenet264",
        "densenet40_k12", "densenet100_k12", "densenet100_k24", "densenet_bc40_k12", "densenet_bc100_k12",
        "densenet_bc190_k40", "densenet_bc250_k24",
        "msdnet_cifar_7", "msdnet_cifar_10", "msdnet_cifar_budget_5", "msdnet_cifar_budget_7",
        "msdnet_imagenet_4", "msdnet_imagenet_6", "msdnet_imagenet_7",
    ),
    "model.dense_block": ("auto", "eager"),
    "optim.optimizer": ("sgd", *WITHOUT_NESTEROV),
    "optim.objective": ("cross_entropy", "binary_cross_entropy"),
    "data.loader": (*LOADERS_OF_FILES, "synthetic"),
}  # fmt: skip


def refuse_unknown_names(configs: Sequence[Config]) -> None:
    """Refuse a network, an optimiser, a loss or a loader that there is not, as the job would.

    Raises:
        UserError: names the field, and what there is.
    """
    for config in configs:
        fields = flatten(dataclasses.asdict(config))
        if any(fields[key] not in names for key, names in USUAL.items()):
            refuse_what_registries_lack(config)


def refuse_missing_files(configs: Sequence[Config]) -> None:
    """Refuse weights to begin with, of a new run, or weights of classes whose file is not there.

    Raises:
        UserError: names the field and the file.
    """
    for config in configs:
        weights, of_classes = config.model.weights, config.optim.class_weights
        begins = weights and not weights.startswith("timm:") and not has_checkpoint(Path(config.run_dir))
        for key, file in (("model.weights", weights if begins else None), ("optim.class_weights", of_classes)):
            if file and file != "balanced" and not os.path.exists(file):
                raise UserError(f"{key}: there is no file {file}: correct its path")


def refuse_what_registries_lack(config: Config) -> None:
    """As `refuse_unknown_names`, whatever the names are."""
    import torch  # takes seconds, as all that follows

    from pipeline.data.loader import IMAGE_PIPELINES
    from pipeline.models.zoo import create_network, refuse_what_is_ignored
    from pipeline.objective import OBJECTIVES
    from pipeline.optim import OPTIMIZERS

    look_up(OPTIMIZERS, config.optim.optimizer, "optim.optimizer")
    look_up(OBJECTIVES, config.optim.objective, "optim.objective")
    look_up({"auto": None, **IMAGE_PIPELINES}, config.data.loader, "data.loader")
    refuse_what_is_ignored(config.model)
    with torch.device("meta"):
        create_network(config.model, 10, config.data.channels)
