"""Names in little memory, and one copy of an index for the ranks of a machine."""

import json
import os

import numpy as np
import pytest
from conftest import run_module

from pipeline.data.names import AT_ONCE, Names
from pipeline.data.scan import scan_classes


def test_names_are_those_of_a_tuple():
    expected = ("a", "", "ä/b.jpg", os.fsdecode(b"\xff.png"), "last")
    names = Names.of(expected)
    assert names == expected and tuple(names) == expected and len(names) == 5
    assert names != expected[::-1] and names != Names.of(expected[:4]) and names == Names.of(list(expected))
    assert [names[i] for i in range(-5, 5)] == [*expected, *expected]
    for part in (slice(1, 4), slice(None, None, 2), slice(4, 1), slice(-2, None), slice(0, 0)):
        assert tuple(names[part]) == expected[part]
    assert tuple(names.take(np.array([3, 0, 3]))) == (expected[3], expected[0], expected[3])
    with pytest.raises(IndexError):
        names[5]
    joined = Names.joined([names, Names.of([]), names])
    assert joined == (*expected, *expected) and Names.joined([]) == ()
    assert tuple(Names.of([])) == () and names.index("last") == 4 and "ä/b.jpg" in names
    many = [f"name{i}" for i in range(AT_ONCE + 3)]
    assert list(Names.of(many)) == many


@pytest.mark.slow
def test_ranks_map_one_file_that_is_gone_afterwards(image_folders, tmp_path, monkeypatch):
    """Also where the second rank is on another machine, which gets a file of its own, and where no file can be written."""
    monkeypatch.setenv("INDEX_FOLDER", str(tmp_path))
    result = run_module("tests.index_on_ranks", image_folders / "train", ranks=2)
    assert result.returncode == 0, result.stderr
    expected = scan_classes(image_folders / "train")
    found = sorted(json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))
    known = [len(expected), expected.fingerprint, expected.names[-1], int(expected.labels.sum())]
    cases = (("no room", "bytes"), ("one machine", "mmap"), ("two machines", "mmap"))
    assert [row[:-1] for row in found] == [[case, rank, *known, kind] for case, kind in cases for rank in range(2)]
    files = {case: [row[-1] for row in found if row[0] == case] for case, _ in cases}
    assert files["no room"] == [0, 0] and files["one machine"] == [files["one machine"][0]] * 2
    assert 0 not in files["one machine"] and len({0, *files["two machines"]}) == 3  # a file each
    assert not list(tmp_path.iterdir())
