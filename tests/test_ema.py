"""The moving average of the weights: against float64, validated, chosen by, and read by the commands.

That it resumes to the same bits, test_trainer.py shows.
"""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import small_config
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import assert_equal_weights, last_state, records
from training_hooks import InterruptAfter, InterruptionError

from pipeline import trainer
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.config import Config, ModelConfig
from pipeline.data.loader import EvaluationLoader
from pipeline.distributed import init_distributed
from pipeline.ema import ModelEma
from pipeline.errors import UserError
from pipeline.hooks import Hook, pictures
from pipeline.report import summary
from pipeline.run import Run
from pipeline.start import read_initial_weights
from pipeline.weights import read_weights, write_safetensors, write_torch
from tools import figures
from tools.support.model_card import model_card

pytestmark = pytest.mark.slow

DECAY = 0.28  # above that of the first three updates: 0.1, 2 / 11, 3 / 12


@pytest.mark.parametrize(("decay", "greatest"), [(0.0, None), (0.4, None), (0.9, 8 / 17)])
def test_the_greatest_decay_of_a_short_run_is_told(tmp_path, decay, greatest):
    """Eight updates: the last one's is 8 / 17."""
    config = small_config(tmp_path, train={"ema_decay": decay}, optim={"epochs": 2})
    with init_distributed("cpu") as world:
        assert Run(config, world).measured.greatest_decay == greatest


def test_an_average_begun_late_has_the_decay_of_its_own_updates(tmp_path):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}))
    change = "optim.epochs,optim.milestones,train.ema_decay"
    later = small_config(tmp_path, train={"ema_decay": 0.9, "change": change}, optim={"epochs": 2})
    trainer.fit(later)
    state = last_state(later)
    assert state["ema"]["updates"] == 4 and state["measured"]["greatest_decay"] == 4 / 13


@pytest.mark.parametrize(
    "network", [torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))]
)
def test_networks_with_and_without_counts_are_averaged(network):
    average = ModelEma(network, DECAY)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor += 1
    average.update()
    before = [tensor - 1 for tensor in network.state_dict().values()]
    for tensor, old, new in zip(
        average.network.state_dict().values(), before, network.state_dict().values(), strict=True
    ):
        expected = 0.1 * old + 0.9 * new if tensor.is_floating_point() else new
        torch.testing.assert_close(tensor, expected)


SKIPPED = 2  # a step whose gradient is made NaN


class Watch(Hook):
    """Notes the network's state in float64 before the first step and after each that is taken."""

    changes_network = False

    def __init__(self):
        self.states = []

    def note(self, trainer):
        state = trainer.run.network.state_dict()
        self.states.append({name: tensor.to(torch.float64, copy=True) for name, tensor in state.items()})

    def on_start(self, trainer):
        self.note(trainer)

    def on_batch(self, trainer, batch):
        if trainer.run.done_steps == SKIPPED:
            next(trainer.run.network.parameters()).grad.fill_(torch.nan)

    def on_step(self, trainer, result):
        assert result.skipped == (trainer.run.done_steps == SKIPPED + 1)
        if not result.skipped:
            self.note(trainer)


def config_of(folder: Path, **train):
    train = {"ema_decay": DECAY, "checkpoint_every": 1, "not_finite": "skip", **train}
    return small_config(folder, train=train, optim={"lr": 0.1, "milestones": []})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps without an interruption, what was seen of it, and its summary."""
    config, watch = config_of(tmp_path_factory.mktemp("whole")), Watch()
    trainer.fit(config, hooks=[watch])
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        run.load_state_dict(last_state(config))
        return config, watch, summary(run)


def test_it_is_the_average_that_float64_gives(whole):
    """Of parameters and batch-norm statistics alike, and without the step that was left out."""
    config, watch, _ = whole
    first, *later = watch.states
    average = dict(first)
    for n, state in enumerate(later):
        decay = min(DECAY, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * state[name] for name in average}
    found, raw = last_state(config)["ema"], last_state(config)["model"]
    assert found["updates"] == len(later) == 7
    for name, expected in average.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(found["model"][name], raw[name])
        else:
            torch.testing.assert_close(found["model"][name].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["model"]["features.norm5.running_mean"], raw["features.norm5.running_mean"])


def test_both_are_validated_and_best_is_by_the_average(whole):
    config, _, said = whole
    with trainer.init_distributed("cpu") as world:
        loader = Run(config, world).val_loader
        assert isinstance(loader, EvaluationLoader)
        last = Path(config.run_dir, "checkpoints", "last.pt")
        losses = {
            ema: trainer.evaluate(read_weights(last, ema=ema).network, loader, world).score.loss
            for ema in (True, False)
        }
        assert losses[True] == trainer.evaluate(read_weights(last).network, loader, world).score.loss
    epochs = [record for record in records(config) if "val/loss" in record]
    assert epochs[-1]["val/loss"] == pytest.approx(losses[True], rel=1e-6)
    assert epochs[-1]["val_raw/loss"] == pytest.approx(losses[False], rel=1e-6)
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)
    for folder, ema in (("val", True), ("val_raw", False)):  # in TensorBoard they stand in one chart
        shown = EventAccumulator(str(Path(config.run_dir, folder))).Reload().Scalars("epoch/loss")
        assert (len(shown), shown[-1].value) == (len(epochs), pytest.approx(losses[ema], rel=1e-6))
    best = load_checkpoint(Path(config.run_dir, "checkpoints", "best.pt"))["progress"]
    assert best["best_top1_error"] == min(record["val/top1_error"] for record in epochs)
    lines = said.splitlines()
    assert lines[1].startswith("last (epoch 2 of 2, ema weights): validation top-1 error ")
    assert lines[2].startswith(
        f"last (epoch 2 of 2, raw weights): validation top-1 error {epochs[-1]['val_raw/top1_error']:.2f} %"
    )


def changed(whole, folder: Path, part_to_drop: str = "", **train) -> Config:
    """A copy of the whole run's last checkpoint whose run had other fields, and perhaps no average."""
    state = last_state(whole[0])
    state.pop(part_to_drop, None)
    state["config"]["train"] |= train
    (folder / "checkpoints").mkdir()
    CheckpointFolder(folder / "checkpoints").save(state, best=False)
    return config_of(folder, **train)


def test_the_best_epoch_can_be_chosen_by_the_raw_weights(whole, tmp_path):
    config = changed(whole, tmp_path, best_by="raw")
    with trainer.init_distributed("cpu") as world:
        assert list(Run(config, world).validated) == ["raw", "ema"]
        assert list(Run(whole[0], world).validated) == ["ema", "raw"]
    found = read_weights(tmp_path / "checkpoints" / "last.pt")
    assert not found.averaged and found.note == "raw weights (--ema: their average)"


def test_a_picture_of_the_reuse_of_features_says_whose_weights_it_shows(whole, tmp_path, monkeypatch):
    changed(whole, tmp_path, best_by="raw")
    files = [str(folder / "checkpoints" / "last.pt") for folder in (tmp_path, Path(whole[0].run_dir))]
    titles: list[str] = []
    monkeypatch.setattr(figures, "draw_reuse", lambda blocks, title: (titles.append(title), Figure())[1])
    monkeypatch.setattr("sys.argv", ["figures", *files, "--output", str(tmp_path / "pictures")])
    figures.main()
    assert [title.split(" (")[1] for title in titles] == ["raw weights): feature reuse", "ema weights): feature reuse"]


@pytest.mark.parametrize(("decay", "of"), [(0.5, " (ema weights)"), (0.0, "")])
def test_the_board_says_whose_reuse_of_features_it_shows(tmp_path, monkeypatch, decay, of):
    titles: list[str] = []
    monkeypatch.setattr(pictures, "draw_reuse", lambda blocks, title: (titles.append(title), Figure())[1])
    train = {"ema_decay": decay, "pictures_every": 1, "log_every": 1}
    trainer.fit(small_config(tmp_path, train=train, optim={"epochs": 1}))
    assert titles == [f"densenet_bc22_k8{of} after 1 epoch"]


def test_the_best_epoch_is_told_of_the_weights_that_were_judged_then(tmp_path, capsys):
    """An average that is switched on after the best epoch, and off again, did not find it."""
    with pytest.raises(InterruptionError):
        trainer.fit(config_of(tmp_path, ema_decay=0.0), hooks=[InterruptAfter(5)])
    folder = CheckpointFolder(tmp_path / "checkpoints")
    state = last_state(config_of(tmp_path))
    assert state["progress"]["best_weights"] == "raw"
    state["progress"] |= {"best_top1_error": 0.0}  # which the next epoch does not reach
    folder.save(state, best=False)
    trainer.fit(config_of(tmp_path, change=["train.ema_decay"]))
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("best (epoch 1 of 2, raw weights): validation top-1 error 0.00 %") for line in said)
    assert any(line.startswith("last (epoch 2 of 2, ema weights): validation ") for line in said)
    found = read_weights(folder.last)
    assert found.averaged and found.trained == "epoch 2 of 2 (the best so far by the raw weights: 1)"
    for write, file in ((write_safetensors, tmp_path / "a.safetensors"), (write_torch, tmp_path / "a.pth")):
        write(found, file)
        assert read_weights(file).trained == found.trained

    state = last_state(config_of(tmp_path))
    del state["progress"]["best_weights"]  # as earlier versions saved it
    folder.save(state, best=False)
    assert read_weights(folder.last).trained == "epoch 2 of 2 (the best so far by the ema weights: 1)"
    assert trainer.fit(config_of(tmp_path, change=["train.ema_decay"])).best_weights is None
    assert "best (epoch 1 of 2, ema weights): validation top-1 error 0.00 %" in capsys.readouterr().out

    state["progress"] |= {"best_weights": "ema"}
    state["config"]["train"] |= {"ema_decay": 0.0}
    folder.save({name: part for name, part in state.items() if name != "ema"}, best=False)
    assert read_weights(folder.last).trained == "epoch 2 of 2 (the best so far by the ema weights: 1)"
    trainer.fit(config_of(tmp_path, ema_decay=0.0))
    said = capsys.readouterr().out
    assert "best (epoch 1 of 2, ema weights): " in said and "last (epoch 2 of 2): " in said


def test_commands_take_either_and_say_which(whole, tmp_path):
    last = Path(whole[0].run_dir, "checkpoints", "last.pt")
    average, raw = read_weights(last), read_weights(last, ema=False)
    begun = read_initial_weights(ModelConfig(name=average.config.model.name, weights=str(last)))
    assert begun.note == "moving average of the weights"  # training has no --no-ema
    assert average.note == "moving average of the weights (--no-ema: the raw ones)" and average.averaged
    assert_equal_weights(average.network.state_dict(), last_state(whole[0])["ema"]["model"])
    assert_equal_weights(raw.network.state_dict(), last_state(whole[0])["model"])
    files = ((write_safetensors, tmp_path / "a.safetensors"), (write_torch, tmp_path / "a.pth"))
    for weights, (write, file) in itertools.product((average, raw), files):
        write(weights, file)
        again = read_weights(file)
        kind = "moving average of the weights" if weights.averaged else "raw weights, not their moving average"
        assert again.averaged == weights.averaged and again.note == kind
        assert f"| weights | {kind} |" in " ".join(model_card(again, file).split())
        assert_equal_weights(again.network.state_dict(), weights.network.state_dict())
        assert read_weights(file, ema=weights.averaged).averaged == weights.averaged
        with pytest.raises(UserError, match="leave out --no-ema" if weights.averaged else "leave out --ema"):
            read_weights(file, ema=not weights.averaged)


def test_an_average_that_is_switched_on_begins_at_the_weights_of_that_step(whole, tmp_path):
    changed(whole, tmp_path, part_to_drop="ema", ema_decay=0.0)
    with pytest.raises(UserError, match=r"train.ema_decay was 0.0 and is now 0.28"):
        trainer.fit(config_of(tmp_path))
    config = config_of(tmp_path, change=["train.ema_decay"])
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        state = last_state(config)
        state["progress"] |= {"epoch": 1}  # there is something left to train
        run.load_state_dict(state)
        assert run.ema is not None and run.ema.updates == 0
        assert_equal_weights(run.ema.network.state_dict(), state["model"])
    with pytest.raises(UserError, match="last.pt holds one set of weights and no moving average"):
        read_weights(tmp_path / "checkpoints" / "last.pt", ema=True)
