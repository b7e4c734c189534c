"""The benchmark as a user runs it, its arithmetic, and what it refuses to compare."""

import dataclasses
import functools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.command import exit_on_user_error
from pipeline.errors import UserError
from pipeline.models import create_model
from tools.lab import benchmark
from tools.lab.benchmark import (
    MODELS,
    PEERS,
    TASKS,
    Implementation,
    Workload,
    create_timm,
    create_torchvision,
    main,
    prepare,
    time_implementations,
)
from tools.lab.benchmark_report import BASELINE, growth, summarise

pytestmark = pytest.mark.slow  # for the most part

IMPLEMENTATIONS = {
    "step": [
        BASELINE,
        "torchvision memory_efficient",
        "timm channels_last",
        "eager",
        "fused",
        "memory_efficient, checkpointing all",
    ],
    "inference": [BASELINE, "torchvision channels_last", "eager", "fused", "memory_efficient"],
}
WORKLOAD = Workload("step", "densenet_bc40_k12", 2, 16, "fp32", "cpu")


def run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, words)])
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FREEZING"):
        monkeypatch.setenv(name, "")  # what the tool sets goes with the patch
    exit_on_user_error(main)


@pytest.fixture
def one_core():
    """On a busy machine threads that wait for each other would take a minute."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("task", IMPLEMENTATIONS)
def test_the_files_can_be_read(monkeypatch, tmp_path, capsys, one_core, task):
    words = ["--models", "densenet_bc40_k12", "--size", 16, "--batch-sizes", 2, 3, "--repeats", 2, "--no-compile"]
    run(monkeypatch, task, *words, "--implementations", *IMPLEMENTATIONS[task][1:], "--output", tmp_path)
    found = json.loads((tmp_path / f"benchmark-{task}.json").read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [measured["batch_size"] for measured in found["tables"]] == [2, 3]
    for measured in found["tables"]:
        rows = {row["implementation"]: row for row in measured["rows"]}
        assert [*rows, *measured["left_out"]] == IMPLEMENTATIONS[task]
        assert [name for name, row in rows.items() if row["peer"]] == [name for name in rows if name in PEERS]
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
        assert all(row["memory_bytes"] > 2**20 and row["first_call_s"] > 0 for row in rows.values())
    text = (tmp_path / f"benchmark-{task}.md").read_text()
    assert text in capsys.readouterr().out
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == sum(2 + len(measured["rows"]) for measured in found["tables"])
    for name in (f"benchmark-{task}.png", f"benchmark-{task}-growth.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.parametrize("task", TASKS)
def test_in_bf16_all_run_under_the_same_autocast(one_core, task):
    names = [BASELINE, "torchvision channels_last", "eager", "fused"]
    workload = dataclasses.replace(WORKLOAD, task=task, precision="bf16", batch_size=8)
    rows, left_out = time_implementations(workload, names, repeats=1)
    assert [row["implementation"] for row in rows] == names and not left_out
    for name in names:
        network, run = prepare(workload, name)
        seen = set()
        network.features.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
        run()
        assert seen == {torch.bfloat16}, name


def test_ratios_are_to_the_peer_with_the_smallest_median():
    rows = [
        {"implementation": BASELINE, "peer": True, "seconds": [4.0, 4.0, 4.0], "memory_bytes": 200},
        {"implementation": "best", "peer": True, "seconds": [3.0, 1.0, 2.0], "memory_bytes": 300},
        {"implementation": "ours", "peer": False, "seconds": [1.0, 1.0, 8.0], "memory_bytes": 50},
    ]
    baseline, best, ours = summarise(rows, batch_size=6)
    assert [row["best_peer"] for row in (baseline, best, ours)] == [False, True, False]
    assert (ours["median_s"], ours["images_per_s"], ours["memory_ratio"]) == (1, 6, 0.25)
    assert ours["ratio"] == 1  # the median of 3, 1 and 1/4; that of the medians would be 2
    assert (baseline["ratio"], best["ratio"], best["memory_ratio"]) == (0.5, 1, 1.5)


def test_lines_join_batches_of_a_network_and_depths_of_a_family():
    def table(model: str, batch_size: int) -> dict:
        return {"model": model, "batch_size": batch_size, "size": 224, "precision": "fp32", "rows": []}

    found = growth([table("densenet264", 4), table("densenet121", 8), table("densenet161", 4), table("densenet121", 4)])
    assert [(x, [position for position, _ in points]) for _, x, points in found] == [
        ("batch size", [4, 8]),
        ("depth", [121, 264]),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_peers_have_the_parameters_of_our_networks(name):
    with torch.device("meta"):
        ours, *peers = (create(name, num_classes=10) for create in (create_model, create_torchvision, create_timm))
    for peer in peers:
        shapes = [(key, tensor.shape) for key, tensor in peer.state_dict().items()]
        assert shapes == [(key, tensor.shape) for key, tensor in ours.state_dict().items()]


def replace(monkeypatch, name: str, **options: object) -> None:
    implementation = Implementation(functools.partial(create_model, **options))
    monkeypatch.setitem(benchmark.IMPLEMENTATIONS, name, implementation)


def test_an_implementation_with_another_loss_is_refused(monkeypatch, one_core):
    replace(monkeypatch, "eager", dense_block="eager", dropout=0.5)
    with pytest.raises(UserError, match=f"16 px, fp32: loss of 'eager' and '{BASELINE}' differ"):
        time_implementations(WORKLOAD, [BASELINE, "eager"], repeats=1)


def test_an_implementation_with_other_gradients_is_refused(monkeypatch, one_core):
    def create(*arguments: object, **options: object) -> torch.nn.Module:
        network = create_model(*arguments, **options, dense_block="eager")
        network.features.transition1.register_full_backward_hook(lambda module, inputs, _: (0.5 * inputs[0],))
        return network

    monkeypatch.setitem(benchmark.IMPLEMENTATIONS, "eager", Implementation(create))
    with pytest.raises(UserError, match=f"fall of the loss by a step of 'eager' and '{BASELINE}' differ"):
        time_implementations(WORKLOAD, [BASELINE, "eager"], repeats=1)


def test_an_implementation_that_computes_in_another_way_is_left_out(monkeypatch, one_core):
    replace(monkeypatch, "fused", dense_block="fused", dropout=0.5)
    rows, left_out = time_implementations(WORKLOAD, [BASELINE, "eager", "fused"], repeats=1)
    assert [row["implementation"] for row in rows] == [BASELINE, "eager"] and "dropout" in left_out["fused"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "task"),
        (["training"], "invalid choice: 'training' (choose from 'step', 'inference')"),
        (["step", "--models", "densnet121"], "--models: invalid choice: 'densnet121'"),
        (["step", "--models", "densenet40_k12"], "--models: invalid choice: 'densenet40_k12'"),
        (["step", "--batch-sizes", "16", "0"], "--batch-sizes: a positive number is needed (got '0')"),
        (["step", "--size", "48"], "--size 48: densenet121 needs 64 pixels or more"),
        (["step", "--precision", "int8"], "--precision/--precisions: invalid choice: 'int8'"),
        (
            ["inference", "--implementations", "fused, checkpointing all"],
            "--implementations: 'fused, checkpointing all' takes no part in inference",
        ),
        (["step", "--output", "{folder}/file/results"], "cannot write into --output"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, tmp_path, capfd, words, complaint):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *(word.format(folder=tmp_path) for word in words))
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and complaint in lines[0], lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "step", "--device", "cuda")
