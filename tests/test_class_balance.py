"""Weights of the classes in the loss, and epochs with equally many images of each class."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import index_of, small_config
from test_trainer import assert_equal_weights, weights

from pipeline import trainer
from pipeline.config import Config, DataConfig, OptimConfig
from pipeline.data.loader import Batch
from pipeline.data.plan import epoch_order, repeat, sample_order, training_plans
from pipeline.errors import UserError
from pipeline.objective import OBJECTIVES, CrossEntropy, class_weights_text, create_objective, read_class_weights

BALANCED = DataConfig(loader="synthetic", sampling="balanced")


def skewed(*images: int):
    """An index with so many images of each class, mixed."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(images)), images))
    index = index_of([(32, 32)] * len(labels))
    return dataclasses.replace(index, labels=labels, classes=tuple(f"class {k}" for k in range(len(images))))


def test_a_balanced_epoch_has_equally_many_images_of_each_class():
    index = skewed(70, 20, 10)
    epochs = [sample_order(index, BALANCED, seed=3, epoch=epoch) for epoch in range(40)]
    for order in epochs:
        assert len(order) == 100
        assert sorted(np.bincount(index.labels[order])) == [33, 33, 34]
        times = Counter(order.tolist())
        for label, most in ((0, 1), (1, 2), (2, 4)):  # of 70, 20 and 10 images a third of 100
            assert max(times[i] for i in np.flatnonzero(index.labels == label)) == most
    assert {i for order in epochs for i in order.tolist()} == set(range(100))  # all have their turn
    assert len({tuple(np.bincount(index.labels[order])) for order in epochs}) == 3  # so have classes with one more
    # Classes are mixed within an epoch: runs of a class are as short as by chance.
    assert np.mean([np.mean(np.diff(index.labels[order]) == 0) for order in epochs]) == pytest.approx(1 / 3, abs=0.03)


def test_it_stays_balanced_where_an_epoch_has_each_image_several_times():
    index, config = skewed(70, 20, 10), dataclasses.replace(BALANCED, aug_repeats=5)
    for epoch in range(5):
        order = repeat(sample_order(index, config, seed=3, epoch=epoch), 5, batch_size=20)
        assert sorted(np.bincount(index.labels[order])) == [30, 35, 35]  # 6, 7 and 7 images


def test_it_is_a_pure_function_of_seed_and_epoch():
    index = skewed(9, 4)
    first = sample_order(index, BALANCED, seed=1, epoch=2)
    assert np.array_equal(first, sample_order(index, BALANCED, seed=1, epoch=2))
    assert not np.array_equal(first, sample_order(index, BALANCED, seed=1, epoch=3))
    assert not np.array_equal(first, sample_order(index, BALANCED, seed=2, epoch=2))
    plain = sample_order(index, DataConfig(loader="synthetic"), seed=1, epoch=2)
    assert np.array_equal(plain, epoch_order(13, seed=1, epoch=2))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_balanced_epoch(ranks):
    index = skewed(30, 5)
    order = sample_order(index, BALANCED, seed=1, epoch=1)
    plans = [
        [
            *training_plans(
                index, BALANCED, seed=1, epoch=1, first_step=1, batch_size=6, rank=r, ranks=ranks, accumulation=1
            )
        ]
        for r in range(ranks)
    ]
    seen = [plan.ids[plan.weights > 0] for step in zip(*plans, strict=True) for plan in step]
    assert np.array_equal(np.concatenate(seen), order[6:])


def batch_of(labels: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 2, 2), labels, torch.ones(len(labels)), np.arange(len(labels)), 1)


def test_balanced_weights_make_classes_count_alike():
    index = skewed(70, 20, 10)
    found = read_class_weights("balanced", index)
    assert found is not None and found.tolist() == pytest.approx([100 / 210, 100 / 60, 100 / 30])
    labels = torch.from_numpy(index.labels)
    outputs = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    objective = create_objective(Config(), found)
    losses = objective.losses(outputs, batch_of(labels))
    plain = F.cross_entropy(outputs.double(), labels, reduction="none")
    by_class = torch.stack([plain[labels == k].mean() for k in range(3)]).mean()
    assert losses.double().mean().item() == pytest.approx(by_class.item(), rel=1e-6)


def test_balanced_weights_of_several_labels_are_negatives_by_positives():
    labels = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.uint8)
    index = dataclasses.replace(skewed(2, 2), labels=labels)
    found = read_class_weights("balanced", index)
    assert found is not None and found.tolist() == pytest.approx([3, 1 / 3])


def test_weights_from_a_file(tmp_path):
    index, file = skewed(2, 2), tmp_path / "weights.txt"
    file.write_text("class 1, 0.5\n\nclass 0\t2\n")
    found = read_class_weights(str(file), index)
    assert found is not None and found.tolist() == [2, 0.5]
    for text, expected in (
        ("class 0 1\n", "has no line for the class 'class 1'"),
        ("class 0 1\nclass 2 1\n", r"line 2: there is no class 'class 2' \(did you mean 'class [01]'"),
        ("class 0 1\nx 1\n", "line 2: there is no class 'x'; there are class 0, class 1"),
        ("class 0 1\nclass1\n", "line 2: 'class1' is not 'CLASS WEIGHT'"),
        ("class 0 1\nclass 0 2\n", "line 2"),
        ("class 0 much\n", "line 1"),
        ("class 0 -1\n", "line 1"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=expected):
            read_class_weights(str(file), index)
    with pytest.raises(UserError, match=r"cannot read .*ballanced \(No such .*\) \(did you mean 'balanced'"):
        read_class_weights(str(tmp_path / "ballanced"), index)
    with pytest.raises(UserError, match="no training image is of the class 'class 1'"):
        read_class_weights("balanced", skewed(3, 0))


def test_weights_are_told_with_their_classes():
    index = skewed(6, 2, 1)
    weights = read_class_weights("balanced", index).tolist()
    assert class_weights_text(weights, index.classes) == "class weights: class 0 0.5, class 1 1.5, class 2 3"
    many = skewed(*range(20, 8, -1))
    weights = read_class_weights("balanced", many).tolist()
    assert class_weights_text(weights, many.classes) == "class weights: from class 0 0.725 to class 11 1.611"


def test_an_objective_that_does_not_weigh_classes_is_refused(monkeypatch):
    class Plain:
        pass

    monkeypatch.setitem(OBJECTIVES, "plain", lambda config: Plain())
    config = Config(optim=OptimConfig(objective="plain"))
    with pytest.raises(UserError, match="the objective plain does not weigh classes"):
        create_objective(config, torch.ones(3))
    assert isinstance(create_objective(Config()), CrossEntropy)


@pytest.mark.slow
def test_equal_weights_train_as_none_and_a_file_must_not_change(tmp_path, capsys):
    file = tmp_path / "weights.txt"
    file.write_text("\n".join(f"class000{k} 1" for k in range(3)))
    plain, equal = (
        small_config(tmp_path / name, optim={"epochs": 1, "class_weights": given})
        for name, given in (("plain", None), ("equal", str(file)))
    )
    trainer.fit(plain)
    trainer.fit(equal)
    assert_equal_weights(weights(plain), weights(equal))
    moved = str(file.rename(tmp_path / "moved.txt"))
    trainer.fit(dataclasses.replace(equal, optim=dataclasses.replace(equal.optim, class_weights=moved)))
    file.write_text("\n".join(f"class000{k} {k + 1}" for k in range(3)))
    more = dataclasses.replace(equal.optim, epochs=2, milestones=())
    change = ("optim.epochs", "optim.milestones")
    with pytest.raises(UserError, match="the class weights of .*weights.txt were others"):
        trainer.fit(dataclasses.replace(equal, optim=more, train=dataclasses.replace(equal.train, change=change)))
    unequal = small_config(tmp_path / "unequal", optim={"epochs": 1, "class_weights": str(file)})
    trainer.fit(unequal)
    assert " class weights: class0000 1, class0001 2, class0002 3\n" in capsys.readouterr().out
    assert not torch.equal(weights(unequal)["classifier.bias"], weights(plain)["classifier.bias"])
    assert Path(unequal.run_dir, "audit.md").read_text().count("weights.txt") == 1
