"""What TensorBoard shows of a run: read back with TensorBoard's own code."""

import dataclasses
import io
import json
import os
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.summary.writer import event_file_writer

from pipeline import trainer
from pipeline.data.mixing import Partners
from pipeline.distributed import World
from pipeline.evaluation import evaluate
from pipeline.hooks import Hook
from pipeline.hooks.pictures import SAMPLES, _answers, _classes, _said, _true, _validation_samples
from pipeline.monitor import Monitor
from pipeline.pictures import BLACK, BLUE, CELL, MARGIN, RED, TEXT, draw_grid, percent_text
from pipeline.preemption import PreemptionHandler
from pipeline.provenance import COPY_OF, commit

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def board_files_in_order(monkeypatch):
    """TensorBoard reads a run's files by name, which ends in a count of this process: 10 would be read before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def test_a_grid_has_each_image_in_its_cell_and_its_words_below():
    images = torch.rand(5, 3, 16, 16)
    words = ["short", "", "\u00e9t\u00e9 \u0434\u0430", "w" * 99, "x"]
    grid = draw_grid(images, [[(word, BLACK)] for word in words], columns=3)
    width, height = CELL + MARGIN, CELL + TEXT + 3 + MARGIN
    assert grid.shape == (MARGIN + 2 * height, MARGIN + 3 * width, 3)
    for i, image in enumerate(images):
        left, top = MARGIN + i % 3 * width, MARGIN + i // 3 * height
        shown = grid[top : top + CELL, left : left + CELL]
        enlarged = (image * 255).round().permute(1, 2, 0).numpy().repeat(CELL // 16, 0).repeat(CELL // 16, 1)
        np.testing.assert_array_equal(shown, enlarged)
        below = grid[top + CELL : top + height - MARGIN, left : left + CELL]
        assert (below.min() < 128) == bool(words[i])
    assert (grid[:, width : width + MARGIN] == 255).all()  # no word runs into the next cell
    wide = draw_grid(torch.rand(1, 3, 50, 200), [[("", BLACK)]], columns=1)
    assert (wide[MARGIN : MARGIN + 40, MARGIN : MARGIN + CELL] == 225).all()  # equal frames, nothing stretched


def test_no_answer_is_called_certain_by_rounding():
    assert [percent_text(p) for p in (0, 0.004, 0.5, 0.9949, 0.9951, 1)] == [
        "0 %", "0 %", "50 %", "99 %", "> 99 %", "100 %"
    ]  # fmt: skip


class Answers(Hook):
    """What the picture of validation answers says, and what an evaluation does."""

    changes_network = False

    def on_epoch(self, trainer, result):
        run = trainer.run
        mode = run.network.training
        samples = _validation_samples(run)
        self.captions = _answers(run, samples)
        assert run.network.training == mode
        self.evaluation = evaluate(run.network, run.val_loader, run.world, keep_logits=True)
        self.index, self.samples = run.val_loader.index, samples
        partners = Partners(1 - samples.labels.clamp(max=1), torch.linspace(0, 0.5, len(samples.labels)))
        self.mixed = _classes(run, dataclasses.replace(samples, partners=partners))


@pytest.fixture(scope="module")
def trained(image_folders, tmp_path_factory):
    """A run with pictures on real images, and the hook that was there."""
    data = {"loader": "auto", "dir": str(image_folders), "crop_size": 24, "resize_size": 28}
    config = small_config(tmp_path_factory.mktemp("run"), data=data, train={"pictures_every": 1}, seed=3)
    hook = Answers()
    trainer.fit(config, hooks=[hook])
    return config, hook


def check_captions(hook):
    rows = sorted({int(row) for row in np.linspace(0, len(hook.index) - 1, SAMPLES)})
    assert len(hook.captions) == len(rows) == 10
    logits = torch.from_numpy(hook.evaluation.logits)[rows].double()
    for row, values, caption in zip(rows, logits, hook.captions, strict=True):
        (said, color), (true, _) = caption
        best, label = int(values.argmax()), int(hook.index.labels[row])
        assert said == f"{hook.index.classes[best]} {percent_text(float(values.softmax(0)[best]))}"
        assert true == ("right" if best == label else f"true {hook.index.classes[label]}")
        assert color == (BLUE if best == label else RED)


def test_each_class_of_an_answer_stands_with_its_own_probability():
    run = types.SimpleNamespace(conditions=types.SimpleNamespace(classes=["red", "green", "blue"]))
    probabilities = torch.tensor([0.7, 0.2, 0.96])
    assert _said(run, torch.tensor([1, 0, 1]), probabilities) == "red 70 %, blue 96 %"
    assert _said(run, torch.zeros(3, dtype=torch.int64), probabilities / 2) == "none (blue 48 %)"
    assert _said(run, torch.tensor(1), probabilities) == "green 20 %"
    assert (_true(run, torch.tensor([0, 1, 1])), _true(run, torch.zeros(3))) == ("green, blue", "none")


@pytest.mark.slow
def test_of_several_exits_the_last_one_answers(tmp_path):
    hook = Answers()
    model, optim = {"name": "msdnet_cifar_budget_2"}, {"epochs": 1, "batch_size": 10}
    data = {"synthetic_images": 40}
    trainer.fit(small_config(tmp_path, model=model, data=data, optim=optim, train={"pictures_every": 1}), hooks=[hook])
    check_captions(hook)


@pytest.mark.slow
def test_validation_answers_are_those_of_the_evaluation(trained):
    _, hook = trained
    check_captions(hook)
    assert {color for (_, color), _ in hook.captions} == {BLUE, RED}
    assert [words for words, _ in hook.mixed[0]] == ["class0", ""]  # the first image is as it was
    assert [words for words, _ in hook.mixed[-1]] == ["class2", "50 % class0"]


@pytest.mark.slow
def test_pictures_change_no_bit_of_a_run(trained, tmp_path):
    config, _ = trained
    tree = json.loads(json.dumps(config, default=vars)) | {"run_dir": str(tmp_path)}
    tree["train"]["pictures_every"] = 0
    trainer.fit(small_config(tmp_path, **{k: v for k, v in tree.items() if k not in ("run_dir", "published")}))
    a, b = (torch.load(Path(d, "checkpoints", "last.pt"))["model"] for d in (config.run_dir, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not EventAccumulator(str(tmp_path)).Reload().Tags()["images"]


@pytest.mark.slow
def test_the_board_of_a_run(trained):
    config, hook = trained
    board = EventAccumulator(config.run_dir).Reload()
    pictures = {tag: board.Images(tag) for tag in board.Tags()["images"]}
    assert {tag: [event.step for event in events] for tag, events in pictures.items()} == {
        "images/training_batch": [1, 5],
        "images/validation_answers": [4, 8],
        "images/feature_reuse": [4, 8],
    }
    decoded = np.asarray(Image.open(io.BytesIO(pictures["images/validation_answers"][-1].encoded_image_string)))
    shown = hook.samples.images[0].permute(1, 2, 0) * torch.tensor(config.data.std) + torch.tensor(config.data.mean)
    first = decoded[MARGIN : MARGIN + CELL, MARGIN : MARGIN + CELL].reshape(-1, 3).mean(axis=0) / 255
    assert first == pytest.approx(shown.clamp(0, 1).reshape(-1, 3).mean(dim=0).numpy(), abs=0.03)

    (about,) = board.Tensors("about/text_summary")
    (page,) = (text.decode() for text in about.tensor_proto.string_val)
    assert about.step == 1 and f"torch {torch.__version__.split('+')[0]}" in page and "- hardware: `" in page
    assert "| `optim.epochs` | 2 | 90 |" in page and "| `optim.milestones` | 1 | 30,60 |" in page
    assert "`optim.momentum`" not in page and "| epochs | 2 | 300 |" in page  # as the default has it; as the paper
    assert "37 training and 11 validation images" in page


def hparams_of(folder: Path) -> tuple:
    """What TensorBoard's HParams dashboard asks for: the experiment, and its session groups."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=list(api_pb2.Status.values()), col_params=columns
    )
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run()
    return experiment, groups.session_groups


def test_classes_of_any_name_are_recorded(tmp_path):
    monitor, name = Monitor(tmp_path, ALONE, 0, 0, {}, PreemptionHandler()), os.fsdecode(b"\xc9panchement")
    monitor.scalars(4, 1, {f"val/auroc/{name}": 0.5})
    monitor.text("labels", name, 4)
    monitor.hyperparameters({"optim.class_weights": name})
    monitor.image(f"images/{name}", np.zeros((2, 2, 3), np.uint8), 4)
    monitor.close()
    accumulator = EventAccumulator(str(tmp_path / "val")).Reload()
    assert accumulator.Tags()["scalars"] == [r"labels/auroc/\udcc9panchement"]


def test_a_sweep_stands_in_hparams_with_what_differs_first(tmp_path):
    for rate, error in ((0.1, 30.0), (0.2, 20.0)):
        (tmp_path / f"lr{rate}").mkdir()
        monitor = Monitor(tmp_path / f"lr{rate}", ALONE, 0, 0, {}, PreemptionHandler())
        monitor.hyperparameters({"model.name": "densenet121", "optim.lr": rate, "optim.nesterov": True})
        monitor.scalars(4, 1, {"epoch/train_top1_error": 50.0, "val/top1_error": error})
        if rate == 0.1:
            monitor.completed()
        monitor.close()
    experiment, groups = hparams_of(tmp_path)
    assert [(info.name, info.differs) for info in experiment.hparam_infos] == [
        ("optim.lr", True), ("model.name", False), ("optim.nesterov", False)
    ]  # fmt: skip
    assert [(info.name.group, info.name.tag) for info in experiment.metric_infos] == [
        ("train", "epoch/top1_error"), ("val", "epoch/top1_error")
    ]  # fmt: skip
    found = {}
    for group in groups:
        errors = {metric.name.group: metric.value for metric in group.metric_values}
        (session,) = group.sessions
        found[group.hparams["optim.lr"].number_value] = (errors, session.status)
    assert found == {
        0.1: ({"train": 50.0, "val": 30.0}, api_pb2.Status.Value("STATUS_SUCCESS")),
        0.2: ({"train": 50.0, "val": 20.0}, api_pb2.Status.Value("STATUS_UNKNOWN")),
    }


def test_a_resumed_run_neither_doubles_nor_loses_records_for_a_board_that_watches(tmp_path):
    """Two steps an epoch; the run is lost in its third epoch, after a checkpoint at the end of the second."""

    def train(monitor: Monitor, steps: range, value: float) -> None:
        monitor.text("about", f"from step {steps.start}", steps.start)
        for step in steps:
            monitor.scalars(step, step / 2, {"train/loss": value, "speed/images_per_second": value})
            if step % 2 == 0:
                epoch = dict.fromkeys(("epoch/train_loss", "val/loss", "val_ema/loss"), value) | {
                    "epoch/skipped_images": 0
                }
                monitor.scalars(step, step / 2, epoch)

    first = Monitor(tmp_path, ALONE, 0, 0, {}, PreemptionHandler())
    train(first, range(1, 5), 1.0)
    lengths = first.sync()
    train(first, range(5, 8), 2.0)  # of which no checkpoint knows
    first.sync()
    watching = {folder: EventAccumulator(str(tmp_path / folder)).Reload() for folder in ("", "train", "val", "val_ema")}
    assert [e.step for e in watching["val"].Scalars("epoch/loss")] == [1, 2, 3]
    for _ in range(2):  # the first of which gets no further than its start
        second = Monitor(tmp_path, ALONE, 4, 2, lengths, PreemptionHandler())
        second.text("about", "from step 5", 5)
        second.close()
    third = Monitor(tmp_path, ALONE, 4, 2, lengths, PreemptionHandler())
    train(third, range(5, 9), 3.0)
    third.close()

    assert {str(Path(name).parent) for name in lengths} == {".", "train", "val", "val_ema"}
    for name, length in lengths.items():  # cut where it was at the checkpoint; the records go on
        assert (tmp_path / name).stat().st_size == length or name == "metrics.jsonl"
    for folder in watching:  # the files of the first and of the third start: the second has left nothing
        assert len(list((tmp_path / folder).glob("events.out.tfevents.*"))) == 2

    fresh = {folder: EventAccumulator(str(tmp_path / folder)).Reload() for folder in watching}
    for boards in (fresh, {folder: board.Reload() for folder, board in watching.items()}):
        for folder, tag, steps, known in (
            ("", "train/loss", range(1, 9), 4),
            ("", "usage/skipped_images", (2, 4, 6, 8), 4),
            ("train", "epoch/loss", (1, 2, 3, 4), 2),
            ("val", "epoch/loss", (1, 2, 3, 4), 2),
            ("val_ema", "epoch/loss", (1, 2, 3, 4), 2),
        ):
            values = [1.0 if step <= known else 3.0 for step in steps] if tag.endswith("loss") else [0.0] * 4
            assert [(e.step, e.value) for e in boards[folder].Scalars(tag)] == list(zip(steps, values, strict=True)), (
                tag
            )
    assert [e.step for e in fresh[""].Tensors("about/text_summary")] == [1, 5]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(1, 9)]


def test_the_commit_is_that_of_the_code_alone(tmp_path):
    def git(*words: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *settings, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    code, installed = tmp_path / "code", tmp_path / "venv" / "code"
    for folder in (code, installed):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1")
    assert commit.__wrapped__(code) == "unknown (no git repository)"  # there is no commit
    git("add", "code")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert commit.__wrapped__(code) == head
    assert commit.__wrapped__(installed) == "unknown (no git repository)"  # that repository is somebody else's
    (code / "a.py").write_text("2")
    assert commit.__wrapped__(code) == f"{head}-dirty"
    (installed / COPY_OF).write_text(head)
    assert commit.__wrapped__(installed) == head
