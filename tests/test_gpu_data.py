"""The way of images onto a GPU, as far as a machine without one shows: DALI's graphs, nvJPEG's version, a thread's batches."""

import ctypes
import functools
import importlib.metadata
import itertools
import struct
import subprocess
import sys
import threading
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, index_of, photo

from pipeline import evaluation, nvjpeg
from pipeline.config import DataConfig
from pipeline.data import ahead, color, dali, decoding
from pipeline.data.ahead import on_own_stream, prepare_ahead
from pipeline.data.color import apply_colors, to_device
from pipeline.data.dali import CHECKED, UNTREATED, DaliPipeline, Fed
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.plan import training_plans
from pipeline.data.scan import scan_classes
from pipeline.errors import is_out_of_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def a_library(path, soname: str, version: tuple[int, int, int]) -> str:
    """A shared library that calls itself nvJPEG of this version."""
    source = (
        "int nvjpegGetProperty(int part, int *value) { static int v[] = {%d, %d, %d}; *value = v[part]; return 0; }"
    )
    path.with_suffix(".c").write_text(source % version)
    options = ["-shared", "-fPIC", f"-Wl,-soname,{soname}"]
    subprocess.run(["cc", *options, "-o", path, path.with_suffix(".c")], check=True)
    return str(path)


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_nvjpeg_that_another_package_loaded_first_is_the_one_that_decodes(monkeypatch, tmp_path, capsys, ours_first):
    """torchvision's file has a name of its own, and the soname for which nvImageCodec asks."""
    soname = f"libnvjpeg.so.test-{ours_first}"  # one that this process does not know
    ours = a_library(tmp_path / "libours.so", soname, (13, 3, 2))
    theirs = a_library(tmp_path / "libtheirs.36e11081.so", soname, (13, 0, 1))
    monkeypatch.setattr(nvjpeg, "NAME", soname)
    monkeypatch.setattr(nvjpeg, "installed_nvjpeg", lambda: ours)
    for load in [nvjpeg.load_nvjpeg.__wrapped__, lambda: ctypes.CDLL(theirs)][:: 1 if ours_first else -1]:
        load()
    nvjpeg.check_nvjpeg.__wrapped__()
    said = capsys.readouterr().err
    assert nvjpeg.nvjpeg_of_process() == ((ours, "13.3.2") if ours_first else (theirs, "13.0.1"))
    if ours_first:
        assert not said
    else:
        (line,) = said.splitlines()
        assert f"nvJPEG 13.0.1 ({theirs})" in line and line.endswith(f"start with LD_PRELOAD={ours}")


def test_this_package_loads_the_right_nvjpeg_before_it_imports_anything_else():
    """As seen in a process of its own, which loads torchvision's as `import torchvision` does."""
    theirs = next(Path(find_spec("torchvision").origin).parents[1].glob("torchvision.libs/libnvjpeg*"), None)
    if theirs is None:
        pytest.skip("this torchvision has none")
    script = (
        f"import pipeline, ctypes; ctypes.CDLL({str(theirs)!r}); from pipeline import nvjpeg; nvjpeg.check_nvjpeg(); "
        "print(nvjpeg.nvjpeg_of_process()[0] == nvjpeg.installed_nvjpeg())"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_machine_without_nvjpeg_is_told_that_the_cpu_decodes(monkeypatch, capsys):
    monkeypatch.setattr(nvjpeg, "NAME", "libnvjpeg.so.none")
    monkeypatch.setattr(nvjpeg, "installed_nvjpeg", lambda: None)
    nvjpeg.check_nvjpeg.__wrapped__()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no nvJPEG is found, without which DALI decodes JPEG images on the CPU")


def test_the_nvjpeg_of_the_requirements_loads(monkeypatch):
    """Loading it and asking for its version needs no GPU."""
    path = nvjpeg.installed_nvjpeg()
    files = importlib.metadata.files("nvidia-nvjpeg")
    assert path and path in [str(file.locate().resolve()) for file in files]
    monkeypatch.setattr(nvjpeg, "NAME", path)  # whatever else this process has loaded
    assert nvjpeg.nvjpeg_of_process() == (path, "13.3.2")


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("interpolation", list(dali.RESIZES))
def test_the_graph_for_a_gpu_decodes_as_asked(interpolation, views, share):
    """By default no image goes to the hardware decoder, whose pixels differ, and to which DALI gives a part of a batch."""
    config = DataConfig(interpolation=interpolation, **({"hw_decoder_load": share} if share else {}))
    pipeline = DaliPipeline(index_of([(40, 40)]), config, 1, GPU, 4, views)
    pipeline._options["device_id"] = None  # with a number DALI asks for the driver, though it builds nothing yet
    graph = pipeline._define().serialize()
    assert b"hw_decoder_load\x12\x05float\x1d" + struct.pack("<f", share) in graph
    assert b"\x05mixed" in graph
    assert b"decoders__Image\x12" in graph  # whole


@pytest.mark.parametrize("padding", [0, 8])
def test_a_region_of_a_whole_image_is_the_region(tmp_path, padding):
    """On GPU images are decoded whole, then cut; the same graph on CPU gives the same pixels as decoding regions."""
    (tmp_path / "a").mkdir()
    for i in range(6):
        photo(i, 70 + 9 * i, 90 - 7 * i).save(tmp_path / "a" / f"{i}.jpg")
    crop = {"train_crop": "random_crop", "padding": padding} if padding else {}
    index, config = scan_classes(tmp_path), DataConfig(crop_size=24, resize_size=28, **crop)
    options = dict(seed=1, epoch=0, first_step=0, batch_size=6, rank=0, ranks=1, accumulation=1)
    plans = list(training_plans(index, config, **options))
    found = []
    for regions in (True, False):
        pipeline = DaliPipeline(index, config, 1, CPU, 6, 1)
        pipeline._decodes_regions = regions
        found.append(torch.cat([pixels.clone() for _, pixels in pipeline.run(plans)]))
    assert torch.equal(*found)


def test_a_corrupt_image_changes_no_other_images_decoder(monkeypatch, tmp_path):
    """On a GPU Pillow's pixels are others than DALI's, so that an image would depend on its batch."""
    (tmp_path / "a").mkdir()
    for i in range(8):
        photo(i, 40, 40).save(tmp_path / "a" / f"{i}.jpg")
    index = scan_classes(tmp_path)
    (tmp_path / "a" / "3.jpg").write_bytes(b"no image" * (index.lengths[3] // 8) + b"x" * (index.lengths[3] % 8))
    monkeypatch.setattr(decoding, "is_plain", lambda content: True)  # so that DALI meets it
    monkeypatch.setattr(dali, "as_ppm", lambda *_: pytest.fail("Pillow has decoded a sound image"))
    config = DataConfig(crop_size=24, resize_size=28, loader="dali", corrupt_images="skip")
    loader = TrainingLoader(index, config, Shard(0, 1, CPU, 1), seed=1, batch_size=8, accumulation=1)
    (batch,) = loader.batches(0)
    assert batch.weights.sum() == 7


@pytest.mark.parametrize(
    "text",
    [
        "Critical error in pipeline: Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`: CUDA allocation failed",
        "Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`: Can't allocate 1000000 bytes on device 0.",
        "Error in GPU operator `nvidia.dali.fn.resize`: CUDA runtime API error cudaErrorIllegalAddress (700)",
    ],
)
def test_what_is_no_images_fault_is_not_taken_for_a_bad_image(text):
    pipeline = DaliPipeline(index_of([(40, 40)]), DataConfig(), 1, CPU, 4, 1)
    (plan,) = itertools.islice(plans_of(1), 1)
    pipeline._pending.append(Fed(plan, [np.zeros(9, np.uint8)], UNTREATED))
    error = RuntimeError(text)
    with pytest.raises(RuntimeError) as raised:
        pipeline._feed_again(error)
    assert raised.value is error and is_out_of_memory(error) == ("alloc" in text)


def test_a_batch_that_waits_for_its_turn_is_treated_once(monkeypatch):
    """Of the batches in flight those that Pillow has looked at least go first."""
    pipeline = DaliPipeline(index_of([(40, 40)] * 2), DataConfig(), 1, CPU, 1, 1)
    first, second = plans_of(2)
    looked = []
    monkeypatch.setattr(dali, "if_decodable", lambda content, place: looked.append(place) or content)
    pipeline._pending.extend([Fed(first, [np.zeros(1)], CHECKED), Fed(second, [np.zeros(1)], UNTREATED)])
    pipeline._feed_again(RuntimeError("in decoders.image_slice"))
    assert [batch.treatment for batch in pipeline._batches] == [CHECKED, CHECKED] and len(looked) == 1


def plans_of(images: int):
    options = dict(seed=1, epoch=0, first_step=0, batch_size=1, rank=0, ranks=1, accumulation=1)
    return list(training_plans(index_of([(40, 40)] * images), DataConfig(), **options))


class OnlyShapes(torch.nn.Module):
    """Fails as a GPU would, for a reason that is not the size of the images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if not x.is_meta:
            raise RuntimeError("CUDA error: out of memory")
        return x


def test_an_error_of_the_gpu_is_not_taken_for_a_wrong_crop_size():
    evaluation.check_image_size(OnlyShapes(), 32, "it")


def test_dali_hands_batches_over_on_the_present_stream_and_in_its_own_memory(monkeypatch):
    pipeline = DaliPipeline(index_of([(40, 40)]), DataConfig(crop_size=2, resize_size=2), 1, CPU, 1, 1)
    memory, streams = np.zeros((1, 2, 2, 3), np.float32), []
    output = types.SimpleNamespace(as_tensor=lambda: memory)

    def run(stream):
        if streams:
            raise StopIteration
        streams.append(stream)
        pipeline._pending.append(Fed(plans_of(1)[0], [], UNTREATED))
        return (output,)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(pipeline, "_build", lambda: types.SimpleNamespace(run=run, reset=lambda: None))
    pipeline._on_gpu, pipeline._device = True, GPU
    ((_, pixels),) = pipeline.run([])
    assert streams == [("stream of", GPU)] and pixels.data_ptr() == memory.ctypes.data


def test_batches_are_made_ahead_in_their_order_and_an_error_comes_in_its_place():
    makers = []

    def items():
        for i in range(5):
            makers.append(threading.current_thread())
            yield i
        raise OSError("at the end")

    found = prepare_ahead(items())
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="at the end"):
        next(found)
    assert threading.main_thread() not in makers and not makers[0].is_alive()


def test_batches_that_nobody_wants_any_more_end_the_thread():
    closed = threading.Event()

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    found = prepare_ahead(items())
    assert next(found) == 0
    found.close()
    assert closed.is_set() and not any(thread.name == "batches" for thread in threading.enumerate())


def test_the_callers_stream_waits_for_a_batch_and_its_memory_for_the_caller(monkeypatch):
    """torch.cuda is a stub that notes who does what."""
    notes: list = []
    inside = threading.local()

    class Context:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            inside.what = [*getattr(inside, "what", []), self.what]

        def __exit__(self, *_):
            inside.what = inside.what[:-1]

    class Event:
        def record(self, stream):
            notes.append(("recorded", stream))

    class Values:
        def record_stream(self, stream):
            notes.append(("kept for", stream))

    class Current(str):
        def wait_event(self, event):
            notes.append(("waits", self))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: notes.append("stream") or "own")
    monkeypatch.setattr(ahead, "stream_for_batches", functools.cache(ahead.stream_for_batches.__wrapped__))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Context)
    monkeypatch.setattr(torch.cuda, "stream", Context)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current("training"))
    monkeypatch.setattr(ahead, "DEPTH", 1)

    def items():
        for _ in range(2):
            notes.append(("made on", *inside.what))
            yield Values()

    assert len(list(on_own_stream(items(), lambda item: [item], GPU))) == 2
    assert not getattr(inside, "what", [])  # the caller is on no other stream than before
    assert notes.count(("made on", GPU, "own")) == 2 == notes.count(("waits", "training"))
    assert notes.index(("made on", GPU, "own")) < notes.index(("recorded", "own")) < notes.index(("waits", "training"))
    assert notes[-1] == ("kept for", "training")
    list(on_own_stream(items(), lambda item: [item], GPU))
    assert notes.count("stream") == 1  # a pool keeps memory for each


def test_colours_are_mapped_in_float32_whatever_autocast_is_entered():
    (plan,) = plans_of(1)
    pixels = torch.rand(1, 1, 8, 8, 3) * 255
    expected = apply_colors(pixels, plan, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_colors(pixels, plan, CPU), expected)


@pytest.mark.parametrize("side", [8, 17])
def test_colours_as_a_gpu_computes_them_are_the_cpus(side, monkeypatch):
    """Its way of computing is taken here on CPU, by a device that only says that it is a GPU."""
    monkeypatch.setattr(color, "to_device", lambda source, device: torch.as_tensor(source))
    for plan in plans_of(4):
        assert plan.mean_color.any()
        pixels = torch.rand(1, 2, side, side, 3) * 255
        expected, found = (color._mapped(pixels, plan, device) for device in (CPU, types.SimpleNamespace(type="cuda")))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_copied_to_a_gpu_is_pinned_first(monkeypatch):
    notes = []

    class Pinned:
        def to(self, device, non_blocking):
            notes.append((device, non_blocking))
            return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned())
    to_device(np.zeros(3), GPU)
    to_device(torch.zeros(3), GPU)
    assert notes == [(GPU, True)] * 2
    assert to_device(np.zeros(3), CPU).device == CPU
