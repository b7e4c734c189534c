"""Single- and ten-crop evaluation over any number of ranks; every image counts exactly once."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader
from pipeline.distributed import World
from pipeline.errors import UserError, first_line
from pipeline.metrics import AnyScore, LabelScore, Score, top5_counts
from pipeline.models.early_exits import stack_exits
from pipeline.ranking import rank_classes

Average = Literal["logits", "softmax"]


@dataclass(frozen=True)
class Evaluation:
    """The answers for all N images of an index, in its order.

    Attributes:
        score: totals over all images.
        top5: (N, 5) int64, most probable classes first (fewer columns with fewer classes).
        probability: (N) float32, probability of the first: softmax's, or of several labels an image the sigmoid's.
        losses: (N) float32, cross-entropy; of several labels an image the binary one, averaged over the classes.
        logits: (N, classes) float32, averaged over the views of each image, or the logarithm of the averaged
            probabilities; None unless asked for, and on other ranks than 0.
        exits: (N, exits) int64, the most probable class at each exit, -1 where it is not finite; None for a network with one
            output, and for several labels an image. All else is of the last exit, but for the loss in `score`, which is the sum
            over all of them, as in training.
        not_finite: images whose answers are not finite; they count as wrong, with -1 in `top5`.
    """

    score: AnyScore
    top5: np.ndarray
    probability: np.ndarray
    losses: np.ndarray
    logits: np.ndarray | None
    not_finite: int
    exits: np.ndarray | None = None


def check_image_size(network: nn.Module, size: int, name: str, channels: int = 3) -> None:
    """Refuse images of `size` x `size` pixels and so many channels that the network cannot take in evaluation.

    Raises:
        UserError: it cannot; `name` is the network's.
    """
    if reason := why_size_is_refused(copy.deepcopy(network).eval(), 1, size, channels):
        raise UserError(f"{name} cannot take images of {size} x {size} pixels ({reason}): choose another crop size")


@torch.no_grad()
def why_size_is_refused(network: nn.Module, images: int, size: int, channels: int = 3) -> str:
    """Why a network in its present mode cannot take so many images of `size` x `size` pixels; empty if it can.

    It is asked without data: no kernel runs, and no GPU, so that nothing else than the shapes can be the reason. The
    network itself is spoilt; give a copy.
    """
    try:
        network.to("meta")(torch.zeros(images, channels, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        needs_data = isinstance(error, NotImplementedError) or "meta tensor" in str(error)  # which a first batch gives
        return "" if needs_data else first_line(error)
    return ""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    world: World,
    average: Average = "logits",
    between_batches: Callable[[], None] = lambda: None,
    keep_logits: bool = False,
    logits_of: Callable[[Any], Tensor] = stack_exits,
    memory_format: torch.memory_format = torch.channels_last,
) -> Evaluation:
    """Evaluate in the precision of the weights, unless the caller has entered an autocast. Every rank must call this.

    Args:
        average: what is averaged over the views of an image: logits, which ranks classes as the authors' Torch code
            does (it sums them), or softmax probabilities.
        between_batches: is called before each batch, as often on every rank; what it raises ends the evaluation.
        logits_of: makes logits (n * V, classes), or of several exits (n * V, exits, classes), of what the network gives; see
            `Objective.logits`.
        memory_format: of the network. Images in another would make cuDNN lay out each weight anew in each batch.
    """
    modes = {module: module.training for module in model.modules()}  # frozen parts have another
    several = loader.index.several_labels
    model.eval()
    # Both stay on the device, which nothing here waits for until the last batch is on its way.
    answered: list[tuple[np.ndarray, *tuple[Tensor, ...]]] = []
    all_logits: list[tuple[np.ndarray, Tensor]] = []
    batches = loader.batches()
    for _ in range(loader.rounds):
        between_batches()
        batch = next(batches, None)
        if batch is None:  # this rank has a batch fewer than others
            continue
        outputs = model(batch.images.contiguous(memory_format=memory_format))
        answers = _average(logits_of(outputs).float().unflatten(0, (-1, batch.views)), average, several)
        exits = answers.unbind(dim=1) if answers.dim() == 3 else (answers,)
        losses_at = torch.stack([_losses(of_exit, batch.labels, several) for of_exit in exits], dim=1)
        every: tuple[Tensor, ...] = ()
        if answers.dim() == 3 and not several:
            every = (answers.argmax(dim=2).where(answers.isfinite().all(dim=2), -1),)
        answers = exits[-1]
        best = answers.topk(min(5, answers.shape[1]), dim=1)  # of logits: small probabilities would tie at zero
        surest = best.values[:, 0].sigmoid() if several else (best.values[:, 0] - answers.logsumexp(dim=1)).exp()
        indices = best.indices.where(answers.isfinite().all(dim=1, keepdim=True), -1)
        if every:  # the last exit's are the network's, also where equal logits leave a choice
            every = (torch.cat([every[0][:, :-1], indices[:, :1]], dim=1),)
        found = (indices, surest, losses_at, *every)
        answered.append((batch.ids, *found))
        if keep_logits or several:
            all_logits.append((batch.ids, answers))
    for module, mode in modes.items():
        module.training = mode

    images = len(loader.index)
    gathered = world.gather_to_rank0(_on_host(all_logits)) if keep_logits or several else []
    logits = _in_order(gathered, images)[0] if gathered else None
    top5, probability, losses_of_exits, *answers_of_exits = _in_order(world.gather(_on_host(answered)), images)
    losses, summed = losses_of_exits[:, -1], losses_of_exits.sum(axis=1)
    not_finite = int((top5[:, 0] == -1).sum())
    if several:
        score = world.broadcast_from_rank0(lambda: _label_score(loader.index, logits, summed))
        return Evaluation(score, top5, probability, losses, logits if keep_logits else None, not_finite)
    correct = top5 == loader.index.labels[:, None]
    answers_at = answers_of_exits[0] if answers_of_exits else None
    exits_correct = [] if answers_at is None else (answers_at == loader.index.labels[:, None]).sum(axis=0).tolist()
    score = Score(
        images=images,
        top1_correct=int(correct[:, 0].sum()),
        top5_correct=int(correct.any(axis=1).sum()) if top5_counts(len(loader.index.classes)) else None,
        loss_sum=float(summed.sum(dtype=np.float64)),
        exits_correct=tuple(exits_correct),
    )
    return Evaluation(score, top5, probability, losses, logits, not_finite, answers_at)


def _losses(answers: Tensor, labels: Tensor, several: bool) -> Tensor:
    """The loss (n) of each image with logits (n, classes) and labels (n) or, if it may have `several`, (n, classes)."""
    if several:
        return F.binary_cross_entropy_with_logits(answers, labels.float(), reduction="none").mean(dim=1)
    return F.cross_entropy(answers, labels, reduction="none")


def _label_score(index: DatasetIndex, logits: np.ndarray | None, losses: np.ndarray) -> LabelScore:
    """The score of images with several labels, on rank 0, which has the (N, classes) logits."""
    assert logits is not None
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    rankings, mean = rank_classes(logits, index.labels)
    return LabelScore(
        images=len(index),
        classes=index.classes,
        right_labels=int((((logits > 0) == (index.labels > 0)) & finite).sum()),
        loss_sum=float(losses.sum(dtype=np.float64)),
        rankings=rankings,
        mean=mean,
    )


_Answers = tuple[np.ndarray, ...]  # of the n images of a batch: their ids, and what was found


def _on_host(batches: Iterable[tuple[np.ndarray, *tuple[Tensor, ...]]]) -> list[_Answers]:
    return [(ids, *(tensor.cpu().numpy() for tensor in found)) for ids, *found in batches]


def _in_order(by_rank: list[list[_Answers]], images: int) -> tuple[np.ndarray, ...]:
    """Join the batches of all ranks, of which some may have none, and put what was found into the order of the index."""
    columns = zip(*(batch for batches in by_rank for batch in batches), strict=True)
    ids, *found = (np.concatenate(column) for column in columns)
    order = np.argsort(ids)
    if not np.array_equal(ids[order], np.arange(images)):
        raise RuntimeError(f"evaluated {len(ids)} images, {len(set(ids.tolist()))} different, of {images}")
    return tuple(column[order] for column in found)


def _average(logits: Tensor, average: Average, several: bool) -> Tensor:
    """(n, V, classes) logits of V views to (n, classes) logits, or log-probabilities; not finite where one of the V is not.

    With several exits (n, V, exits, classes) become (n, exits, classes).

    Args:
        several: an image may have several labels, so that the probability of each is the sigmoid of its logit, and the logit
            of the averaged probability is returned.
    """
    if average == "logits":
        return logits.mean(dim=1)
    if several:
        x = (
            logits.double()
        )  # log-odds of the mean probability, which is too near to 1 for its own digits from logit 37 on
        log_odds = F.logsigmoid(x).logsumexp(dim=1) - F.logsigmoid(-x).logsumexp(dim=1)
        return log_odds.where(x.isfinite().all(dim=1), math.nan).float()
    return logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
