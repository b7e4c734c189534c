"""Nothing of a run is lost: damaged or missing checkpoints, changes on purpose, records that are the user's."""

import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path

import pytest
from conftest import REPOSITORY, override_flags, run_module, small_config
from test_trainer import assert_equal_weights, comparable_records, last_state, records, weights
from training_hooks import InterruptAfter, InterruptionError, Spike

from launch.__main__ import read_config
from pipeline import trainer
from pipeline.audit import audit as audit_of
from pipeline.checkpoint import CheckpointFolder
from pipeline.config_file import load_config, to_yaml
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.finite import way_on, way_on_from_validation
from pipeline.history import History
from pipeline.hooks import Hook
from pipeline.resume import Conditions, check_same_run
from pipeline.run import Run
from pipeline.run_dir import STATUS, is_complete

pytestmark = pytest.mark.slow  # for the most part


def files_of(folder: Path) -> dict[str, bytes]:
    """What a refused start must leave as it was: all but the lock, and the log, which tells of the refusal."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("lock", "log.txt")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    trainer.fit(small_config(folder, optim={"epochs": 1}))
    return folder


def copy_of(run: Path, to: Path):
    for name, content in files_of(run).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return small_config(to, optim={"epochs": 1})


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (
            ["truncate last.pt", "truncate previous.pt"],
            r"last.pt \(damaged\), previous.pt \(damaged\), best.pt, status.json",
        ),
        (["remove last.pt", "truncate previous.pt"], r"previous.pt \(damaged\)"),
        (["remove last.pt", "remove previous.pt"], r"best.pt, status.json, metrics.jsonl"),
        (["remove last.pt", "remove previous.pt", "remove best.pt", "remove status"], r"\(metrics.jsonl\)"),
        (["remove last.pt", "remove previous.pt", "remove best.pt", "remove metrics"], r"\(status.json\)"),
        (["rename last.pt", "remove previous.pt", "remove best.pt", "remove status", "remove metrics"], "last.damaged"),
    ],
)
def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(finished, tmp_path, loss, named):
    """However often it is started, and whoever looks; it names what it found, and says how to begin anew on purpose."""
    config = copy_of(finished, tmp_path)
    for what in loss:
        verb, name = what.split()
        file = tmp_path / {"status": STATUS, "metrics": "metrics.jsonl"}.get(name, f"checkpoints/{name}")
        if verb == "truncate":
            file.write_bytes(file.read_bytes()[:1000])
        elif verb == "rename":
            file.rename(file.with_suffix(".damaged"))
        else:
            file.unlink()
    before = files_of(tmp_path)
    for start in (trainer.fit, trainer.fit, trainer.dry_run):
        with pytest.raises(UserError, match=f"holds a run .*{named}.*--run_dir, or rename {tmp_path} first"):
            start(config)
        assert files_of(tmp_path) == before


def test_a_dry_run_and_a_refused_start_change_nothing(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    assert f"\n{tmp_path} is complete (1 epoch), and nothing is left to train" in trainer.dry_run(config)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    before, log = files_of(tmp_path), tmp_path / "log.txt"
    said = trainer.dry_run(config)
    assert f"\nresuming at epoch 1/1, step 4/4 of {tmp_path}\n" in said
    assert "is damaged: the run resumes from previous.pt" in said
    assert files_of(tmp_path) == before and not log.exists()
    with pytest.raises(UserError, match=r"optim.lr was 0.1 and is now 0.2"):
        trainer.fit(small_config(tmp_path, optim={"epochs": 1, "lr": 0.2}))
    assert files_of(tmp_path) == before
    assert re.search(r"error: cannot resume .* optim.lr was 0.1", log.read_text())


def test_a_run_cut_before_its_first_checkpoint_starts_again_by_itself(tmp_path):
    whole, cut = (small_config(tmp_path / name, train={"log_every": 1}) for name in ("whole", "cut"))
    trainer.fit(whole)
    with pytest.raises(InterruptionError):
        trainer.fit(cut, hooks=[InterruptAfter(2)])
    assert len(records(cut)) == 2 and not (tmp_path / "cut" / STATUS).exists()
    trainer.fit(cut)
    assert_equal_weights(weights(whole), weights(cut))
    assert comparable_records(cut) == comparable_records(whole)


def test_files_of_other_programs_stay(tmp_path):
    config = small_config(tmp_path, train={"log_every": 1})
    tmp_path.joinpath("events.out.tfevents.1.other.1.0").write_bytes(b"somebody else's")
    tmp_path.joinpath("notes.txt").write_text("mine")
    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(2)])
    trainer.fit(config)
    trainer.fit(config)
    assert tmp_path.joinpath("events.out.tfevents.1.other.1.0").read_bytes() == b"somebody else's"
    assert tmp_path.joinpath("notes.txt").read_text() == "mine"


def test_each_checkpoint_comes_with_how_far_the_run_is(tmp_path):
    config = small_config(tmp_path, train={"checkpoint_every": 1})

    def checksum() -> str:
        content = (tmp_path / "checkpoints" / "last.pt").read_bytes()
        return hashlib.sha256(content[:-66] + b"\0\0").hexdigest()  # as if without the comment that holds it

    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(6)])
    assert json.loads((tmp_path / STATUS).read_text()) == {
        "checkpoint": checksum(),
        "epoch": 1,
        "epochs": 2,
        "step": 2,
        "done_steps": 6,
        "complete": False,
        "validation_images": last_state(config)["conditions"]["val_fingerprint"],
        "followers": {"data.resize_size": 16, "optim.milestones": [1], "optim.warmup_epochs": 0.0},
    }
    trainer.fit(config)
    assert json.loads((tmp_path / STATUS).read_text()) == {
        "checkpoint": checksum(),
        "epoch": 2,
        "epochs": 2,
        "step": 0,
        "done_steps": 8,
        "complete": True,
        "validation_images": last_state(config)["conditions"]["val_fingerprint"],
        "followers": {"data.resize_size": 16, "optim.milestones": [1], "optim.warmup_epochs": 0.0},
    }


def test_a_complete_run_whose_audit_cannot_be_written_again_stays_complete(tmp_path, capsys):
    class InTheWay(Hook):
        def on_end(self, trainer):
            (tmp_path / "audit.md").unlink()
            (tmp_path / "audit.md").mkdir()

    trainer.fit(small_config(tmp_path, optim={"epochs": 1}), hooks=[InTheWay()])
    said = capsys.readouterr()
    assert "last (epoch 1 of 1): validation" in said.out and is_complete(tmp_path, 1)
    assert said.err.startswith(f"warning: cannot write the run directory {tmp_path} (Is a directory)")


def test_fields_that_a_checkpoint_lacks_are_compared_with_their_defaults(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1})
    trainer.fit(config)
    state = last_state(config)
    del state["config"]["optim"]["label_smoothing"]
    run = CheckpointFolder(tmp_path / "checkpoints")
    run.save({key: value for key, value in state.items() if key != "format"}, best=False)
    trainer.fit(config)
    with pytest.raises(UserError, match=r"optim.label_smoothing was 0.0 and is now 0.3"):
        trainer.fit(small_config(tmp_path, optim={"epochs": 1, "label_smoothing": 0.3}))


def test_a_field_is_changed_on_purpose_and_the_history_tells(tmp_path, capsys):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}))
    with pytest.raises(UserError, match=r"optim.epochs was 1 and is now 3; .*--train.change optim.epochs"):
        trainer.fit(small_config(tmp_path, optim={"epochs": 3, "milestones": []}))
    more = small_config(
        tmp_path,
        optim={"epochs": 3, "lr": 0.01, "milestones": []},
        train={"change": "optim.epochs,optim.lr", "log_every": 1},
    )
    assert trainer.fit(more).epoch == 3
    changes = ["from epoch 2 on (after 4 steps of the run), optim.epochs is 3; before, 1"]
    changes += ["from epoch 2 on (after 4 steps of the run), optim.lr is 0.01; before, 0.1"]
    said = capsys.readouterr().out
    audit = (tmp_path / "audit.md").read_text()
    assert all(said.count(change) >= 2 for change in changes)  # at the start and in the summary
    assert all(f"- {change}" in audit for change in changes)
    assert {r["train/learning_rate"] for r in records(more) if "train/loss" in r and r["step"] > 8} == {0.01}
    trainer.fit(more)  # again, nothing is new
    assert len(last_state(more)["history"]["segments"]) == 2
    with pytest.raises(UserError, match=r"train.change: there is no field 'optim.lrr' \(did you mean 'optim.lr'\?\)"):
        small_config(tmp_path, train={"change": "optim.lr,optim.lrr"})
    for key in ("model.name", "optim.batch_size"):
        with pytest.raises(UserError, match=f"train.change: a run with another {key} is another run"):
            trainer.fit(
                small_config(tmp_path, optim={"epochs": 3, "lr": 0.01, "milestones": []}, train={"change": key})
            )
    with pytest.raises(
        UserError, match=r"is complete \(3 epochs\), and nothing is left to train with another optim.lr"
    ):
        trainer.fit(
            small_config(tmp_path, optim={"epochs": 3, "lr": 0.5, "milestones": []}, train={"change": "optim.lr"})
        )


def test_the_audit_tells_every_layout_that_a_run_had(tmp_path):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}))
    words = {"epochs": 2, "grad_accum_steps": 2, "milestones": []}
    config = small_config(tmp_path, optim=words, train={"allow_world_size_change": True, "change": ["optim.epochs"]})
    trainer.fit(config)
    audit = (tmp_path / "audit.md").read_text()
    assert "12, 6 from epoch 2 on" in audit
    assert (
        "- from epoch 2 on (after 4 steps of the run), a batch is 1 rank x 2 accumulation steps; before, 1 rank x 1"
        in audit
    )


def test_a_run_whose_loss_was_not_finite_resumes_with_what_the_advice_names(tmp_path):
    config = small_config(tmp_path, train={"checkpoint_every": 1})
    advice = (
        "with a lower optim.lr and --train.change optim.lr, or with --train.not_finite skip; it resumes from the checkpoint "
        "before that step; if that is too late, put previous.pt in the place of last.pt first"
    )
    with pytest.raises(UserError, match=f"the loss is not finite .*{advice}"):
        trainer.fit(config, hooks=[Spike(2)])
    done = last_state(config)["progress"]
    assert (done["epoch"], done["step"]) == (0, 2)
    lower = small_config(tmp_path, optim={"lr": 0.01}, train={"checkpoint_every": 1, "change": ["optim.lr"]})
    assert trainer.fit(lower).epoch == 2


def test_the_advice_without_a_checkpoint_names_none_and_the_next_start_says_that_it_begins_anew(tmp_path, capsys):
    config = small_config(tmp_path, optim={"epochs": 1})
    advice = "with a lower optim.lr, or with --train.not_finite skip; no checkpoint was saved, and it begins anew. "
    with pytest.raises(UserError, match=f"not finite at epoch 1, step 1: start the same command again {advice}"):
        trainer.fit(config, hooks=[Spike(0)])
    assert "beginning anew" not in capsys.readouterr().out
    trainer.fit(small_config(tmp_path, optim={"epochs": 1, "lr": 0.01}))
    assert f"beginning anew: earlier starts of {tmp_path} have saved no checkpoint\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoints", "train", "advice"),
    [
        (
            {},
            {"precision": "bf16", "not_finite": "skip"},
            "lower optim.lr, or with --train.precision fp32; no checkpoint",
        ),
        (
            {"last": 1, "best": 1},
            {"not_finite": "skip"},
            "--train.change optim.lr; it resumes from the checkpoint before",
        ),
        (
            {"last": 3, "previous": 2, "best": 1},
            {},
            "too late, put previous.pt or best.pt in the place of last.pt first",
        ),
    ],
)
def test_advice_names_what_is_there_and_what_would_change_something(tmp_path, checkpoints, train, advice):
    (tmp_path / "checkpoints").mkdir()
    for name, content in checkpoints.items():
        (tmp_path / "checkpoints" / f"{name}.pt").write_text(str(content))
    text = way_on(small_config(tmp_path, train=train))
    assert advice in text and all(f"{name}.pt" not in text for name in {"previous", "best"} - checkpoints.keys())
    assert ("place of last.pt" in text) == (len(set(checkpoints.values())) > 1)
    of_validation = way_on_from_validation(small_config(tmp_path, train=train))
    assert of_validation.startswith("put previous.pt or best.pt" if "previous" in checkpoints else "start anew")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_left_out_on_request(tmp_path, capsys, precision):
    config = small_config(tmp_path, optim={"epochs": 1}, train={"not_finite": "skip", "precision": precision})
    trainer.fit(config, hooks=[Spike(1)])
    assert "step 2 of the run: the loss or the gradient is not finite; the step is left out" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in weights(config).values())
    assert [r["epoch/skipped_images"] for r in records(config) if "val/loss" in r] == [12]
    assert int(weights(config)["features.norm5.num_batches_tracked"]) == 3


def test_ranks_leave_out_a_step_together(tmp_path):
    """In which the loss is not finite on one of them."""
    learned = []
    for ranks in (2, 1):
        folder = tmp_path / str(ranks)
        optim = {"epochs": 1, "grad_accum_steps": 2 // ranks}
        config = small_config(folder / "run", optim=optim, train={"not_finite": "skip"})
        folder.mkdir()
        (folder / "spike.yaml").write_text(to_yaml(config))
        done = run_module("tests.training_on_ranks", folder / "spike.yaml", ranks=ranks, cores=1)
        assert done.returncode == 0, done.stderr
        assert "step 2 of the run: the loss or the gradient is not finite; the step is left out" in done.stdout
        assert [r["epoch/skipped_images"] for r in records(config) if "val/loss" in r] == [12]
        learned.append({n: w for n, w in weights(config).items() if "running" not in n and "batches" not in n})
    assert_equal_weights(*learned)


def test_a_run_that_only_leaves_out_steps_stops(tmp_path):
    class Spikes(Spike):
        def on_step_start(self, trainer):
            self.step = trainer.run.done_steps

    config = small_config(tmp_path, optim={"epochs": 9}, train={"not_finite": "skip"})
    with pytest.raises(
        UserError,
        match="not finite in 10 steps in a row: start the same command .* --train.change optim.lr; it resumes",
    ):
        trainer.fit(config, hooks=[Spikes(0)])


class SpoilValidation(Hook):
    """Makes the network's answers no numbers, after the last checkpoint before a validation."""

    def on_evaluation_batch(self, trainer):
        if trainer.run.progress.step:
            trainer.run.network.get_buffer("features.norm5.running_var").fill_(float("nan"))


def test_answers_that_are_not_finite_stop_a_run(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1})
    with pytest.raises(
        UserError, match=r"the answers to 11 validation images are not finite: start anew .* no earlier checkpoint"
    ):
        trainer.fit(config, hooks=[SpoilValidation()])


def test_answers_that_are_not_finite_count_as_wrong(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1})
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        run.network.get_buffer("features.norm5.running_var").fill_(float("nan"))
        found = evaluate(run.network, run.val_loader, world)
    assert found.not_finite == 11 and (found.top5 == -1).all() and found.score.top1_correct == 0


def test_every_hyperparameter_that_is_changed_on_purpose_trains(tmp_path):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}))
    fields = {"epochs": 2, "milestones": [], "momentum": 0.5, "weight_decay": 0.0, "nesterov": False}
    change = [f"optim.{name}" for name in ("epochs", "momentum", "weight_decay", "nesterov")]
    seen = []

    class Look(Hook):
        def on_step(self, trainer, result):
            seen.append(
                {key: trainer.run.optimizer.param_groups[0][key] for key in ("momentum", "weight_decay", "nesterov")}
            )

    trainer.fit(small_config(tmp_path, optim=fields, train={"change": change}), hooks=[Look()])
    assert seen[-1] == {"momentum": 0.5, "weight_decay": 0.0, "nesterov": False}
    changed = "optim.epochs from 1 to 2 after 4 steps, optim.momentum from 0.9 to 0.5 after 4 steps, "
    assert re.search(rf"\| fields changed on the way +\| none +\| .*{changed}", (tmp_path / "audit.md").read_text())


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_the_precision_is_changed_on_purpose(tmp_path, before, after):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}, train={"precision": before}))
    train = {"precision": after, "change": "train.precision,optim.epochs"}
    config = small_config(tmp_path, optim={"epochs": 2, "milestones": []}, train=train)
    assert trainer.fit(config).epoch == 2


def test_all_that_has_changed_is_refused_at_once(tmp_path):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}))
    with pytest.raises(
        UserError,
        match=r"optim.epochs was 1 and is now 3; optim.lr was 0.1 and is now 0.3; optim.milestones was none and is now 1; "
        r"put it back, change it on purpose with --train.change optim.epochs,optim.lr,optim.milestones "
        r"\(optim.milestones neither named nor given: stays as the run has it\)",
    ):
        trainer.fit(small_config(tmp_path, optim={"epochs": 3, "lr": 0.3}))


def check(tmp_path, now: dict, epoch: int = 1, **conditions) -> dict:
    """Whether a run of two epochs may resume after so many of them, with other fields and under other conditions."""
    config, before = small_config(tmp_path), Conditions(["a", "b"], "0" * 64, [46, 11], "synthetic", 1)
    whole = {"optimizer": {}, "scaler": {}, "progress": {"epoch": epoch}}
    state = whole | {"config": dataclasses.asdict(config), "conditions": dataclasses.asdict(before)}
    return check_same_run(state, small_config(tmp_path, **now), dataclasses.replace(before, **conditions))


@pytest.mark.parametrize(
    ("now", "epoch", "conditions", "must_be", "may"),
    [
        ({"optim": {"lr": 0.2, "batch_size": 6}}, 1, {}, "optim.batch_size", "--train.change optim.lr"),
        (
            {"seed": 2, "optim": {"lr": 0.2, "epochs": 9, "batch_size": 6}, "train": {"change": "optim.epochs"}},
            1, {}, "seed and optim.batch_size", "--train.change optim.epochs,optim.lr",
        ),
        ({"optim": {"lr": 0.2}}, 1, {"fingerprint": "1" * 64}, "the data", "--train.change optim.lr"),
        ({"optim": {"lr": 0.2}}, 1, {"classes": ["a"]}, "the classes", "--train.change optim.lr"),
        (
            {"data": {"holdout": 9}, "optim": {"lr": 0.2}}, 1, {"fingerprint": "1" * 64},
            "data.holdout", "--train.change optim.lr",
        ),
        ({"data": {"holdout": 9}}, 1, {"fingerprint": "1" * 64, "classes": ["a"]}, "", ""),
        (
            {"optim": {"lr": 0.2}, "train": {"change": "optim.lr"}}, 1, {"ranks": 2},
            "", "--train.change optim.lr --train.allow_world_size_change",
        ),
        ({"optim": {"lr": 0.2}}, 2, {}, "", "--optim.epochs N --train.change optim.lr,optim.epochs (N above 2, the epochs"),
        ({"optim": {"epochs": 1}}, 2, {}, "", "--optim.epochs N --train.change optim.epochs,optim.milestones (N above 2"),
    ],
)  # fmt: skip
def test_advice_is_not_refused_when_it_is_followed(tmp_path, now, epoch, conditions, must_be, may):
    """What can never change is said the first time, and the flags for the rest are all that it needs."""
    with pytest.raises(UserError) as refusal:
        check(tmp_path, now, epoch, **conditions)
    said = str(refusal.value)
    assert said.endswith(", or start anew with another --run_dir") and "\n" not in said
    assert (f"; {must_be} must be as before; the rest may change with {may}" in said) == bool(must_be)
    assert (
        must_be
        or (f"; put it back, change it on purpose with {may}" if may else "; put it back (a run with another") in said
    )
    if not may:
        return
    followed = {
        name: {**fields} if isinstance(fields, dict) else fields for name, fields in now.items() if name != "seed"
    }
    followed.get("optim", {}).pop("batch_size", None)
    followed.pop("data", None)
    change = re.search(r"--train.change (\S+)", may)[1]
    followed["train"] = {"change": change, "allow_world_size_change": "allow_world_size" in may}
    followed["optim"] = followed.get("optim", {}) | ({"epochs": 5} if "optim.epochs N" in may else {})
    conditions = {name: value for name, value in conditions.items() if name == "ranks"}
    assert sorted(check(tmp_path, followed, epoch, **conditions)) == sorted(
        set(change.split(",")) - {"optim.milestones"}
    )


def begun(run: Path, config) -> None:
    """The directory of a run that has saved a checkpoint, which nobody reads."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pt").touch()
    (run / "config.yaml").write_text(to_yaml(config))


@pytest.mark.parametrize(
    ("words", "drops"),
    [
        ({"train.change": "optim.epochs"}, (6, 9)),  # as the run has them, whatever the file says
        ({"train.change": "optim.epochs,optim.milestones"}, (12, 18)),  # as a new run has them
        ({"train.change": "optim.epochs", "optim.milestones": (5, 20)}, (5, 20)),
        ({}, (12, 18)),  # to be refused with what the second advises
    ],
)
def test_a_run_that_is_extended_keeps_its_drops_unless_they_are_changed_too(tmp_path, words, drops):
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text("data: {loader: synthetic}\noptim: {epochs: 8, milestones: [4, 6]}\n")
    first = load_config(file, {"run_dir": str(run), "optim.epochs": 12})
    assert first.optim.milestones == (6, 9)
    begun(run, first)
    again = load_config(file, {"run_dir": str(run), "optim.epochs": 24, **words})
    assert (again.optim.epochs, again.optim.milestones) == (24, drops)
    (run / "config.yaml").write_text("[")  # what is wrong with the run its checkpoint says
    assert load_config(file, {"run_dir": str(run), "optim.epochs": 24, **words}).optim.epochs == 24


def test_so_does_a_run_of_a_grid_and_a_new_one_beside_it_follows(tmp_path):
    file, words = tmp_path / "recipe.yaml", {"run_dir": str(tmp_path / "grid")}
    file.write_text("data: {loader: synthetic}\noptim: {epochs: 8, milestones: [4, 6]}\n")

    def read(rate: str, **fields):
        return read_config(str(file), {**words, **fields}, (("optim.lr", rate),), several=False, gpus=False)

    first = read("0.1")
    assert first.run_dir == str(tmp_path / "grid-lr0.1")
    begun(Path(first.run_dir), first)
    longer = {"optim.epochs": 24, "train.change": "optim.epochs"}
    assert [read(rate, **longer).optim.milestones for rate in ("0.1", "0.2")] == [(4, 6), (12, 18)]
    Path(first.run_dir, "checkpoints", "last.pt").unlink()  # it came to no checkpoint, and begins anew
    assert read("0.1", **longer).optim.milestones == (12, 18)


def test_a_run_whose_place_is_a_variable_in_the_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    file = tmp_path / "recipe.yaml"
    file.write_text("run_dir: $SCRATCH/run\ndata: {loader: synthetic}\noptim: {epochs: 8, milestones: [4, 6]}\n")
    first = load_config(file)
    begun(tmp_path / "scratch" / "run", first)
    longer = {"optim.epochs": 24, "train.change": "optim.epochs"}
    assert load_config(file, longer).optim.milestones == (4, 6)
    assert (
        read_config(str(file), {}, (), several=False, gpus=False).run_dir == first.run_dir == f"{tmp_path}/scratch/run"
    )


def test_the_resize_size_stays_too(tmp_path):
    begun(tmp_path, load_config(REPOSITORY / "configs/densenet121.yaml", {"data.crop_size": 192}))
    words = {"run_dir": str(tmp_path), "data.crop_size": 160}
    sizes = [
        load_config(REPOSITORY / "configs/densenet121.yaml", {**words, "train.change": change}).data.resize_size
        for change in ("data.crop_size", "data.crop_size,data.resize_size")
    ]
    assert sizes == [219, 183]


def test_a_start_that_has_saved_nothing_changes_no_field_that_another_keeps(tmp_path):
    """It may have been out of memory in its first step, and has left its configuration."""
    config = small_config(tmp_path, data={"crop_size": 16, "resize_size": 28}, optim={"epochs": 1})
    trainer.fit(config)
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, crop_size=32, resize_size=40))
    (tmp_path / "config.yaml").write_text(to_yaml(larger))
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(dataclasses.replace(config, run_dir=str(tmp_path))))
    words = {"data.crop_size": 24, "optim.epochs": 2, "train.change": "data.crop_size,optim.epochs"}
    again = load_config(file, words)
    assert (again.data.crop_size, again.data.resize_size) == (24, 28)
    assert "changed on the way: data.crop_size from 16 to 24 after 4 steps, optim.epochs" in trainer.dry_run(again)


def test_fewer_epochs_than_a_run_has_do_not_make_it_complete(tmp_path):
    cosine = {"schedule": "cosine"}
    with pytest.raises(InterruptionError):
        trainer.fit(
            small_config(tmp_path, optim={"epochs": 3, **cosine}, train={"checkpoint_every": 1}), [InterruptAfter(6)]
        )
    fewer = small_config(
        tmp_path, optim={"epochs": 1, **cosine}, train={"checkpoint_every": 1, "change": "optim.epochs"}
    )
    with pytest.raises(
        UserError, match="has 1 epoch and 2 steps of 3, and nothing is left to train with another optim.epochs"
    ):
        trainer.fit(fewer)


def test_a_schedule_that_was_all_warm_up_is_extended(tmp_path):
    trainer.fit(small_config(tmp_path, optim={"epochs": 1, "schedule": "cosine", "warmup_epochs": 1.0}))
    longer = {"epochs": 3, "schedule": "cosine", "warmup_epochs": 1.0}
    trainer.fit(small_config(tmp_path, optim=longer, train={"change": "optim.epochs"}))
    assert last_state(small_config(tmp_path))["progress"]["epoch"] == 3


def test_the_loader_that_auto_has_come_to_may_be_named(image_folders, tmp_path):
    data = {"dir": str(image_folders), "loader": "auto"}
    config = small_config(tmp_path, data=data, optim={"epochs": 1})
    trainer.fit(config)
    loader = last_state(config)["conditions"]["loader"]
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, loader=loader))
    assert "is complete" in trainer.dry_run(named)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, loader="reference"))
    with pytest.raises(UserError, match=f"data.loader was {loader} and is now reference; put it back"):
        trainer.dry_run(other)


def test_none_empties_a_list_of_names():
    overrides = {"train.change": ["none"], "model.weights": "a.pth", "data.from_weights": ["none"]}
    config = load_config(REPOSITORY / "configs/finetune/own-folders.yaml", overrides)
    assert config.train.change == config.data.from_weights == ()


def test_a_rate_that_rises_again_is_said_once(tmp_path, capsys):
    """A cosine that has come to its end is stretched by more epochs: 0.1 (1 + cos(3/4 pi)) / 2, and half of 0.1."""
    cosine = {"schedule": "cosine"}
    trainer.fit(small_config(tmp_path, optim={"epochs": 1, **cosine}))
    rates = "0.01464 in the last step, 0.05 in the next"
    line = f"with this change the learning rate rises: {rates} (schedule cosine over 2 epochs)"
    assert line not in capsys.readouterr().out
    more = small_config(tmp_path, optim={"epochs": 2, **cosine}, train={"change": "optim.epochs"})
    assert f"warning: {line}" in trainer.dry_run(more)
    trainer.fit(more)
    assert capsys.readouterr().out.count(line) == 1
    rates = [record["train/learning_rate"] for record in records(more) if "train/learning_rate" in record]
    assert rates[1] == pytest.approx(0.01464, abs=1e-5) and rates[2] > rates[1]
    trainer.fit(more)
    assert line not in capsys.readouterr().out


def test_a_rate_rises_beside_that_of_the_run_as_it_was(tmp_path):
    """A drop that nothing reads any more was read before: 0.1 / 10, and of the cosine 0.1 (1 + cos(2/3 pi)) / 2."""
    trainer.fit(small_config(tmp_path, optim={"epochs": 2, "milestones": [1]}))
    change = {"change": "optim.epochs,optim.schedule"}
    report = trainer.dry_run(small_config(tmp_path, optim={"epochs": 3, "schedule": "cosine"}, train=change))
    assert "rate rises: 0.01 in the last step, 0.025 in the next (schedule cosine over 3 epochs)" in report


def test_steps_that_only_a_loss_scaler_knew_stay_unknown(tmp_path):
    optim = {"epochs": 2}
    trainer.fit(small_config(tmp_path, optim={**optim, "epochs": 1}, train={"precision": "fp16"}))
    later = small_config(
        tmp_path, optim=optim, train={"change": "optim.epochs,optim.milestones,train.precision", "ema_decay": 0.0}
    )
    trainer.fit(later)
    history = History(later, 1)
    history.load_state_dict(last_state(later)["history"])
    assert history.values(later, "train.precision") == [("fp32",), ("fp16",)]
    assert last_state(later)["measured"]["skipped_steps"] is None


def test_a_rate_that_only_stays_does_not_rise(tmp_path, capsys):
    """The old schedule would have lowered it here."""
    steps = {"epochs": 3, "schedule": "step"}
    with pytest.raises(InterruptionError):
        trainer.fit(
            small_config(tmp_path, optim={**steps, "milestones": [1]}, train={"checkpoint_every": 1}),
            [InterruptAfter(4)],
        )
    later = small_config(
        tmp_path, optim={**steps, "milestones": [2]}, train={"change": "optim.milestones", "checkpoint_every": 1}
    )
    trainer.fit(later)
    said = capsys.readouterr().out
    assert "optim.milestones is 2; before, 1" in said and "rises" not in said


def test_a_change_after_which_the_rate_never_drops_is_told_once(tmp_path, capsys):
    """A new run is warned of it; where it was so before, there is nothing new to say."""
    steps, line = {"schedule": "step"}, "the learning rate never drops after epoch 2: the run has optim.epochs 2"
    trainer.fit(small_config(tmp_path, optim={"epochs": 1, "milestones": [], **steps}))
    more = small_config(
        tmp_path, optim={"epochs": 2, "milestones": [2], **steps}, train={"change": "optim.milestones,optim.epochs"}
    )
    assert trainer.dry_run(more).count(line) == 1
    capsys.readouterr()
    trainer.fit(more)
    assert capsys.readouterr().out.count(line) == 1
    trainer.fit(more)
    assert line not in capsys.readouterr().out
    trainer.fit(
        small_config(
            tmp_path, optim={"epochs": 3, "milestones": [9], **steps}, train={"change": "optim.milestones,optim.epochs"}
        )
    )
    assert "never drops after epoch 9" in capsys.readouterr().out
    trainer.fit(
        small_config(tmp_path, optim={"epochs": 4, "milestones": [9], **steps}, train={"change": "optim.epochs"})
    )
    assert "never drops" not in capsys.readouterr().out  # as it was


def test_a_link_to_nowhere_is_not_a_run_that_never_was(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    last = tmp_path / "checkpoints" / "last.pt"
    last.unlink()
    last.symlink_to(tmp_path / "elsewhere" / "last.pt")
    with pytest.raises(UserError, match="cannot read the checkpoint .*last.pt: No such file"):
        trainer.fit(config)


def test_a_gradient_that_is_not_finite_is_left_out_too(tmp_path):
    class Burst(Hook):
        def on_batch(self, trainer, batch):
            if trainer.run.done_steps == 1:
                trainer.run.network.get_parameter("classifier.bias").grad[0] = float("inf")

    config = small_config(tmp_path, optim={"epochs": 1}, train={"not_finite": "skip"})
    assert trainer.fit(config, hooks=[Burst()]).skipped_steps == 1
    assert all(value.isfinite().all() for value in weights(config).values())
    audit = (tmp_path / "audit.md").read_text()  # of the end, as are the summary and the checkpoint
    assert re.search(r"\| steps left out +\| 0 +\| 1 +\| DIFFERS", audit)


@pytest.mark.parametrize(("scale", "outcome"), [(2.0**20, 2), (1.0, "stops")])
def test_in_fp16_the_scale_is_lowered_first(tmp_path, capsys, scale, outcome):
    """A gradient that overflows leaves its step out, which is said; while the scale is above 1, that may be all."""

    class Bursts(Hook):
        def on_start(self, trainer):
            trainer.run.scaler._init_scale = scale

        def on_batch(self, trainer, batch):
            if outcome == "stops" or trainer.run.done_steps < outcome:
                trainer.run.network.get_parameter("classifier.bias").grad[0] = float("inf")

    train = {"not_finite": "skip", "precision": "fp16", "ema_decay": 0.5}
    config = small_config(tmp_path, optim={"epochs": 9 if outcome == "stops" else 2}, train=train)
    if outcome == "stops":
        with pytest.raises(UserError, match="not finite in 10 steps in a row"):
            trainer.fit(config, hooks=[Bursts()])
        return
    progress = trainer.fit(config, hooks=[Bursts()])
    assert progress.skipped_steps >= outcome and last_state(config)["scaler"]["scale"] <= scale / 2**outcome
    assert last_state(config)["ema"]["updates"] == 8 - progress.skipped_steps
    assert "step 1 of the run: the loss or the gradient is not finite; the step is left out" in capsys.readouterr().out


def test_in_fp16_a_gradient_that_never_gets_finite_stops_a_run_that_skips_nothing(tmp_path):
    """The loss scaler leaves out each step, and nothing would show it."""

    class Bursts(Hook):
        def on_start(self, trainer):
            trainer.run.scaler._init_scale = 2.0  # above 1 that may pass

        def on_batch(self, trainer, batch):
            trainer.run.network.get_parameter("classifier.bias").grad[0] = float("nan")

    config = small_config(tmp_path, train={"precision": "fp16", "log_every": 1})
    with pytest.raises(
        UserError, match="the gradient is not finite at epoch 1, step 2: .*not-finite.json names the step's"
    ):
        trainer.fit(config, hooks=[Bursts()])
    assert not (tmp_path / "checkpoints" / "last.pt").exists()
    with trainer.init_distributed("cpu") as world:
        run = trainer.Run(config, world)
        assert "steps left out" not in {
            row.part for row in audit_of(config, 1, run.measured)
        }  # the scaler's are not counted


def test_several_ranks_agree_on_a_damaged_checkpoint(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1}, train={"checkpoint_every": 1})
    words = ["configs/demo.yaml", *override_flags(config)]
    assert run_module("pipeline.train", *words, ranks=2).returncode == 0
    whole = weights(config)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    done = run_module("pipeline.train", *words, ranks=2)
    assert done.returncode == 0 and "last.pt is damaged and now called last.damaged" in done.stderr, done.stderr
    assert "resuming at epoch 1/1, step 4/4" in done.stdout
    assert_equal_weights(weights(config), whole)


def test_a_save_that_takes_long_beside_the_launchers_limit_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAUNCH_GRACE_SECONDS", "0.000001")
    trainer.fit(small_config(tmp_path / "slow", optim={"epochs": 1}))
    said = "and a run that is asked to leave is killed after 0 s: give python -m launch more --warning-seconds"
    assert capsys.readouterr().out.count(said) == 1
    monkeypatch.setenv("LAUNCH_GRACE_SECONDS", "100000")
    trainer.fit(small_config(tmp_path / "quick", optim={"epochs": 1}))
    assert "asked to leave" not in capsys.readouterr().out


def test_a_new_run_is_warned_of_what_looks_wrong(tmp_path, capsys):
    config = small_config(tmp_path, optim={"epochs": 1, "milestones": [3, 1]})
    line = "warning: the learning rate never drops after epoch 3, 1: the run has optim.epochs 1; set optim.milestones"
    assert line in trainer.dry_run(config)
    trainer.fit(config)
    assert line in capsys.readouterr().err
    trainer.fit(config)
    assert line not in capsys.readouterr().err


def test_warnings_name_what_was_done(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(config)
    assert any(
        "last.pt is damaged and now called last.damaged; resuming from previous.pt" in str(w.message) for w in caught
    )
