"""Answers of a network that is asked to choose among a part of its outputs."""

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.evaluation import Evaluation
from pipeline.metrics import Score, top5_counts


def restrict_outputs(evaluation: Evaluation, labels: np.ndarray, outputs: np.ndarray) -> Evaluation:
    """The answers to the same N images if the network had only these outputs: its other logits are left out.

    Images whose answers are not finite stay so. `logits` and the positions in `top5` are those of all outputs. Over ten crops
    with averaged probabilities, the probabilities of all outputs are averaged first.

    Args:
        evaluation: with its logits.
        labels: (N) int64, each of them in `outputs`.
        outputs: (k) int64, positions among all outputs, ascending.
    """
    assert evaluation.logits is not None
    logits = torch.from_numpy(evaluation.logits[:, outputs])
    finite = evaluation.top5[:, :1] >= 0
    best = logits.topk(min(5, len(outputs)), dim=1)
    top5 = np.where(finite, outputs[best.indices.numpy()], -1)
    positions = torch.from_numpy(np.searchsorted(outputs, labels))
    losses = F.cross_entropy(logits, positions, reduction="none").numpy()
    correct = top5 == labels[:, None]
    return Evaluation(
        score=Score(
            images=len(labels),
            top1_correct=int(correct[:, 0].sum()),
            top5_correct=int(correct.any(axis=1).sum()) if top5_counts(len(outputs)) else None,
            loss_sum=float(losses.sum(dtype=np.float64)),
        ),
        top5=top5,
        probability=(best.values[:, 0] - logits.logsumexp(dim=1)).exp().numpy(),
        losses=losses,
        logits=evaluation.logits,
        not_finite=evaluation.not_finite,
    )
