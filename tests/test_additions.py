"""What an addition costs: each is one class and one line in a registry, as here, and trains, resumes and evaluates.

Data sources and loaders are in test_additions_data.py, dense blocks in test_additions_models.py.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from test_trainer import assert_equal_weights, last_state, weights
from torch import nn
from training_hooks import InterruptAfter, InterruptionError

from pipeline import hooks, objective, optim, trainer
from pipeline.errors import UserError
from pipeline.hooks import Hook
from pipeline.models import zoo

pytestmark = pytest.mark.slow  # for the most part


class Mixup(objective.CrossEntropy):
    """Mixes each image with its neighbour in the batch, and the losses with both labels likewise."""

    def prepare(self, batch):
        mixed = 0.7 * batch.images + 0.3 * batch.images.roll(1, dims=0)
        return dataclasses.replace(batch, images=mixed)

    def losses(self, outputs, batch):
        own, other = (
            F.cross_entropy(outputs.float(), y, reduction="none") for y in (batch.labels, batch.labels.roll(1))
        )
        return 0.7 * own + 0.3 * other


class AverageOfWeights(Hook):
    """A running average of the weights, saved with the run."""

    def __init__(self, run):
        self.average = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        run.parts["average"] = self

    def on_step(self, trainer, result):
        for name, parameter in trainer.run.network.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self):
        return self.average

    def load_state_dict(self, state):
        self.average = {name: tensor.clone() for name, tensor in state.items()}


class StartFrom(Hook):
    """Begins a new run with given weights."""

    def __init__(self, run, weights):
        self.weights = weights

    def on_start(self, trainer):
        if trainer.run.done_steps == 0:
            trainer.run.network.load_state_dict(self.weights)


class TwoOutputs(nn.Module):
    """A network with an early output."""

    def __init__(self, num_classes: int = 1000, **_: object):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.early, self.late = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.first(x).relu()
        early = self.early(x.mean(dim=(2, 3)))
        return early, self.late(self.second(x).relu().mean(dim=(2, 3)))


class SumOverOutputs:
    """The sum of all outputs' cross-entropies; the last output's errors are the run's."""

    def prepare(self, batch):
        return batch

    def losses(self, outputs, batch):
        return sum(F.cross_entropy(output.float(), batch.labels, reduction="none") for output in outputs)

    def logits(self, outputs):
        return outputs[-1]


def resumes_with_the_same_bits(folder: Path, **sections) -> dict:
    """Train a run whole, and interrupted and resumed; return its last checkpoint."""
    sections["train"] = {"checkpoint_every": 1, **sections.get("train", {})}
    whole, cut = (small_config(folder / name, **sections) for name in ("whole", "cut"))
    trainer.fit(whole)
    with pytest.raises(InterruptionError):
        trainer.fit(cut, hooks=[InterruptAfter(3)])
    trainer.fit(cut)
    assert_equal_weights(weights(whole), weights(cut))
    return last_state(cut)


def test_an_objective_with_soft_targets(tmp_path, monkeypatch):
    monkeypatch.setitem(objective.OBJECTIVES, "mixup", lambda config: Mixup(0.0))
    mixed = resumes_with_the_same_bits(tmp_path / "mixup", optim={"objective": "mixup"})["model"]
    plain = small_config(tmp_path / "plain")
    trainer.fit(plain)
    assert not torch.equal(mixed["classifier.weight"], weights(plain)["classifier.weight"])


def test_an_optimiser(tmp_path, monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", lambda parameters, config: torch.optim.AdamW(parameters, config.lr))
    state = resumes_with_the_same_bits(tmp_path, optim={"optimizer": "adamw", "lr": 1e-3})
    assert "exp_avg" in state["optimizer"]["state"][0]


def test_a_running_average_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(hooks.HOOKS, "average", AverageOfWeights)
    state = resumes_with_the_same_bits(tmp_path)
    whole = last_state(small_config(tmp_path / "whole"))
    assert_equal_weights(state["average"], whole["average"])
    assert not torch.equal(state["average"]["classifier.weight"], state["model"]["classifier.weight"])


def test_weights_to_start_from(tmp_path, monkeypatch):
    given = small_config(tmp_path / "given")
    trainer.fit(given)
    monkeypatch.setitem(hooks.HOOKS, "start_from", lambda run: StartFrom(run, weights(given)))
    config = small_config(
        tmp_path / "run", optim={"lr": 1e-12, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    )
    trainer.fit(config)
    torch.testing.assert_close(weights(config)["classifier.weight"], weights(given)["classifier.weight"])


def test_a_network_with_several_outputs(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.NETWORKS, "two_outputs", TwoOutputs)
    monkeypatch.setitem(objective.OBJECTIVES, "sum", lambda config: SumOverOutputs())
    sections = {"model": {"name": "two_outputs"}, "optim": {"objective": "sum"}}
    assert "early.weight" in resumes_with_the_same_bits(tmp_path, **sections)["model"]


@pytest.mark.parametrize(
    ("field", "name", "expected"),
    [
        (
            "objective",
            "crossentropy",
            r"optim.objective: there is no 'crossentropy' \(did you mean 'cross_entropy'\?\); choose",
        ),
        (
            "optimizer",
            "sgdd",
            r"optim.optimizer: there is no 'sgdd' \(did you mean 'sgd'\?\); choose sgd, adabelief, adamw",
        ),
        (
            "loader",
            "dalli",
            r"data.loader: there is no 'dalli' \(did you mean 'dali'\?\); choose dali, native, reference, synthetic",
        ),
        ("dataset", "cifar", r"data.dataset: there is no 'cifar' \(did you mean 'cifar10"),
    ],
)
def test_a_name_that_is_not_registered_is_refused_with_those_that_are(tmp_path, field, name, expected):
    section = {"data": {"loader": "auto", field: name}} if field in ("loader", "dataset") else {"optim": {field: name}}
    with pytest.raises(UserError, match=expected):
        trainer.fit(small_config(tmp_path, **section))
