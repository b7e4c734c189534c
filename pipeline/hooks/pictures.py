"""Pictures in TensorBoard, every few epochs: images with their classes, answers to validation images, and feature reuse."""

import dataclasses
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.class_names import short_names
from pipeline.data.loader import Batch, EvaluationLoader, Shard
from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.hooks.hook import EpochResult, Hook, Training
from pipeline.models.densenet import DenseNet
from pipeline.models.early_exits import last_exit
from pipeline.pictures import BLACK, BLUE, GRAY, RED, Line, draw_grid, percent_text
from pipeline.run import Run
from pipeline.words import counted

SAMPLES, COLUMNS = 10, 5  # images in a picture: as many as are legible on one of TensorBoard's cards


class Pictures(Hook):
    """Rank 0 draws: after the first epoch, every `train.pictures_every` epochs and after the last one."""

    changes_network = False

    def __init__(self, run: Run):
        self._samples: Batch | None = None  # validation images, the same ones in each picture

    def on_batch(self, trainer: Training, batch: Batch) -> None:
        """The first images of an epoch, as the network sees them."""
        run = trainer.run
        if run.progress.step == 0 and trainer.microbatch == 0 and pictures_due(run, run.progress.epoch):
            picture = draw_grid(_shown(run, batch.images[:SAMPLES]), _classes(run, batch), COLUMNS)
            trainer.monitor.image("images/training_batch", picture, run.done_steps + 1)

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        run = trainer.run
        if not pictures_due(run, result.epoch):
            return
        self._samples = self._samples or _validation_samples(run)
        captions = _answers(run, self._samples)
        picture = draw_grid(_shown(run, self._samples.images), captions, COLUMNS)
        trainer.monitor.image("images/validation_answers", picture, run.done_steps)
        if isinstance(network := _judged(run), DenseNet):
            of = f" ({next(iter(run.validated))} weights)" if run.ema else ""
            title = f"{run.config.model.name}{of} after {counted(result.epoch + 1, 'epoch')}"
            trainer.monitor.figure("images/feature_reuse", draw_reuse(feature_reuse(network), title), run.done_steps)


def pictures_due(run: Run, epoch: int) -> bool:
    """Whether this rank draws at the end of an epoch, counted from 0."""
    every, done = run.config.train.pictures_every, epoch + 1
    return bool(run.world.is_main and every and (done == 1 or done % every == 0 or done == run.config.optim.epochs))


def _validation_samples(run: Run) -> Batch:
    """Images spread over the validation set, and so over its classes where it is sorted by them."""
    index = run.val_loader.index
    rows = np.unique(np.linspace(0, len(index) - 1, SAMPLES).astype(np.int64))
    # Few images need no fast loader, and no memory of the GPU for a second one.
    loader = "reference" if run.conditions.loader in ("dali", "native") else run.conditions.loader
    data = dataclasses.replace(run.config.data, loader=loader)
    alone = Shard(0, 1, run.world.device, threads=1)
    return next(EvaluationLoader(index.take(rows), data, alone, batch_size=len(rows), crops=1).batches())


def _classes(run: Run, batch: Batch) -> list[list[Line]]:
    """For each image its class; where images are mixed also the other's, with its share."""
    captions: list[list[Line]] = [[(_true(run, label), BLACK)] for label in batch.labels[:SAMPLES].cpu()]
    if batch.partners is not None:
        shares = batch.partners.shares[:SAMPLES].tolist()
        for caption, label, share in zip(captions, batch.partners.labels[:SAMPLES].cpu(), shares, strict=True):
            caption.append((f"{100 * share:.0f} % {_true(run, label)}" if share else "", GRAY))
    return captions


@torch.inference_mode()
def _answers(run: Run, batch: Batch) -> list[list[Line]]:
    """For each image what the network says, in blue if it is right, else in red with what is true."""
    network = _judged(run)
    was_training = network.training
    network.eval()
    with run.autocast():
        logits = last_exit(run.objective.logits(network(batch.images))).float().cpu()
    network.train(was_training)
    several, captions = run.val_loader.index.several_labels, []
    for row, label in zip(logits, batch.labels.cpu(), strict=True):
        answer = (row > 0).to(label.dtype) if several else row.argmax()
        probabilities = row.sigmoid() if several else row.softmax(dim=0)
        finite = math.isfinite(probabilities.max())
        said = _said(run, answer, probabilities) if finite else "no finite answer"
        right = bool(torch.equal(answer, label)) and finite
        captions.append([(said, BLUE), ("right", GRAY)] if right else [(said, RED), (f"true {_true(run, label)}", RED)])
    return captions


def _judged(run: Run) -> nn.Module:
    """The network with the weights that the best epoch is chosen by."""
    return next(iter(run.validated.values()))


def _said(run: Run, answer: Tensor, probabilities: Tensor) -> str:
    """Each class of an answer with its probability; of an answer without classes the one that came nearest."""
    sure = [f"{name} {percent_text(float(p))}" for name, p in zip(_names(run), probabilities, strict=True)]
    return ", ".join(sure[k] for k in _numbers(answer)) or f"none ({sure[int(probabilities.argmax())]})"


def _true(run: Run, label: Tensor) -> str:
    """The class of a label; of a row of several all that it has."""
    return ", ".join(_names(run)[k] for k in _numbers(label)) or "none"


def _numbers(label: Tensor) -> list[int]:
    return label.nonzero().flatten().tolist() if label.dim() else [int(label)]


def _names(run: Run) -> list[str]:
    return _called(tuple(run.conditions.classes))


@cache
def _called(classes: tuple[str, ...]) -> list[str]:
    return short_names(classes)


def _shown(run: Run, images: Tensor) -> Tensor:
    """Normalised images as they were, in [0, 1]: (n, 3, H, W), of gray ones three equal colours."""
    data = run.config.data
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (data.mean, data.std))
    return (images.float() * std + mean).expand(-1, 3, -1, -1)
