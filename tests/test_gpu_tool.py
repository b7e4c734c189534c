"""tools.gpu on CPU: every check runs, fails on what is broken, and is skipped aloud where a package is missing."""

import json
import logging
import multiprocessing
import os
import subprocess
import time
import types

import pytest
import torch

from pipeline.cuda_graphs import ReplayedNetwork
from pipeline.models import memory_efficient
from pipeline.run import OptimizerState, Run
from tools import gpu
from tools.lab import scaling
from tools.support import gpu_speed
from tools.support.gpu_checks import CHECKS, GROUPS, dali, environment, graphs, networks, ranks, runs, triton
from tools.support.gpu_checks.check import Check, Finding, Setting

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored_kernels():
    """The checks set TF32, as each run does."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(CPU, tmp_path / "work", time.monotonic() + 1800)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a run of the whole command on CPU, and what it prints."""
    file = tmp_path_factory.mktemp("gpu") / "new" / "gpu.json"
    logging.disable(logging.DEBUG)  # torch.compile notes much there, which pytest would keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gpu", "--device", "cpu", "--json", str(file), "--minutes", "30"])
        gpu.main()
    logging.disable(logging.NOTSET)
    return file


def test_all_checks_run_on_the_cpu_or_say_why_they_cannot(measured):
    outcomes = json.loads(measured.read_text())
    assert outcomes["device"] == "cpu"
    found = {(row["group"], row["check"]): row for row in outcomes["checks"]}
    assert list(found) == [(check.group, check.title) for check in CHECKS]
    skipped = {title for (_, title), row in found.items() if row["status"] == "skipped" and row["text"]}
    of_a_gpu = {
        "launches of a step",
        "a killed rank",
        "CUDA graphs",
        "DALI's memory",
        "Triton kernels",
        "compute-sanitizer",
    }
    without_packages = {title for (_, title), row in found.items() if "is not installed" in row["text"]}
    assert skipped == of_a_gpu | without_packages
    assert {title for (_, title), row in found.items() if row["status"] != "ok"} == skipped
    assert all(row["text"] for row in found.values())
    page = measured.with_suffix(".md").read_text()
    assert all(f"| {group} | {title} " in page for group, title in found)
    assert "| densenet_bc10_k3 | fused " in page and " compiled (" not in page
    (speed,) = [row for row in outcomes["checks"] if row["check"] == "speed"]
    speed["figures"]["rows"][0]["compile"] = "default"
    assert "| densenet_bc10_k3 | eager compiled (default) " in gpu.report(outcomes)


def test_scaling_takes_a_gpus_speeds_and_refuses_a_cpus(measured, tmp_path, monkeypatch, capfd, user_error):
    monkeypatch.setattr(scaling, "MODELS", ("densenet121",))
    assert "was measured on a cpu" in user_error(scaling.main, "--measured", measured)
    results = json.loads(measured.read_text())
    (speed,) = [row for row in results["checks"] if row["check"] == "speed"]
    rows = [row for row in speed["figures"]["rows"] if row["implementation"] == "fused"]
    for row in rows:
        row |= {"model": "densenet121", "precision": "bf16", "seconds": 0.02 + row["batch_size"] / 400}
    slow = [{**row, "implementation": "eager", "seconds": 2 * row["seconds"]} for row in rows]
    slow.append(
        {**rows[0], "compile": "reduce-overhead", "seconds": rows[0]["seconds"] / 9}
    )  # another line: of one batch
    peer = [{**row, "implementation": "timm", "seconds": row["seconds"] / 9} for row in rows]
    speed["figures"]["rows"] = rows + slow + peer
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**results, "device": "cuda"}))
    line = scaling.read_measured(file, "bf16")["densenet121"]
    assert (line.launch, line.speed) == pytest.approx((0.02, 400)) and "fused" in line.source
    monkeypatch.setattr("sys.argv", ["scaling", "--measured", str(file)])
    scaling.main()
    printed = capfd.readouterr().out
    assert "densenet121: 400 images/s and 20.0 ms a step, measured: fused" in printed
    machines = scaling.Machines(8, 200e9, 25e9, 1e-5, 0.02, 2000, 1 / 0.3e9)
    alone = 256 / scaling.step_time(1, 256, 7_978_856, 400, machines).total
    (row,) = [
        row for row in printed.splitlines() if row.startswith("| densenet121 ") and " 256 |" in row and " 1 |" in row
    ][:1]
    assert f" {alone:,.0f} |" in row
    assert "has no network of ours in fp32" in user_error(scaling.main, "--measured", file, "--precision", "fp32")
    for text in ("{}", "[]", "no JSON"):
        file.write_text(text)
        assert "is no JSON of python -m tools.gpu" in user_error(scaling.main, "--measured", file)
    assert "No such file" in user_error(scaling.main, "--measured", tmp_path / "none.json")


def one(title: str) -> Check:
    (check,) = [check for check in CHECKS if check.title == title]
    return check


@pytest.mark.parametrize(
    ("title", "owner", "name", "wrong"),
    [
        ("TF32 flags", environment, "set_tf32", lambda precision: None),
        ("activation checkpointing", memory_efficient, "stage", None),
        ("precisions against float64", memory_efficient, "stage", None),
        ("cut and resumed", OptimizerState, "load_state_dict", lambda self, state: None),
        ("overflow in fp16", runs, "create_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False)),
        ("out of memory", runs, "is_out_of_memory", lambda error: False),
        ("two ranks on one device", ranks, "half_of", lambda setting, _: networks.some_images(setting)),
        ("waits of the host", Run, "count", lambda self, outcomes: outcomes[0][2].sum().item()),
        ("CUDA graphs in runs", Run, "seed_dropout", lambda self, microbatch: torch.seed()),
        ("DALI and odd images", dali, "NEAR", 1e-9),
    ],
)  # fmt: skip
def test_a_check_fails_on_what_is_broken(monkeypatch, setting, title, owner, name, wrong):
    right = getattr(owner, name)

    def off(x, stage):
        return right(x, stage) * (1.5 + stage.recompute)

    setting.folder.mkdir()
    monkeypatch.setattr(owner, name, wrong or off)
    outcome = one(title).run(setting)
    assert outcome["status"] == "FAIL" and outcome["text"], outcome


def test_a_process_of_its_own_tells_how_far_a_product_is_off():
    """As on a GPU, where torch reads NVIDIA's variable at its start."""
    assert 0 < environment.product_error_apart("cpu", "1") < 1e-6


def test_float64_is_compared_to_ten_digits(monkeypatch, setting):
    stage = memory_efficient.stage
    monkeypatch.setattr(memory_efficient, "stage", lambda x, part: stage(x, part) * (1 + 1e-8))
    outcome = one("float64 as torchvision").run(setting)
    assert outcome["status"] == "FAIL" and "memory_efficient" in outcome["text"]


def test_without_the_larger_packages_their_checks_are_skipped_and_the_others_run(monkeypatch, tmp_path, setting):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('pydantic', 'submitit') or name.startswith('nvidia.dali'):\n"
        "            raise ModuleNotFoundError(f'no {name}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    rows = gpu.run_apart("G3", setting)
    assert [row["status"] for row in rows] == ["skipped", "skipped", "ok", "ok"], rows
    assert all("pydantic is not installed" in row["text"] for row in rows[:2])


def fine(setting):
    return Finding("fine")


def test_a_group_that_crashes_or_hangs_costs_no_other(monkeypatch, setting):
    monkeypatch.setattr(gpu, "PROCESSES", multiprocessing.get_context("fork"))  # spawned ones load torch, for seconds
    monkeypatch.setattr(gpu, "MARGIN", 0.0)

    def hang(setting):
        setting.keep(Finding("2 of 3", [1, 2]))
        left_behind = subprocess.Popen(["sleep", "3600"])
        (setting.folder / "pid").write_text(str(left_behind.pid))
        left_behind.wait()

    ends = {"crash": lambda setting: os._exit(3), "hang": hang}
    for name, end in ends.items():
        monkeypatch.setattr(gpu, "CHECKS", [Check("G1", "a", fine), Check("G1", name, end), Check("G1", "c", fine)])
        limit = time.monotonic() + (30 if name == "hang" else 1800)
        rows = gpu.run_apart("G1", Setting(CPU, setting.folder / name, limit))
        said = "its process ended with 3" if name == "crash" else "no time was left"
        assert [row["status"] for row in rows] == ["ok", "FAIL", "skipped"]
        kept = name == "hang"
        assert rows[1]["text"] == said + "; until then: 2 of 3" * kept and rows[2]["text"] == f"not reached: {said}"
        assert rows[1]["figures"] == ([1, 2] if kept else None)
    pid = int((setting.folder / "hang" / "pid").read_text())
    until = time.monotonic() + 1800
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)  # or it would keep the GPU's memory
    (row, *_) = gpu.run_apart("G1", Setting(CPU, setting.folder, time.monotonic() - 1))
    assert row["status"] == "skipped" and "--minutes" in row["text"]


def test_a_gpu_that_a_check_has_spoilt_is_told_once(monkeypatch, setting):
    monkeypatch.setattr(
        gpu, "CHECKS", [Check("G1", "a", fine), Check("G1", "b", lambda _: 1 / 0), Check("G1", "c", fine)]
    )
    assert [row["status"] for row in gpu.run_group("G1", setting)] == ["ok", "FAIL", "ok"]
    monkeypatch.setattr(gpu, "is_usable", lambda device: False)
    rows = gpu.run_group("G1", setting)
    assert [row["status"] for row in rows] == ["ok", "FAIL", "skipped"] and rows[2]["text"].endswith("any more after b")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_group_has_a_share_of_the_time_and_what_is_left_of_it_goes_on():
    ends = gpu.deadlines(GROUPS, 100.0, 480.0)
    assert ends["G9"] == pytest.approx(580) and list(ends) == GROUPS == list(gpu.SHARES)
    least = [b - a for a, b in zip([100.0, *ends.values()], ends.values(), strict=False)]
    assert min(least) > gpu.MARGIN + 10 and ends["G9"] - ends["G8"] > 90
    assert gpu.deadlines(["G9"], 0.0, 60.0) == {"G9": 60.0}


def test_a_check_begins_without_what_others_have_set(setting, monkeypatch):
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch._C._set_deterministic_algorithms(True)  # without the compiler that torch's own function imports

    def look(_):
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
        return Finding(f"{flags} {torch.are_deterministic_algorithms_enabled()}")

    assert Check("G1", "a", look).run(setting)["text"] == "(False, False) False"


def test_steps_that_are_compared_with_graphs_are_the_same_each_time(setting, monkeypatch):
    """Without graphs, of which there are none here."""
    monkeypatch.setattr(graphs, "SIDES", (32, 40))
    for dense_block in ("eager", "memory_efficient"):
        first, again = (graphs.graph_steps(setting, dense_block, "bf16", False, None, "none") for _ in range(2))
        assert len(first) > 100 and all(map(torch.equal, first, again))


def test_the_sanitizer_looks_at_each_tensor_by_itself_and_at_kernels_alone(monkeypatch, setting):
    asked = []

    def run(command, env, **_):
        asked.append((command, env))
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(triton.shutil, "which", lambda name: name)
    monkeypatch.setattr(triton.triton_block, "refusal", lambda device: "")
    monkeypatch.setattr(triton.subprocess, "run", run)
    outcome = one("compute-sanitizer").run(Setting(torch.device("cuda", 0), setting.folder, time.monotonic() + 9))
    ((command, environment),) = asked
    assert outcome["status"] == "skipped" and "--minutes" in outcome["text"]
    assert command[1:3] == ["--report-api-errors", "no"] and environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_launches_that_nobody_sees_are_none(monkeypatch):
    """Where a user may not read the GPU's counters torch's profiler gives no events."""

    class Profile:
        found: tuple = ()

        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return self.found

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_speed.count_launches(lambda: None) is None
    kinds = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    monkeypatch.setattr(Profile, "found", tuple(types.SimpleNamespace(device_type=kind) for kind in kinds))
    assert gpu_speed.count_launches(lambda: None) == 2


def test_a_network_in_graphs_is_captured_before_it_is_timed(monkeypatch):
    """It would be computed as it is, and the row would say otherwise."""
    captured = []
    monkeypatch.setattr(ReplayedNetwork, "capture", lambda self, x: captured.append(x.shape))
    gpu_speed.training_step(gpu_speed.Case("eager", "densenet_bc10_k3", "fp32", "contiguous", 2, 16, "graphs"), CPU)
    assert captured == [(2, 3, 16, 16)]


def test_what_is_measured_on_a_gpu_and_what_ends_it(monkeypatch):
    all_cases = list(gpu_speed.cases(torch.device("cuda")))
    assert len(set(all_cases)) == len(all_cases)
    assert {case.precision for case in all_cases} == {"fp32", "tf32", "bf16", "fp16"}
    compiled = [case for case in all_cases if case.compile not in ("none", "graphs")]
    assert {case.compile for case in compiled} == {"reduce-overhead"}

    def measure(case, device, deadline):
        if case.implementation == "triton":
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"case": case}

    kept = []
    monkeypatch.setattr(gpu_speed, "measure", measure)
    rows, left_out = gpu_speed.measure_speed(CPU, time.monotonic() + 1800, lambda rows, _: kept.append(len(rows)))
    assert [row["case"] for row in rows] == list(gpu_speed.cases(CPU)) and kept == [1, 2, 3] and not left_out
    monkeypatch.setattr(gpu_speed, "cases", lambda device: all_cases)
    rows, left_out = gpu_speed.measure_speed(CPU, time.monotonic() + gpu_speed.COMPILATION / 2)
    assert {str(tuple(case)) for case in compiled} < left_out.keys()  # nothing would end it in time
    assert len(rows) == sum(case.implementation != "triton" for case in all_cases) - len(compiled)
    monkeypatch.setattr(gpu_speed, "is_usable", lambda device: False)
    rows, left_out = gpu_speed.measure_speed(CPU, time.monotonic() + 1800)
    assert (
        len(rows) == 1 and sum("could not be used any more" in why for why in left_out.values()) == len(all_cases) - 2
    )


def test_a_compiled_step_is_compiled_for_its_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_speed, "compile_network", lambda network, *words: asked.append(words) or network)
    case = gpu_speed.Case("eager", "densenet_bc10_k3", "fp32", "contiguous", 3, 16, "default")
    gpu_speed.training_step(case, CPU)()
    assert asked == [("default", 3, 1)]


def test_a_failed_check_is_the_exit_code(monkeypatch, tmp_path, capfd, user_error):
    monkeypatch.setattr(gpu, "CHECKS", [Check("G1", "wrong", lambda setting: 1 / 0)])
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--groups", "G1", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1 and "ZeroDivisionError" in capfd.readouterr().out
    assert "has no GPU that torch can use; --device cpu" in user_error(gpu.main)
