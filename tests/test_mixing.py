"""Mixup, cutmix and soft targets, against plain loops in float64, timm's losses and torch's."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import timm.loss
import torch
import torch.nn.functional as F
from conftest import small_config, write_class_folders

from pipeline.config import DataConfig
from pipeline.config_file import from_dict
from pipeline.data.loader import Batch, Shard, TrainingLoader
from pipeline.data.mixing import Partners, draw_pairs, mix
from pipeline.data.scan import scan_classes
from pipeline.data.synthetic import synthetic_index
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.objective import OBJECTIVES, BinaryCrossEntropy, CrossEntropy, create_objective
from pipeline.run import Run

BOTH = DataConfig(mixup_alpha=0.4, cutmix_alpha=1.0, mix_prob=0.8, loader="synthetic", crop_size=10, resize_size=10)
CLASSES = 5


def mixed_by_hand(x, targets, draws):
    """Pair by pair, in float64, as timm's `Mixup` does, with the boxes of cutmix's authors; targets (n, classes)."""
    images, soft = x.double().clone(), targets.double().clone()
    height, width = x.shape[-2:]
    for k, (share, cut) in enumerate(zip(draws.shares.tolist(), draws.cut.tolist(), strict=True)):
        for i, j in ((2 * k, 2 * k + 1), (2 * k + 1, 2 * k)):
            if share == 1:
                continue
            own = share
            if cut:
                side = math.sqrt(1 - share)
                high, wide = int(height * side), int(width * side)
                y, x_ = (int(c * length) for c, length in zip(draws.centres[k], (height, width), strict=True))
                top, bottom = (min(max(edge, 0), height) for edge in (y - high // 2, y + high // 2))
                left, right = (min(max(edge, 0), width) for edge in (x_ - wide // 2, x_ + wide // 2))
                images[i, :, top:bottom, left:right] = x[j, :, top:bottom, left:right].double()
                own = 1 - (bottom - top) * (right - left) / (height * width)
            else:
                images[i] = own * x[i].double() + (1 - own) * x[j].double()
            soft[i] = own * targets[i] + (1 - own) * targets[j]
    return images, soft


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("n", [40, 41, 1])
def test_pairs_are_mixed_as_by_hand(n, several):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 10, 12, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    if several:
        labels = torch.randint(0, 2, (n, CLASSES), generator=generator).to(torch.uint8)
    draws = draw_pairs(BOTH, seed=3, epoch=1, pairs=range(7, 7 + n // 2))
    if n > 1:
        mixes = draws.shares < 1
        assert (mixes & draws.cut).any() and (mixes & ~draws.cut).any() and not mixes.all()

    def dense(y):
        return y.double() if several else F.one_hot(y, CLASSES).double()

    before = x.clone()
    images, greater, partners = mix(x, labels, draws)
    expected, soft = mixed_by_hand(x, dense(labels), draws)
    torch.testing.assert_close(images.double(), expected, rtol=1e-6, atol=1e-6)
    share = partners.shares.double()[:, None]
    torch.testing.assert_close((1 - share) * dense(greater) + share * dense(partners.labels), soft, rtol=0, atol=1e-6)
    assert share.max() <= 0.5 and torch.equal(x, before)
    assert n < 2 or images.is_contiguous(memory_format=torch.channels_last)
    assert n % 2 == 0 or (torch.equal(images[-1], x[-1]) and torch.equal(greater[-1], labels[-1]) and share[-1] == 0)


def test_draws_are_a_function_of_seed_epoch_and_pair_and_have_their_distributions():
    draws = draw_pairs(BOTH, seed=3, epoch=1, pairs=range(4000))
    again = draw_pairs(BOTH, seed=3, epoch=1, pairs=range(70, 75))
    for field, value in vars(draws).items():
        assert np.array_equal(value[70:75], getattr(again, field))
    for other in (draw_pairs(BOTH, 4, 1, range(70, 75)), draw_pairs(BOTH, 3, 2, range(70, 75))):
        assert not np.array_equal(other.centres, again.centres)
    mixed = draws.shares < 1
    for share, probability in ((mixed.mean(), 0.8), (draws.cut.mean(), 0.5), ((mixed & draws.cut).mean(), 0.4)):
        assert share == pytest.approx(probability, abs=5 * math.sqrt(0.25 / 4000))
    for cut, alpha in ((True, 1.0), (False, 0.4)):
        shares = draws.shares[mixed & (draws.cut == cut)]
        assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(draws.centres.ravel(), "uniform").pvalue > 1e-3
    only = [
        draw_pairs(dataclasses.replace(BOTH, **{field: 0.0}), 3, 1, range(40))
        for field in ("mixup_alpha", "cutmix_alpha")
    ]
    assert only[0].cut.all() and not only[1].cut.any() and np.isfinite([draws.shares for draws in only]).all()


def loaded(config, index, rank=0, ranks=1, accumulation=1, first_step=0):
    shard = Shard(rank, ranks, torch.device("cpu"), threads=1)
    loader = TrainingLoader(index, config, shard, seed=5, batch_size=12, accumulation=accumulation)
    return list(loader.batches(epoch=2, first_step=first_step))


def joined(batches):
    """Images, labels, the partners' labels and shares of those that count."""
    columns = zip(
        *((b.images, b.labels, b.partners.labels, b.partners.shares, b.weights > 0) for b in batches), strict=True
    )
    *values, counts = (torch.cat(column) for column in columns)
    return [value[counts] for value in values]


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("images", [46, 39])
def test_any_number_of_ranks_mixes_the_same(ranks, accumulation, images):
    """The last batch is of 10 images, or of 3: the last of them stays as it is, and some parts are empty."""
    index = synthetic_index(images, 3, 10, "train")
    alone, parts = loaded(BOTH, index), [loaded(BOTH, index, r, ranks, accumulation) for r in range(ranks)]
    for step, batch in enumerate(alone):
        mine = [part for share in parts for part in share[step * accumulation : (step + 1) * accumulation]]
        for a, b in zip(joined(mine), joined([batch]), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(loaded(BOTH, index, first_step=2)[0].images, alone[2].images)
    plain = loaded(dataclasses.replace(BOTH, mixup_alpha=0.0, cutmix_alpha=0.0, mix_prob=1.0), index)
    assert plain[0].partners is None and np.array_equal(plain[0].ids, alone[0].ids)
    assert (alone[-1].partners.shares[-1] == 0) == (images % 2 == 1)


def test_the_partner_of_a_corrupt_image_is_mixed_with_what_replaces_it(tmp_path):
    write_class_folders(tmp_path, 2, 4, size=(20, 20))
    corrupt = tmp_path / "class0" / "image0002.jpg"
    corrupt.write_bytes(corrupt.read_bytes()[:-40])
    fields = {"loader": "reference", "corrupt_images": "skip", "mix_prob": 1.0}
    config, index = dataclasses.replace(BOTH, **fields), scan_classes(tmp_path)
    (mixed,) = loaded(config, index)
    (plain,) = loaded(dataclasses.replace(config, mixup_alpha=0.0, cutmix_alpha=0.0), index)
    images, labels, partners = mix(plain.images, plain.labels, draw_pairs(config, 5, 2, range(2)))
    assert torch.equal(mixed.images, images) and torch.equal(mixed.labels, labels)
    assert mixed.weights.sum() == 3 and (partners.shares > 0).all() and torch.equal(mixed.weights, plain.weights)


def test_parts_into_which_pairs_do_not_fit_are_refused(tmp_path):
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
    config = small_config(tmp_path, data={"mixup_alpha": 0.1}, optim={"grad_accum_steps": 4})
    with pytest.raises(UserError, match="12 cannot be split evenly over 1 rank x 4 .* into pairs .* a multiple of 8"):
        Run(config, world)


def test_an_objective_that_ignores_the_partners_is_refused(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "plain", lambda config: object())
    config = from_dict({"optim": {"objective": "plain"}, "data": {"cutmix_alpha": 1.0}}, "test")
    with pytest.raises(UserError, match="the objective plain does not take mixed labels: set data.mixup_alpha 0"):
        create_objective(config)


def mixed_batch(n=8):
    generator = torch.Generator().manual_seed(1)
    labels, others = torch.randint(0, CLASSES, (2, n), generator=generator)
    shares = torch.rand(n, generator=generator) / 2
    batch = Batch(torch.zeros(n, 3, 2, 2), labels, torch.ones(n), np.arange(n), 1, Partners(others, shares))
    return batch, 3 * torch.randn(n, CLASSES, generator=generator)


def soft_targets(batch):
    own, other = (F.one_hot(y, CLASSES).double() for y in (batch.labels, batch.partners.labels))
    share = batch.partners.shares.double()[:, None]
    return (1 - share) * own + share * other


def test_cross_entropy_follows_soft_targets_with_smoothing_and_class_weights():
    batch, outputs = mixed_batch()
    objective = CrossEntropy(label_smoothing=0.1)
    expected = F.cross_entropy(outputs.double(), soft_targets(batch), reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(objective.losses(outputs, batch).double(), expected, rtol=1e-5, atol=1e-6)
    objective.class_weights = torch.rand(CLASSES)
    smooth = torch.eye(CLASSES).double() * 0.9 + 0.1 / CLASSES
    weighted = soft_targets(batch) * objective.class_weights.double()  # each label's loss times its own class's weight
    expected = -(weighted @ smooth * outputs.double().log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(objective.losses(outputs, batch).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_of_one_class_is_timms(smoothing, threshold):
    batch, outputs = mixed_batch()
    theirs = timm.loss.BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    objective = BinaryCrossEntropy(smoothing, threshold)
    plain = dataclasses.replace(batch, partners=None)
    expected = theirs(outputs.double(), batch.labels)
    assert objective.losses(outputs, plain).mean().item() == pytest.approx(expected.item(), rel=1e-6)
    on, off = 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES
    expected = theirs(outputs.double(), soft_targets(batch) * (on - off) + off)
    assert objective.losses(outputs, batch).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_class_weights_of_the_binary_loss_multiply_soft_targets():
    batch, outputs = mixed_batch()
    objective = BinaryCrossEntropy(label_smoothing=0.0)
    objective.class_weights = torch.rand(CLASSES)
    p, y = outputs.double().sigmoid(), soft_targets(batch)
    expected = -(objective.class_weights * y * p.log() + (1 - y) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(objective.losses(outputs, batch).double(), expected, rtol=1e-5, atol=1e-6)
