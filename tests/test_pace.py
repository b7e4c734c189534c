"""What a run says of its speed and its end, and the log that it leaves."""

import io
import json
import os
import re
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import small_config

from pipeline import trainer
from pipeline.distributed import World
from pipeline.errors import InterruptedRunError, LocalUserError, LostContactError, UserError
from pipeline.hooks import Hook
from pipeline.hooks.records import Records
from pipeline.pace import Pace, duration
from pipeline.run import Run
from pipeline.run_log import logged
from pipeline.torchrun import outcome

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_the_rest_of_an_epoch_and_of_a_run():
    pace = Pace(steps_per_epoch=10, epochs=3, images=(300, 90))
    pace.steps(0, 2, 100.0)  # the first, in which kernels are compiled: it counts as long as it is the only one
    assert pace.remaining(2) == pytest.approx(
        (8 * 50 + 50, 8 * 50 + 50 + 2 * (500 + 50))
    )  # a validation image: a third
    pace.steps(0, 4, 8.0)
    pace.steps(0, 1, 2.0)
    assert pace.remaining(7) == pytest.approx((3 * 2 + 2, 3 * 2 + 2 + 2 * (20 + 2)))
    pace.epoch_end(0, 5.0)
    assert pace.remaining(10) == pytest.approx((5, 5 + 2 * (20 + 5)))  # validation is still to come
    assert pace.remaining(11) == pytest.approx((9 * 2 + 5, 9 * 2 + 5 + 20 + 5))
    assert pace.remaining(30) == pytest.approx((5, 5)) and pace.text(30) == "5 s to the epoch's end, 5 s to the run's"
    assert [duration(s) for s in (0, 59, 61, 7260, 180000)] == ["0 s", "59 s", "1 min", "2 h 1 min", "2 d 2 h"]


def test_the_estimate_follows_the_load_within_five_log_lines():
    pace = Pace(steps_per_epoch=1000, epochs=1, images=(1000, 0))
    pace.epoch_end(0, 0.0)
    for _ in range(30):
        pace.steps(0, 10, 10.0)
    left = []
    for _ in range(6):  # another job comes: half as fast from here on
        pace.steps(0, 10, 20.0)
        left.append(pace.remaining(400)[1] / 600)
    assert left == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0, 2.0])  # seconds a step


def test_larger_crops_to_come_take_longer():
    pace = Pace(steps_per_epoch=10, epochs=3, images=(300, 0), cost=lambda epoch: [0.25, 1.0, 4.0][epoch])
    pace.epoch_end(0, 0.0)
    for _ in range(2):
        pace.steps(0, 2, 1.0)
    assert pace.remaining(4) == pytest.approx((6 * 0.5, 6 * 0.5 + 10 * 2 + 10 * 8))
    pace.steps(1, 2, 4.0)
    assert pace.remaining(12)[1] == pytest.approx(8 * 2 + 10 * 8)


def test_a_duration_is_rounded_to_the_unit_that_it_shows():
    minute, hour, day = 60, 3600, 86400
    for seconds, text in (
        (59.4, "59 s"),
        (59.6, "1 min"),
        (59 * minute + 29, "59 min"),
        (59 * minute + 59, "1 h 0 min"),
        (23 * hour + 59.4 * minute, "23 h 59 min"),
        (23 * hour + 59.6 * minute, "1 d 0 h"),
        (27 * hour + 29 * minute, "1 d 3 h"),
        (27 * hour + 58 * minute, "1 d 4 h"),
        (2 * day - 1, "2 d 0 h"),
    ):
        assert duration(seconds) == text


def test_an_end_that_is_not_measured_is_said():
    """The end of an epoch is validation, pictures and saving; pictures are drawn here after the first and the last epoch."""
    pace = Pace(steps_per_epoch=10, epochs=4, images=(300, 1), draws=lambda epoch: epoch in (0, 3))
    pace.steps(0, 10, 20.0)
    assert pace.text(10) == "0 s to the epoch's end, 1 min to the run's (validation not measured yet)"
    pace.epoch_end(0, 8.0)
    pace.steps(0, 10, 20.0)
    assert pace.text(20) == "8 s to the epoch's end, 1 min to the run's"  # by the end that is measured, with pictures
    pace.epoch_end(1, 3.0)
    pace.steps(0, 9, 18.0)
    assert (
        pace.text(29) == "5 s to the epoch's end, 33 s to the run's"
        and pace.text(40) == "8 s to the epoch's end, 8 s to the run's"
    )


def test_the_time_of_a_validation_counts_each_set_of_weights(tmp_path):
    estimates = []
    for decay in (0.0, 0.9):
        run = Run(small_config(tmp_path, train={"ema_decay": decay}), World(0, 0, 1, 1, torch.device("cpu")))
        pace = Records(run)._pace
        pace.steps(0, 4, 8.0)
        estimates.append(pace.remaining(done_steps=4)[0])  # the epoch's steps are done
    assert estimates[1] == pytest.approx(2 * estimates[0]) and estimates[0] > 0


class Slow(Hook):
    """Has the loader wait before each batch, as a slow disk does."""

    def on_start(self, trainer):
        batches = trainer.run.train_loader.batches

        def slowly(*place):
            for batch in batches(*place):
                time.sleep(0.05)
                yield batch

        trainer.run.train_loader.batches = slowly


@pytest.mark.slow
def test_a_run_tells_its_time_and_the_log_keeps_what_it_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.hooks.records.MUCH_WAITING", 0.0)  # how much it is depends on the machine
    config = small_config(tmp_path, data={"synthetic_images": 71, "threads": 3}, train={"log_every": 1})
    trainer.fit(config, hooks=[Slow()])
    said = capsys.readouterr().out
    for epoch, left in (
        (1, r"\d+ s to the epoch's end, \d+ s to the run's \(validation not measured yet\)"),
        (2, r"\d+ s to the epoch's end, \d+ s to the run's"),
    ):
        shown = rf"images/s, \d+ % waiting for data, {left}$"
        assert re.search(rf"^{STAMP}epoch {epoch}/2, step 2/6: loss .* {shown}", said, re.M), said
    assert "12 images at once (what a batch norm sees); 6 steps an epoch, the last one of 11 images (11 at once" in said
    assert len(re.findall(r"step 6/6: loss .* % \(11 images\), lr", said)) == 2 and said.count("(11 images)") == 2
    assert said.count("\nimages in a batch-norm statistic: 12 (11 in an epoch's last batch)\n") == 1
    before, after = said.split("hint: ")  # said once, after the second of the epoch's windows that are not its first
    assert "step 3/6: " in before and "step 4/6: " not in before
    assert re.match(
        r"\d+ % of the time goes into waiting for images, so that the loader is the limit: .*with 3 threads", after
    )
    records = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    left = [r["speed/remaining_seconds"] for r in records if "speed/remaining_seconds" in r]
    assert len(left) == 12 and left[0] > 0.05 * 11  # what a busy machine's validation takes is known to no estimate
    told = re.findall(r"(\S+ (?:s|min)) to the run's", said)  # one estimate for the log, TensorBoard and status
    assert told == list(map(duration, left))
    log = (tmp_path / "log.txt").read_text()
    assert re.match(rf"{STAMP}started: .* \(process \d+ on \S+, 1 rank\)\n", log)
    assert re.search(rf"\n{STAMP}ended\n$", log) and said in log  # the summary too

    with pytest.raises(UserError, match="optim.lr was"):
        trainer.fit(small_config(tmp_path, data={"synthetic_images": 71, "threads": 3}, optim={"lr": 0.3}))
    assert (tmp_path / "log.txt").read_text().startswith(log)
    assert re.search(
        rf"\n{STAMP}error: cannot resume .*optim.lr was 0.1 and is now 0.3.*\n$", (tmp_path / "log.txt").read_text()
    )


class Rank:
    size = 2

    def __init__(self, rank: int):
        self.rank, self.is_main = rank, rank == 0


@pytest.mark.parametrize(
    ("rank", "error", "expected"),
    [
        (0, UserError("all know"), "error: all know"),
        (1, UserError("all know"), None),
        (1, LocalUserError("a.jpg is damaged"), "rank 1: error: a.jpg is damaged"),
        (1, InterruptedRunError("lost contact"), None),
        (0, InterruptedRunError("leaves on SIGTERM"), "interrupted: leaves on SIGTERM"),
        (1, RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1. More"), None),
        (
            0,
            RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed. More"),
            "interrupted: rank 0 has lost contact to "
            "another rank, whose own message or torchrun's report says why ([gloo/transport/tcp/pair.cc] Connection closed)",
        ),
        (0, KeyboardInterrupt(), "interrupted: by Ctrl-C, without a checkpoint"),
        (1, ValueError("a bug"), "rank 1: error: ValueError: a bug"),
        (0, OSError(28, "No space left"), "error: OSError: [Errno 28] No space left"),
    ],
)
def test_how_an_attempt_ended_stands_in_the_log_once(tmp_path, rank, error, expected):
    raised = LostContactError if "gloo" in str(error) else type(error)
    with pytest.raises(raised), logged(tmp_path, Rank(rank)):
        raise error
    log = tmp_path / "log.txt"
    ends = [line for line in log.read_text().splitlines() if " started: " not in line] if log.exists() else []
    if expected is None:
        assert ends == []
    else:
        assert re.fullmatch(STAMP + re.escape(expected), ends[-1])
        assert ends[:-1] == [] or ends[0] == "Traceback (most recent call last):"


def test_a_name_that_is_not_utf8_stands_in_the_log_and_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    name = os.fsdecode(b"caf\xe9.jpg")
    with pytest.raises(UserError, match="is damaged"), logged(tmp_path, Rank(0)):
        print(f"warning: {name} is gray", file=sys.stderr)
        raise UserError(f"{name} is damaged")
    _, warning, end = (tmp_path / "log.txt").read_text().splitlines()
    assert warning == r"warning: caf\udce9.jpg is gray" and end.endswith(r"error: caf\udce9.jpg is damaged")


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with logged(tmp_path, Rank(0)):
        print("goes on")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_below_log_or_output_ends_no_run_and_silences_no_terminal(tmp_path, capfd):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    full = open("/dev/full", "w")  # noqa: SIM115 - closed below
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr("pipeline.run_log.leave_closed_outputs", lambda: pytest.fail("the terminal is there"))
        with pytest.raises(UserError, match="a mistake"), logged(tmp_path, Rank(0)):
            print("is lost", flush=True)
            print("is seen", file=sys.stderr, flush=True)
            raise UserError("a mistake")
    with suppress(OSError):  # what it holds cannot be written by its end either
        full.close()
    assert capfd.readouterr().err == "is seen\n"


def test_a_program_may_keep_a_runs_streams_and_have_none(tmp_path, monkeypatch):
    """A logging handler that a hook has made, another program's stream in its place, and none at all."""
    monkeypatch.setattr(sys, "stdout", own := io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    with logged(tmp_path, Rank(0)):
        kept = sys.stdout
        print("within")
        print("nowhere", file=sys.stderr)
    kept.write("afterwards\n")
    assert own.getvalue() == "within\nafterwards\n" and sys.stdout is own and sys.stderr is None
    assert "nowhere\n" in (tmp_path / "log.txt").read_text() and "afterwards" not in (tmp_path / "log.txt").read_text()
    with logged(tmp_path, Rank(0)):
        sys.stdout = others = io.StringIO()
    assert sys.stdout is others


LEAVES = {"message": "rank 0 leaves at epoch 1/2, step 3/4 of runs/a on SIGINT", "code": 75, "signal": "SIGINT"}
LOST = {"message": "rank 1 has lost contact to another rank", "code": 75, "signal": "", "lost_contact": True}
TOLD_BY_TORCHRUN = {"message": "rank 0 leaves on SIGTERM while starting", "code": 75, "signal": "SIGTERM"}
HANGS = {"message": "rank 0: no progress for 900 s in 'step 7'; rank 1 is behind", "code": 75}


@pytest.mark.parametrize(
    ("words", "failed", "asked", "code", "line"),
    [
        ([LOST, {"message": "a.jpg is damaged", "code": 2}], {0: 75}, None, 2, "error: a.jpg is damaged"),
        ([LEAVES, LEAVES], {}, 2, 75, f"interrupted: {LEAVES['message']}; start the same command again to go on"),
        ([LOST, LEAVES], {0: 75}, None, 75, f"interrupted: {LEAVES['message']}; start the same command again to go on"),
        ([LOST], {1: -9}, None, 137, "interrupted: rank 1 was ended by SIGKILL, often for lack of memory; start the same"),
        ([TOLD_BY_TORCHRUN], {0: 75, 1: -9}, None, 137, "interrupted: rank 1 was ended by SIGKILL"),
        ([HANGS], {0: 75, 1: -9}, None, 75, f"interrupted: {HANGS['message']}; start"),  # torchrun has killed rank 1
        ([{**LOST, "signal": "SIGTERM"}, HANGS], {0: 75, 1: 75}, None, 75, f"interrupted: {HANGS['message']}; start"),
        ([LOST, {"message": "Traceback\nValueError: bug", "code": 1}], {1: 1}, None, 1, "error: rank 1 failed with"),
        ([], {}, 2, 130, ""),  # Ctrl-C while ranks start
        ([], {}, 15, 143, "interrupted: the ranks were ended by SIGTERM"),
        ([], {0: 3}, None, 3, "error: rank 0 ended with exit code 3"),
    ],
)  # fmt: skip
def test_what_torchruns_report_is_in_one_line(words, failed, asked, code, line):
    import signal

    found = outcome(words, failed, asked and signal.Signals(asked))
    assert found[0] == code and found[1].startswith(line) and "\n" not in found[1] and bool(found[1]) == bool(line)
