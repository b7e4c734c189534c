"""The trainer, really run: in this process, and under torchrun with gloo."""

import copy
import dataclasses
import functools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import override_flags, run_module, small_config, write_class_folders
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from training_hooks import InterruptAfter, InterruptionError

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config import Config
from pipeline.config_file import parse_command_line, to_yaml
from pipeline.errors import UserError
from pipeline.metrics import Score
from pipeline.run import Run

pytestmark = pytest.mark.slow  # for the most part


@pytest.fixture(autouse=True)
def board_files_in_order(monkeypatch):
    """TensorBoard reads a run's files by name, which ends in a count of this process: 10 would be read before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def last_state(config) -> dict:
    return load_checkpoint(Path(config.run_dir, "checkpoints", "last.pt"))


def weights(config) -> dict[str, torch.Tensor]:
    return last_state(config)["model"]


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def records(config) -> list[dict]:
    return [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]


def comparable_records(config) -> list[dict]:
    """The records without what differs from run to run."""
    return [
        {key: v for key, v in record.items() if not key.startswith(("speed/", "memory/"))} for record in records(config)
    ]


def on_the_board(config, folder: str = "") -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, or of its training or validation by epoch: steps and values, by tag."""
    board = EventAccumulator(str(Path(config.run_dir, folder))).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_no_doubles_on_the_board(config) -> None:
    """TensorBoard's files hold what metrics.jsonl does."""
    by_step = on_the_board(config)
    for tag, shown in by_step.items():
        names = [
            tag,
            tag.replace("usage/", "speed/"),
            tag.replace("usage/", "memory/"),
            tag.replace("usage/", "epoch/"),
        ]
        recorded = [(r["step"], r[name]) for r in records(config) for name in dict.fromkeys(names) if name in r]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in recorded], tag
    assert {"train/loss", "usage/images_per_second"} <= by_step.keys()
    for folder, beginning in (("train", "epoch/train_"), ("val", "val/")):
        by_epoch = on_the_board(config, folder)
        for tag, shown in by_epoch.items():
            name = tag.replace("epoch/", beginning)
            recorded = [(r["epochs"], r[name]) for r in records(config) if name in r]
            assert shown == [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in recorded], tag
        assert len(by_epoch["epoch/loss"]) == config.optim.epochs


def test_training_learns_and_leaves_what_it_promises(tmp_path):
    config = small_config(
        tmp_path,
        data={"synthetic_images": 240},
        optim={"epochs": 4, "lr": 0.05, "milestones": [3]},
        train={"pictures_every": 3},
    )
    progress = trainer.fit(config)
    assert progress.epoch == 4 and progress.best_top1_error < 40  # chance: 67
    assert (tmp_path / "config.yaml").read_text() == to_yaml(config)
    validation = [r for r in records(config) if "val/top1_error" in r]
    assert [r["step"] for r in validation] == [20, 40, 60, 80]
    assert min(r["val/top1_error"] for r in validation) == progress.best_top1_error
    assert validation[-1]["epoch/train_loss"] < validation[0]["epoch/train_loss"]
    assert [r["epochs"] for r in validation] == [1, 2, 3, 4] and records(config)[0]["epochs"] == 0.1

    assert on_the_board(config).keys() == {
        "train/loss", "train/top1_error", "train/learning_rate", "train/gradient_norm",
        "usage/images_per_second", "usage/data_wait_fraction", "usage/checkpoint_seconds", "usage/remaining_seconds",
        "usage/peak_gib", "usage/skipped_images",
    }  # fmt: skip
    for folder in ("train", "val"):  # one chart for both, by epoch
        shown = on_the_board(config, folder)
        assert shown.keys() == {"epoch/loss", "epoch/top1_error"}
        assert [epoch for epoch, _ in shown["epoch/top1_error"]] == [1, 2, 3, 4]
    assert_no_doubles_on_the_board(config)
    board = EventAccumulator(str(tmp_path)).Reload()
    pictures = {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}
    assert pictures == {  # after the first epoch, the third and the last, of 20 steps each
        "images/training_batch": [1, 41, 61],
        "images/validation_answers": [20, 60, 80],
        "images/feature_reuse": [20, 60, 80],
    }
    assert "config/text_summary" in board.Tags()["tensors"]


# All that is off by default and shapes the weights, at once.
EVERYTHING = {
    "model": {"dropout": 0.1},
    "data": {
        "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "mix_prob": 0.9, "auto_augment": "randaugment-timm",
        "randaugment_magnitude_std": 0.5, "cutout": 4, "random_erasing": 0.5, "erasing_fill": "noise", "aug_repeats": 2,
        "crop_size": 16, "train_crop_size": [12, 16], "train_crop_milestones": [1],
    },
    "optim": {
        "objective": "binary_cross_entropy", "bce_target_threshold": 0.2, "class_weights": "balanced",
        "optimizer": "lamb", "lr": 0.02, "weight_decay": 0.02, "decay_norms": False, "clip_grad_norm": 1.0,
        "schedule": "cosine", "min_lr": 0.001, "warmup_epochs": 0.5,
    },
    "train": {"ema_decay": 0.9},
}  # fmt: skip

RUNS = {
    "fused": {},
    "accumulation": {"optim": {"grad_accum_steps": 3}},
    "everything": EVERYTHING,
    "bf16": {"train": {"precision": "bf16", "memory_format": "contiguous"}},
    "fp16": {"train": {"precision": "fp16"}, "optim": {"label_smoothing": 0.1}},
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The runs of `RUNS` with a checkpoint after each step, without an interruption; trained when first asked for."""

    @functools.cache
    def train(name: str):
        config = config_of(name, tmp_path_factory.mktemp(name))
        trainer.fit(config)
        return config

    return train


def config_of(name: str, folder: Path):
    return small_config(folder, **{**RUNS[name], "train": {"checkpoint_every": 1, **RUNS[name].get("train", {})}})


@pytest.mark.parametrize("interrupted_after", [1, 3, 5, 6])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_with_the_same_bits(whole_runs, tmp_path, name, interrupted_after):
    """Four steps an epoch, a checkpoint after each; records neither lack nor double."""
    whole, cut = whole_runs(name), config_of(name, tmp_path)
    with pytest.raises(InterruptionError):
        trainer.fit(cut, hooks=[InterruptAfter(interrupted_after)])
    trainer.fit(cut)
    assert_equal_weights(weights(whole), weights(cut))
    if "ema" in last_state(whole):
        assert_equal_weights(*(last_state(config)["ema"]["model"] for config in (whole, cut)))
    for part in ("scaler", "progress"):
        assert last_state(whole)[part] == last_state(cut)[part]
    assert comparable_records(cut) == comparable_records(whole)
    assert_no_doubles_on_the_board(cut)


def test_the_first_of_equally_good_epochs_is_the_best(tmp_path, monkeypatch, capsys):
    score = Score(4, top1_correct=2, top5_correct=4, loss_sum=1.0)
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self, network: score)
    progress = trainer.fit(small_config(tmp_path))
    assert (progress.best_epoch, progress.best_top1_error, progress.best_top5_error) == (0, 50, 0)
    said = capsys.readouterr().out
    assert "epoch 1/2, step 2/4: loss " in said and "resuming" not in said
    (first,), (second,) = ([line for line in said.splitlines() if f"epoch {n}/2: train loss" in line] for n in (1, 2))
    errors = "top-1 error 50.00 % (accuracy 50.00 %), top-5 error 0.00 %"
    assert first.endswith(f"{errors} (4 images), the best so far") and second.endswith(f"{errors} (4 images)")
    assert f"best (epoch 1 of 2): validation {errors}" in said
    assert f"last (epoch 2 of 2): validation {errors}" in said
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["progress"]["epoch"] == 1


def test_a_finished_run_started_again_does_nothing_and_says_what_gives_more(tmp_path, capsys):
    config = small_config(tmp_path)
    first = trainer.fit(config)
    before = records(config)
    assert "is complete" not in capsys.readouterr().out
    assert trainer.fit(config) == first and records(config) == before
    said = capsys.readouterr().out
    assert f"{tmp_path} is complete (2 epochs), and nothing is left to train; --optim.epochs N --train.change" in said
    assert "resuming" not in said
    more = ["configs/demo.yaml", *override_flags(config), "--optim.epochs", "3", "--train.change", "optim.epochs"]
    assert trainer.fit(parse_command_line(more, "train", "")[0]).epoch == 3


def test_a_default_step_is_the_plain_one_to_the_last_bit(tmp_path):
    """20 steps of loops as written here: nothing that is off may change a bit of the paper's training."""
    config = small_config(tmp_path, optim={"epochs": 5, "milestones": [2, 4], "grad_accum_steps": 2})
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        network = copy.deepcopy(run.network).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        for epoch in range(5):
            batches = run.train_loader.batches(epoch)
            optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch >= milestone for milestone in (2, 4))
            for images in (12, 12, 12, 10):
                for batch in (next(batches), next(batches)):
                    outputs = network(batch.images.contiguous(memory_format=torch.channels_last))
                    losses = torch.nn.functional.cross_entropy(outputs, batch.labels, reduction="none")
                    (losses.sum() * (1 / images)).backward()
                optimizer.step()
                optimizer.zero_grad()
    trainer.fit(config)
    assert_equal_weights(weights(config), network.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_trains(tmp_path, precision):
    config = small_config(tmp_path, optim={"epochs": 1}, train={"precision": precision})
    assert math.isfinite(trainer.fit(config).last_top1_error)


@pytest.mark.parametrize(("images", "lengths"), [(10, [3, 3, 2, 2]), (2, [1, 1, 1, 1])])
def test_a_step_follows_the_mean_loss_of_the_global_batch(tmp_path, images, lengths):
    """Against a step formed by hand: an uneven batch in 4 parts, and 2 images whose last 2 parts are stand-ins."""
    optim = {"epochs": 1, "batch_size": 12, "grad_accum_steps": 4, "weight_decay": 0.0}
    config = small_config(tmp_path, data={"synthetic_images": images}, optim=optim)
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        parts = [(b.images.clone(), b.labels.clone()) for b in run.train_loader.batches(0)]
        assert [len(labels) for _, labels in parts] == lengths
        start = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        run.network.train()
        loss = sum(
            torch.nn.functional.cross_entropy(run.network(part), labels, reduction="sum")
            for part, labels in parts[: min(4, images)]
        )
        gradients = torch.autograd.grad(loss / images, list(run.network.parameters()))
        trainer.Trainer(run, hooks=[]).train_epoch()
        assert run.epoch_metrics.score().images == images
        assert run.epoch_metrics.score().loss == pytest.approx(loss.item() / images, rel=1e-5)
    for (name, p), gradient in zip(run.network.named_parameters(), gradients, strict=True):
        # Nesterov's first step from rest: lr (g + momentum g)
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)


def with_a_corrupt_image(folder: Path, images: int) -> dict[str, str]:
    """Of so many training images one does not decode; the fields of a run on them."""
    write_class_folders(folder / "train", 2, images, size=(20, 20))
    write_class_folders(folder / "val", 2, 2, size=(20, 20))
    corrupt = folder / "train" / "class0" / "image0002.jpg"
    corrupt.write_bytes(corrupt.read_bytes()[:-40])
    return {"loader": "reference", "dir": str(folder), "corrupt_images": "skip"}


def test_a_step_follows_the_mean_loss_of_the_images_that_count(tmp_path):
    """One of six images is corrupt and replaced by another of its batch, which counts once."""
    data = with_a_corrupt_image(tmp_path / "images", 6)
    optim = {"epochs": 1, "batch_size": 6, "grad_accum_steps": 2, "weight_decay": 0.0}
    config = small_config(tmp_path / "run", data=data, optim=optim, model={"name": "densenet_bc22_k6"})
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        batches = list(run.train_loader.batches(0))
        assert sum(batch.weights.sum() for batch in batches) == 5
        start = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        run.network.train()
        loss = sum(
            (torch.nn.functional.cross_entropy(run.network(b.images), b.labels, reduction="none") * b.weights).sum()
            for b in batches
        )
        gradients = torch.autograd.grad(loss / 5, list(run.network.parameters()))
        trainer.Trainer(run, hooks=[]).train_epoch()
        assert run.epoch_metrics.score().images == 5
    for (name, p), gradient in zip(run.network.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)


def test_two_ranks_take_the_steps_of_one_rank_with_two_passes(tmp_path):
    """To the last bit, with one thread each: 46 images in batches of 12, so that the last is uneven."""
    spread, alone = (small_config(tmp_path / name, **EVERYTHING) for name in ("spread", "alone"))
    for config, ranks in ((spread, 2), (alone, 1)):
        flags = [*override_flags(config), "--optim.grad_accum_steps", 2 // ranks]
        done = run_module("pipeline.train", "configs/demo.yaml", *flags, ranks=ranks, cores=1)
        assert done.returncode == 0, done.stderr
    # Both ranks evaluated with rank 0's batch-norm statistics, the ones in the checkpoint.
    with trainer.init_distributed("cpu") as world:
        resized = {"optim": dataclasses.replace(spread.optim, grad_accum_steps=2)}
        resized["train"] = dataclasses.replace(spread.train, allow_world_size_change=True)
        run = Run(dataclasses.replace(spread, **resized), world)
        run.load_state_dict(last_state(spread))
        judged = next(iter(run.validated.values()))
        loss = trainer.Trainer(run, hooks=[]).validate(judged).loss
        assert loss == pytest.approx(records(spread)[-1]["val/loss"], rel=1e-5)
    # Alone, every pass adds to the statistics.
    for part in (weights, lambda config: last_state(config)["ema"]["model"]):
        learned = [
            {n: w for n, w in part(c).items() if "running" not in n and "batches" not in n} for c in (spread, alone)
        ]
        assert_equal_weights(*learned)


def learned(config: Config) -> dict[str, torch.Tensor]:
    """The parameters, without statistics, which are a rank's own."""
    return {n: w for n, w in weights(config).items() if "running" not in n and "batches" not in n}


def trained_by(ranks: int, config: Config) -> dict[str, torch.Tensor]:
    """What so many ranks have learned, each on one core."""
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(config), ranks=ranks, cores=1)
    assert done.returncode == 0, done.stderr
    return learned(config)


def test_ranks_that_accumulate_gradients_take_the_step_of_one(tmp_path):
    """Two parts on each of two ranks, and four parts alone: the same sums, but for their order."""
    data, optim = {"synthetic_images": 12}, {"epochs": 1, "batch_size": 12}  # one step: later ones multiply rounding
    by_two = trained_by(2, small_config(tmp_path / "2", data=data, optim={**optim, "grad_accum_steps": 2}))
    alone = trained_by(1, small_config(tmp_path / "1", data=data, optim={**optim, "grad_accum_steps": 4}))
    for name, tensor in by_two.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


def test_ranks_divide_by_the_images_that_count_on_all_of_them(tmp_path):
    """One of twelve images is corrupt, on one of two ranks."""
    data = with_a_corrupt_image(tmp_path / "images", 12)
    optim = {"epochs": 1, "batch_size": 12}
    by_two = trained_by(2, small_config(tmp_path / "2", data=data, optim=optim))
    alone = trained_by(1, small_config(tmp_path / "1", data=data, optim={**optim, "grad_accum_steps": 2}))
    for name, tensor in by_two.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "sections"), [(2, {"model": {"dropout": 0.1}}), (3, EVERYTHING)], ids=["2", "3, everything"]
)
def test_a_run_of_several_ranks_resumes_to_the_same_bits(tmp_path, ranks, sections):
    spread = small_config(tmp_path, **{**sections, "train": {"checkpoint_every": 3, **sections.get("train", {})}})
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(spread), ranks=ranks)
    assert done.returncode == 0, done.stderr

    # Go back to the checkpoint before the validation of the second epoch, and end again.
    folder = Path(spread.run_dir, "checkpoints")
    end, lines = last_state(spread), comparable_records(spread)
    assert load_checkpoint(folder / "previous.pt")["progress"]["step"] == 4
    (folder / "previous.pt").replace(folder / "last.pt")
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(spread), ranks=ranks)
    assert done.returncode == 0 and "resuming at epoch 2/2, step 4/4" in done.stdout
    assert_equal_weights(weights(spread), end["model"])
    if "ema" in end:
        assert_equal_weights(last_state(spread)["ema"]["model"], end["ema"]["model"])
    assert last_state(spread)["progress"] == end["progress"] and comparable_records(spread) == lines


def one_step(folder: Path, **sections: dict) -> dict[str, torch.Tensor]:
    """The weights after one optimiser step without weight decay."""
    optim = {"epochs": 1, "batch_size": 12, "weight_decay": 0.0, **sections.pop("optim", {})}
    config = small_config(folder, data={"synthetic_images": 12}, optim=optim, **sections)
    trainer.fit(config)
    return weights(config)


def test_precision_smoothing_and_memory_format_reach_the_step(tmp_path, monkeypatch):
    """Half precision shows as a small difference, label smoothing as a large one, the memory format as rounding."""
    dtypes, formats = [], []
    by_module = {"dense_block": "eager"}  # whose calls can be watched
    real = torch.nn.Linear.forward

    def forward(self, x):
        y = real(self, x)
        if self.training:
            dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    pool = torch.nn.AvgPool2d.forward
    monkeypatch.setattr(
        torch.nn.AvgPool2d,
        "forward",
        lambda self, x: (
            (self.training and formats.append(x.is_contiguous(memory_format=torch.channels_last))) or pool(self, x)
        ),
    )
    plain = one_step(tmp_path / "eager", model=by_module)["classifier.weight"]
    assert dtypes[-1] == torch.float32 and formats[-1]
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = one_step(tmp_path / precision, model=by_module, train={"precision": precision})["classifier.weight"]
        assert dtypes[-1] == dtype and not torch.equal(half, plain)
        torch.testing.assert_close(half, plain, rtol=0.05, atol=0.01)
    nchw = one_step(tmp_path / "nchw", model=by_module, train={"memory_format": "contiguous"})["classifier.weight"]
    assert not formats[-1]
    torch.testing.assert_close(nchw, plain, rtol=1e-3, atol=1e-4)
    smoothed = one_step(tmp_path / "smooth", model=by_module, optim={"label_smoothing": 0.5})["classifier.weight"]
    assert (smoothed - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("model", "says"),
    [({"dense_block": "memory_efficient"}, "memory_efficient"), ({"dropout": 0.1}, "eager (dropout)")],
)
def test_the_run_says_once_how_its_dense_blocks_compute(tmp_path, capsys, model, says):
    trainer.fit(small_config(tmp_path, model=model))
    lines = [line for line in capsys.readouterr().out.splitlines() if "dense blocks" in line]
    assert [line.split(" ", 2)[2] for line in lines] == [f"dense blocks: {says}"]


def test_the_recorded_gradient_norm_does_not_depend_on_loss_scaling(tmp_path):
    norms = []
    for precision in ("fp32", "fp16"):
        config = small_config(tmp_path / precision, optim={"epochs": 1}, train={"precision": precision, "log_every": 1})
        trainer.fit(config)
        norms.append(next(r["train/gradient_norm"] for r in records(config) if "train/gradient_norm" in r))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"precision": "bf16"}}, "train.precision was fp32 and is now bf16"),
        ({"optim": {"lr": 0.2}}, "optim.lr was 0.1 and is now 0.2"),
        ({"model": {"name": "densenet40_k12"}}, "model.name was densenet_bc22_k8 and is now densenet40_k12"),
        ({"data": {"synthetic_images": 47}}, "data.synthetic_images was 46"),
        (
            {"optim": {"grad_accum_steps": 2}},
            "a batch was 1 rank x 1 accumulation step "
            "and is now 1 rank x 2 accumulation steps; .*--train.allow_world_size_change",
        ),
    ],
)
def test_a_changed_run_is_not_resumed(tmp_path, changes, expected):
    config = small_config(tmp_path, optim={"epochs": 1})
    trainer.fit(config)
    before = (tmp_path / "config.yaml").read_text(), weights(config)
    changed = {name: dict(fields) for name, fields in changes.items()}
    changed["optim"] = {"epochs": 1, **changed.get("optim", {})}
    with pytest.raises(UserError, match=expected):
        trainer.fit(small_config(tmp_path, **changed))
    assert (tmp_path / "config.yaml").read_text() == before[0]
    assert_equal_weights(weights(config), before[1])


def test_another_number_of_parts_is_allowed_on_request(tmp_path, capsys):
    def config_of(parts: int, epochs: int, **train):
        optim = {"epochs": epochs, "grad_accum_steps": parts, "milestones": []}
        return small_config(tmp_path, optim=optim, train={"allow_world_size_change": True, **train})

    trainer.fit(config_of(1, 1))
    whole = "images in a batch-norm statistic: 12 (10 in an epoch's last batch)\n"
    assert capsys.readouterr().out.count(whole) == 1
    audit = (tmp_path / "audit.md").read_text()
    assert trainer.fit(config_of(2, 1)).epoch == 1  # it is complete, and the second part trains none
    assert whole in (said := capsys.readouterr().out) and "accumulation steps; before" not in said
    assert (tmp_path / "audit.md").read_text() == audit
    assert trainer.fit(config_of(2, 2, change="optim.epochs")).epoch == 2
    said = capsys.readouterr().out
    assert (
        "from epoch 2 on (after 4 steps of the run), a batch is 1 rank x 2 accumulation steps; before, 1 rank x 1"
        in said
    )
    assert "images in a batch-norm statistic: 12, 6 from epoch 2 on (10, then 5 in an epoch's last batch" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path):
    config = small_config(tmp_path, optim={"lr": 1e6}, train={"checkpoint_every": 1})
    with pytest.raises(UserError, match=r"are not finite at epoch 1, step 3: .*not-finite.json"):
        trainer.fit(config)
    before, there = json.loads((tmp_path / "not-finite.json").read_text())
    assert (before["step"], there["step"]) == (2, 3)
    with trainer.init_distributed("cpu") as world:
        loader = Run(config, world).train_loader
        third = list(loader.batches(epoch=0))[2]
    assert there["ids"] == third.ids.tolist() and there["names"] == [loader.index.names[i] for i in third.ids]
    for file in (tmp_path / "checkpoints").iterdir():
        assert all(value.isfinite().all() for value in load_checkpoint(file)["model"].values())


def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *_, **__: pytest.fail("downloads"))
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: pytest.fail("downloads")
    )
    data = {"dataset": "cifar10", "loader": "auto", "dir": str(tmp_path / "data"), "download": True}
    with pytest.raises(UserError, match="have them downloaded .*; a dry run downloads nothing"):
        trainer.dry_run(small_config(tmp_path / "run", data=data))
    assert not (tmp_path / "data").exists()


def test_a_dry_run_describes_and_does_not_train(tmp_path):
    text = trainer.dry_run(small_config(tmp_path))
    assert "densenet_bc22_k8: 32,277 parameters, 3 classes" in text
    assert (
        "batch 12 = 1 rank x 1 accumulation step x 12 images" in text and "4 steps an epoch, the last one of 10" in text
    )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_fields_that_count_and_the_sets_that_were_found(tmp_path, image_folders, capfd):
    for name, split in (("train", "train"), ("test", "val")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(image_folders / split)
    config = small_config(
        tmp_path / "run",
        data={"loader": "reference", "dir": str(tmp_path / "data")},
        optim={"schedule": "cosine", "large_batch": True, "warmup_epochs": 0.5},
    )
    text = trainer.dry_run(config)
    shown = yaml.safe_load(text[: text.index("densenet_bc22_k8:")])
    assert shown["data"]["val"] == "test" and "schedule: cosine" in text and "milestones" not in shown["optim"]
    assert "large batch: learning rate 0.1 (2.13333 for 256 images), which warms up over 0.5 epochs" in text
    assert capfd.readouterr().err.count("data.val is test") == 1
    held_out = trainer.dry_run(dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=6)))
    assert "\n  val:" not in held_out and "\n  holdout: 6" in held_out


def test_compiled_training_takes_the_same_first_step(tmp_path):
    plain, compiled = (
        small_config(
            tmp_path / name,
            model={"name": "timm:test_resnet"},
            data={"synthetic_images": 12, "crop_size": 32, "resize_size": 32},
            optim={"epochs": 1, "lr": 1e-3},
            train={"compile": "default" if name == "compiled" else "none"},
        )
        for name in ("eager", "compiled")
    )
    logging.getLogger("torch").setLevel(logging.WARNING)  # pytest would keep the compiler's traces
    trainer.fit(plain)
    trainer.fit(compiled)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-3, atol=1e-4)
