"""Numbers and the words that go with them, in messages of all kinds."""

import dataclasses

import pytest
from conftest import small_config

from launch.__main__ import report
from launch.after import decide
from launch.cluster import Cluster
from launch.records import Job
from pipeline.audit import AuditRow, audit, count_differences
from pipeline.cautions import poor_split
from pipeline.words import agreed, counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 epochs"), (1, "1 epoch"), (1.0, "1 epoch"), (0.5, "0.5 epochs"), (1000, "1,000 epochs")]
)
def test_a_noun_follows_its_number(number, text):
    assert counted(number, "epoch") == text and agreed(number, "is", "are") == ("is" if number == 1 else "are")


def test_one_has_no_plural_in_a_message(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1, "schedule": "cosine"})
    here = {row.part: row.here for row in audit(config, 1)}
    assert here["learning-rate schedule"] == "cosine over 1 epoch"
    rows = [AuditRow("a", "1", "1", True, ""), AuditRow("b", "1", "2", False, "")]
    assert count_differences(rows) == "1 of 2 parts differs from the paper"
    assert "leaves each rank 1 image at once" in poor_split(8, 8, 1)
    assert decide("failed", 1, [], "c", 1)[1] == "1 failure in a row without a new checkpoint"


@pytest.mark.parametrize(
    ("parallel", "words"), [(1, "those before it have ended"), (2, "fewer than 2 of those before it train")]
)
def test_when_a_run_of_several_begins(tmp_path, capsys, parallel, words):
    configs = [small_config(tmp_path / str(i)) for i in range(3)]
    jobs = [Job(str(i), "local", "here", "logs") for i in range(3)]
    report(configs, jobs, dataclasses.replace(Cluster(kind="local"), parallel=parallel))
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(f"; begins when {words} (--parallel)") for line in lines] == [i >= parallel for i in range(3)]
