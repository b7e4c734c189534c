"""The native loader: exact to the bit where Pillow rounds, refused where Pillow refuses, in every build and by any threads."""

import ctypes
import dataclasses
import functools
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, photo, small_config
from PIL import Image

from pipeline import cpp, trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config import DataConfig
from pipeline.data import native
from pipeline.data.color import apply_colors
from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.formats import is_plain
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import (
    EvaluationLoader,
    Shard,
    TrainingLoader,
    choose_common_loader,
    choose_loader,
    create_image_pipeline,
)
from pipeline.data.plan import BatchPlan, evaluation_plans
from pipeline.data.reference import PILLOW_FILTERS, resize_as_torch7
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from pipeline.run import Run
from pipeline.start import find_start

reason = native.unavailable_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
SMALL = DataConfig(crop_size=24, resize_size=28, loader="native")
BUILDS: list[list[str]] = [[]]
if platform.machine() == "x86_64":
    BUILDS += [["-mno-avx512f"], ["-march=x86-64", "-O1"]]  # AVX2, SSE2


@functools.cache
def build(*flags: str) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_cpp", functools.partial(cpp.load_cpp, flags=[*cpp.FLAGS, *flags]))
        return native.load.__wrapped__()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> DatasetIndex:
    """JPEGs with every subsampling that Pillow writes, progressive, with restarts, gray; a PNG, a CMYK JPEG; some tiny."""
    root = tmp_path_factory.mktemp("photos")
    (root / "a").mkdir()
    for i in range(24):
        height, width = (90 + 13 * (i % 6), 100 + 17 * (i % 5)) if i % 4 else (1 + i // 3, 2 + i % 7)
        image = photo(i, max(height, 2), max(width, 2)).crop((0, 0, width, height))
        image = image.convert("L") if i % 7 == 3 else image
        options = {"subsampling": i % 3, "progressive": i % 5 == 1, "restart_marker_blocks": 3 * (i % 3)}
        image.save(root / "a" / f"{i:02d}.jpg", quality=70 + i, **options)
    photo(51, 80, 70).convert("CMYK").save(root / "a" / "cmyk.jpg")
    photo(52, 70, 80).save(root / "a" / "image.png")
    return scan_classes(root)


@pytest.mark.slow
def test_more_files_than_a_process_may_have_open_at_first(photos, tmp_path):
    """Each thread has some open."""
    script = (
        "import resource, sys, torch; most = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, most));"
        "from pipeline.config import DataConfig; from pipeline.data.loader import EvaluationLoader, Shard;"
        "from pipeline.data.scan import scan_classes; config = DataConfig(crop_size=24, resize_size=28, loader='native');"
        "shard = Shard(0, 1, torch.device('cpu'), 40);"
        "loader = EvaluationLoader(scan_classes(sys.argv[1]), config, shard, batch_size=26, crops=1);"
        "print(sum(len(batch.ids) for batch in loader.batches()), resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 160)"
    )
    done = subprocess.run([sys.executable, "-c", script, photos.root], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == f"{len(photos)} True\n", done.stderr


@pytest.mark.slow
def test_threads_do_not_keep_the_memory_of_a_huge_image(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (9000, 6000), 90).convert("RGB").save(tmp_path / "a" / "huge.jpg")
    photo(1, 40, 40).save(tmp_path / "a" / "small.jpg")
    index = scan_classes(tmp_path)
    memory = []
    for row in (1, 0, 1):
        one = dataclasses.replace(CPU, threads=1)
        loader = EvaluationLoader(index.take(np.array([row])), SMALL, one, batch_size=1, crops=1)
        assert len([*loader.batches()]) == 1
        memory.append(int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
    before, huge, after = memory
    assert huge - before > 60 and after - before < 20  # MiB


def random_plan(index: DatasetIndex, crop: int, views: int, seed: int, n: int = 30) -> BatchPlan:
    """Any boxes, sizes, views (one of which may reach outside of the image), and colours."""
    random = np.random.default_rng(seed)
    ids = np.concatenate([np.arange(len(index)), random.integers(0, len(index), n)])
    n = len(ids)
    sides = index.sizes[ids]
    shape = np.maximum(1, (sides * random.random((n, 2))).astype(int))
    corner = (random.random((n, 2)) * (sides - shape + 1)).astype(int)
    sizes = random.integers(crop if views > 1 else 1, 3 * crop, (n, 2))
    sizes[::7, 0] = np.maximum(crop, sides[::7, 0] // 9)  # much lower: Pillow may go down first
    around = 5 if views == 1 else 0
    places = np.maximum(sizes - crop, 0)[:, None] + 2 * around + 1
    return BatchPlan(
        ids=ids,
        weights=np.ones(n, np.float32),
        crop_boxes=np.concatenate([corner, shape], axis=1).astype(np.int32),
        sizes=sizes.astype(np.int32),
        offsets=(random.random((n, views, 2)) * places).astype(np.int32) - np.int32(around),
        hflip=random.random((n, views)) < 0.5,
        color=random.normal(size=(n, 3, 3)).astype(np.float32),
        mean_color=random.normal(size=(n, 3, 3)).astype(np.float32),
        shift=random.normal(size=(n, 3)).astype(np.float32),
    )


def results(index, config, plan, views):
    """The plan's pixels and its coloured images, by the native loader and by the reference."""
    ours, reference = (
        create_image_pipeline(index, dataclasses.replace(config, loader=name), CPU, len(plan), views)
        for name in ("native", "reference")
    )
    ((_, pixels),), ((_, images),) = ours.run([plan]), ours.run_with_colors([plan])
    ((_, expected),) = reference.run([plan])
    return pixels, images, expected, apply_colors(expected, plan, torch.device("cpu"))


# In units of 1/255: the goal is 1e-3 for Torch7's filter, border included, and no byte for Pillow's.
@pytest.mark.parametrize("interpolation", native.FILTERS)
@pytest.mark.parametrize("views", [1, 3])
def test_any_crop_is_the_references(photos, interpolation, views):
    for seed, crop in enumerate((7, 56, 16)):
        config = DataConfig(crop_size=crop, resize_size=crop, interpolation=interpolation, train_crop="random_crop")
        pixels, images, expected, coloured = results(photos, config, random_plan(photos, crop, views, seed), views)
        if interpolation == "torch7-bicubic":
            torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-4)
        else:
            assert torch.equal(pixels, expected)
        torch.testing.assert_close(images, coloured, rtol=1e-5, atol=1e-5)
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("flags", BUILDS, ids=" ".join)
def test_resizes_in_every_build(flags):
    library, random = build(*flags), np.random.default_rng(0)
    shapes = [(1, 1), (1, 9), (2, 3), (3, 2), (4, 5), (60, 61), (17, 200), (300, 7)]
    for height, width in [*shapes, *random.integers(1, 200, (40, 2)).tolist()]:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        size = tuple(random.integers(1, 90, 2).tolist())
        actual = native.resized(library, image, size, "torch7-bicubic")
        expected = resize_as_torch7(np.asarray(image, np.float32), *size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4, err_msg=f"{(height, width)} to {size}")
        for interpolation, kernel in PILLOW_FILTERS.items():
            expected = np.asarray(image.resize(size[::-1], kernel))
            actual = native.resized(library, image, size, interpolation)
            np.testing.assert_array_equal(actual, expected, f"{(height, width)} to {size}, {interpolation}")


@pytest.mark.parametrize("flags", BUILDS[1:], ids=" ".join)
def test_views_in_every_build(photos, flags, monkeypatch):
    """Mirrored and rounded to bfloat16, they differ from this machine's own build as its rounding of sums does."""
    plan = random_plan(photos, 20, 3, 4, n=0)
    config = DataConfig(crop_size=20, resize_size=20, train_crop="random_crop")
    found = []
    for library in (native.load(), build(*flags)):
        monkeypatch.setattr(native, "load", lambda library=library: library)
        for dtype in (torch.float32, torch.bfloat16):
            image_pipeline = native.NativePipeline(photos, config, 2, 3, dtype=dtype)
            found += [images for _, images in image_pipeline.run_with_colors([plan])]
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[3], found[2].bfloat16())


def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch):
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *_: real(image, size, Image.Resampling.HAMMING))
    with pytest.raises(cpp.CppUnavailableError, match="Pillow .* resizes otherwise"):
        native.load.__wrapped__()


def test_a_jpeg_library_of_another_version_is_refused(monkeypatch, tmp_path):
    """The library itself compares the version and the size of the structure that native.cpp declares."""
    source = tmp_path / "native.cpp"
    source.write_text(native.SOURCE.read_text().replace("{{62, 632}, {80, 656}}", "{{61, 632}, {62, 640}}"))
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(native, "load_cpp", functools.partial(cpp.load_cpp, flags=[*cpp.FLAGS, "-O1"]))
    with pytest.raises(
        cpp.CppUnavailableError, match="of another kind .*library thinks size is 632, caller expects 640"
    ):
        native.load.__wrapped__()


def test_a_jpeg_library_with_the_interface_of_version_8(photos, monkeypatch):
    """As Pillow has in some distributions; here it is torchvision's."""
    import torchvision

    files = list((Path(torchvision.__file__).parent.parent / "torchvision.libs").glob("libjpeg*.so.8*"))
    if not files:
        pytest.skip("torchvision brings no such library")
    monkeypatch.setattr(native._imaging, "__file__", str(files[0]))
    monkeypatch.setattr(native, "load_cpp", functools.partial(cpp.load_cpp, flags=[*cpp.FLAGS, "-O1"]))
    library = native.load.__wrapped__()
    monkeypatch.setattr(native, "load", lambda: library)
    config = DataConfig(crop_size=16, resize_size=16, interpolation="pil-bilinear")
    pixels, _, expected, _ = results(photos, config, random_plan(photos, 16, 1, 0), 1)
    assert torch.equal(pixels, expected)


def test_the_declarations_are_those_of_the_header(tmp_path):
    """Where this machine has libjpeg's header, field by field."""
    if not Path("/usr/include/jpeglib.h").exists():
        pytest.skip("no jpeglib.h")
    fields = "err client_data:client image_width:width out_color_space output_width:out_width output_height:out_height"
    pairs = [field.split(":") for field in fields.replace("err ", "err:errors ").split()]
    checks = [f"offsetof(jpeg_decompress_struct, {pair[0]}) == offsetof(Decompressor, {pair[-1]})" for pair in pairs]
    errors = {"error_exit": "exit", "emit_message": "message", "format_message": "format"}
    checks += [
        f"offsetof(jpeg_error_mgr, {theirs}) == offsetof(ErrorManager, {ours})" for theirs, ours in errors.items()
    ]
    size = "sizeof(jpeg_decompress_struct) == INTERFACES[JPEG_LIB_VERSION == 80].size"
    checks += ["sizeof(jpeg_error_mgr) == sizeof(ErrorManager)", "JCS_RGB == RGB", size]
    asserts = "".join(f"static_assert({check});\n" for check in checks)
    file = tmp_path / "check.cpp"
    file.write_text(f'#include <cstdio>\n#include "{native.SOURCE}"\n#include <jpeglib.h>\n{asserts}')
    compiler = [cpp.find_compiler(), "-std=c++17", "-fsyntax-only", "-w", str(file)]
    done = subprocess.run(compiler, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> DatasetIndex:
    """150 truncated and 150 otherwise damaged JPEGs."""
    root, random = tmp_path_factory.mktemp("damaged"), np.random.default_rng(0)
    (root / "a").mkdir()
    whole = []
    for i in range(12):
        options = {"progressive": i % 3 == 1, "subsampling": i % 3, "restart_marker_blocks": 5 * (i % 2)}
        photo(i, 60 + i, 90 - i).save(root / "whole.jpg", quality=80, **options)
        whole.append(np.fromfile(root / "whole.jpg", np.uint8))
    for i in range(300):
        content = whole[i % 12].copy()
        if i < 150:
            content = content[: -int(random.integers(1, len(content) - 700 if i % 2 else 300))]
        else:
            places = random.integers(600, len(content), int(random.integers(1, 9)))
            content[places] = random.integers(0, 256, len(places))
        (root / "a" / f"{i:03d}.jpg").write_bytes(content.tobytes())
    (root / "whole.jpg").unlink()
    return scan_classes(root)


def test_damaged_files_are_refused_where_pillow_refuses_them(damaged):
    config = DataConfig(crop_size=24, resize_size=24, interpolation="pil-bilinear", loader="native")
    ours, reference = (
        create_image_pipeline(damaged, dataclasses.replace(config, loader=name), CPU, 1, 1)
        for name in ("native", "reference")
    )
    whole = random_plan(damaged, 24, 1, 0, n=0)
    outcomes = []
    for row in range(len(damaged)):
        outcome = []
        for image_pipeline in (ours, reference):
            try:
                ((_, pixels),) = image_pipeline.run([whole.take(np.array([row]))])
                outcome.append(pixels.numpy().tobytes())
            except CorruptImageError as error:
                outcome.append(str(error))
        assert outcome[0] == outcome[1], damaged.names[row]
        outcomes.append(outcome[0])
    refused = [isinstance(outcome, str) for outcome in outcomes]
    assert all(refused[:150]) and 5 < sum(refused[150:]) < 145


def test_completeness_is_judged_as_python_judges_it(damaged, photos):
    library, plain = native.load(), 0
    for index in (damaged, photos):
        for i in range(len(index)):
            content = np.fromfile(index.location(i), np.uint8)
            judged = library.native_is_plain_jpeg(ctypes.c_void_p(content.ctypes.data), ctypes.c_int64(len(content)))
            assert bool(judged) == (is_plain(content) and index.names[i] != "a/image.png"), index.names[i]
            plain += judged
    assert 50 < plain < len(damaged)


def test_damage_beside_the_crop_is_seen(tmp_path):
    """A crop of the top rows of a file that ends early."""
    (tmp_path / "a").mkdir()
    photo(0, 200, 60).save(tmp_path / "a" / "a.jpg")
    content = (tmp_path / "a" / "a.jpg").read_bytes()
    (tmp_path / "a" / "a.jpg").write_bytes(content[:-40])
    index = scan_classes(tmp_path)
    plan = dataclasses.replace(
        random_plan(index, 8, 1, 0, n=0),
        crop_boxes=np.array([[0, 0, 20, 20]], np.int32),
        offsets=np.zeros((1, 1, 2), np.int32),
    )
    image_pipeline = create_image_pipeline(index, dataclasses.replace(SMALL, crop_size=8), CPU, 1, 1)
    with pytest.raises(CorruptImageError, match="a.jpg does not decode"):
        list(image_pipeline.run([plan]))


@pytest.mark.parametrize("interpolation", native.FILTERS)
def test_one_crop_decodes_what_it_sees_and_ten_crops_the_whole(photos, interpolation):
    config, i = dataclasses.replace(SMALL, interpolation=interpolation), int(photos.sizes.prod(axis=1).argmax())
    height, width = photos.sizes[i].tolist()
    region, shares = (ctypes.c_int32 * 4)(), []
    for crops in (1, 10):
        (plan,) = evaluation_plans(photos, config, crops=crops, batch_size=len(photos), rank=0, ranks=1)
        out, paths = torch.empty(len(plan), crops, 24, 24, 3), (ctypes.c_char_p * len(plan))()
        work = native._Work(plan, out, True, config, native.ALL, paths, native._arrays(plan))
        assert native.load().native_region(ctypes.byref(work.batch), ctypes.c_int64(i), region)
        shares.append(region[2] * region[3] / (height * width))
    seen = 24**2 / plan.sizes[i].prod()
    assert seen < shares[0] < 1.3 * seen < shares[1] == 1


def images_of(index, ranks: int, threads: int, batch_size: int) -> dict[int, torch.Tensor]:
    found = {}
    for rank in range(ranks):
        shard = dataclasses.replace(CPU, rank=rank, ranks=ranks, threads=threads)
        loader = TrainingLoader(index, SMALL, shard, seed=1, batch_size=batch_size, accumulation=1)
        for batch in loader.batches(epoch=0):
            counting = batch.weights.bool().numpy()
            found |= dict(zip(batch.ids[counting].tolist(), batch.images[counting].clone(), strict=True))
    return found


def test_pixels_do_not_depend_on_ranks_threads_batches_or_the_first_step(photos):
    expected = images_of(photos, 1, 1, 26)
    assert sorted(expected) == list(range(len(photos)))
    for ranks, threads, batch_size in ((1, 3, 26), (2, 2, 4), (1, 2, 7)):
        found = images_of(photos, ranks, threads, batch_size)
        assert all(torch.equal(image, found[i]) for i, image in expected.items())
    loader = TrainingLoader(photos, SMALL, CPU, seed=1, batch_size=7, accumulation=1)
    for batch in loader.batches(epoch=0, first_step=2):
        assert all(torch.equal(image, expected[i]) for i, image in zip(batch.ids.tolist(), batch.images, strict=True))


def test_a_batch_that_somebody_holds_is_left_alone(photos):
    loader = TrainingLoader(photos, SMALL, CPU, seed=1, batch_size=4, accumulation=1)
    held, copies, places = [], [], set()
    for i, batch in enumerate(loader.batches(epoch=0)):
        held.append(batch.images[1:2, :, 3])  # a view of it is enough
        copies.append(held[-1].clone())
        places.add(batch.images.data_ptr())
        assert len(places) == i + 1
        del batch
    assert all(torch.equal(*pair) for pair in zip(held, copies, strict=True))
    held.clear()
    again = {batch.images.data_ptr() for epoch in range(1, 4) for batch in loader.batches(epoch)}
    assert len(again) <= 5 and again <= places  # two ahead, one in use, one on its way, and the last, which is smaller


def test_training_and_evaluation_share_the_threads_and_have_no_others(photos):
    before = set(threading.enumerate())
    for _ in range(2):
        loader = TrainingLoader(
            photos, SMALL, dataclasses.replace(CPU, threads=3), seed=1, batch_size=8, accumulation=1
        )
        list(loader.batches(epoch=0))
        list(EvaluationLoader(photos, SMALL, dataclasses.replace(CPU, threads=3), batch_size=8, crops=10).batches())
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("load images, 3 threads")]
    assert len(names) == 3
    new = set(threading.enumerate()) - before
    assert all(thread.name.startswith("load images, 3 threads") for thread in new)


def test_files_are_closed(photos):
    loader = TrainingLoader(photos, SMALL, CPU, seed=1, batch_size=4, accumulation=1)
    list(loader.batches(epoch=0))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        next(loader.batches(epoch=1))  # abandoned
        list(loader.batches(epoch=0))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize("change", ["smaller", "larger"])
def test_a_file_that_has_become_another_image_is_cut_as_the_reference_cuts_it(tmp_path, change):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "a.jpg"
    photo(0, 90, 100).save(file, quality=95)
    index = scan_classes(tmp_path)
    photo(1, *{"smaller": (40, 50), "larger": (150, 120)}[change]).save(file, quality=40)
    content = file.read_bytes()
    index = dataclasses.replace(index, lengths=np.array([len(content)]))
    plan = dataclasses.replace(random_plan(index, 24, 1, 0, n=0), crop_boxes=np.array([[30, 20, 50, 70]], np.int32))
    config = DataConfig(crop_size=24, resize_size=24, interpolation="pil-bicubic")
    pixels, _, expected, _ = results(index, config, plan, 1)
    assert torch.equal(pixels, expected)
    assert decode(np.frombuffer(content, np.uint8), "").size != (100, 90)


def test_ranks_take_the_first_loader_that_all_of_them_can_use(monkeypatch):
    cpu, other = torch.device("cpu"), {"native": "no C++ compiler", "dali": "", "reference": ""}
    names = iter(["native", "dali", "reference"])

    def gather(mine: str) -> list[str]:
        return [mine, other[next(names)]]

    assert choose_common_loader(DataConfig(), cpu, gather) == ("dali", ["native: no C++ compiler on rank 1"])
    names = iter(["native", "dali", "reference"])
    monkeypatch.setattr("pipeline.data.loader.find_spec", lambda name: None)
    name, passed_over = choose_common_loader(DataConfig(), cpu, gather)
    assert name == "reference" and [reason.split(":")[0] for reason in passed_over] == ["native", "dali"]
    names = iter(["native"])
    with pytest.raises(UserError, match=r"data.loader is native, but no C\+\+ compiler on rank 1; or use auto"):
        choose_common_loader(DataConfig(loader="native"), cpu, gather)


def test_auto_takes_native_on_cpu_and_dali_on_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_loader(DataConfig(), cpu) == "native" and choose_loader(DataConfig(), gpu) == "dali"
    assert choose_loader(DataConfig(dataset="cifar10"), gpu) == "native"  # where nothing is decoded
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no C++ compiler")
    assert choose_loader(DataConfig(), cpu) == "dali"
    with pytest.raises(UserError, match="data.loader is native, but no C\\+\\+ compiler; or use auto"):
        choose_loader(DataConfig(loader="native"), cpu)
    monkeypatch.setattr("pipeline.data.loader.find_spec", lambda name: None)
    assert choose_loader(DataConfig(), cpu) == choose_loader(DataConfig(), gpu) == "reference"
    with pytest.raises(UserError, match="nvidia-dali is not installed"):
        choose_loader(DataConfig(loader="dali"), gpu)


def test_bfloat16_is_float32_rounded(photos):
    """To the nearest, ties to even, in views that lie in the image and in such that do not."""
    for views in (1, 3):
        for interpolation in native.FILTERS:
            config = DataConfig(crop_size=20, resize_size=20, interpolation=interpolation, train_crop="random_crop")
            plan = random_plan(photos, 20, views, 3)
            half, full = (
                next(native.NativePipeline(photos, config, 2, views, dtype=dtype).run_with_colors([plan]))[1]
                for dtype in (torch.bfloat16, torch.float32)
            )
            assert half.dtype is torch.bfloat16 and torch.equal(half, full.bfloat16())


@pytest.mark.slow
def test_training_in_bf16_has_the_bits_of_float32_images(image_folders, tmp_path, monkeypatch):
    weights, data = [], {"dir": str(image_folders), "loader": "native", "crop_size": 32, "resize_size": 36}
    train, optim = {"precision": "bf16"}, {"epochs": 1, "milestones": []}
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        config = small_config(folder, data=data, train=train, optim=optim)
        with trainer.init_distributed("cpu") as world:
            assert Run(config, world)._image_dtype is torch.bfloat16
        monkeypatch.setattr(Run, "_choose_image_dtype", lambda run, objective, dtype=dtype: dtype)
        trainer.fit(config)
        weights.append(load_checkpoint(folder / "checkpoints" / "last.pt")["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_run_keeps_the_loader_that_it_began_with(image_folders, tmp_path, monkeypatch):
    """A run of a version or a machine whose auto was dali goes on with dali, and says why not with native."""
    data = {"dir": str(image_folders), "loader": "auto", "crop_size": 16, "resize_size": 18}
    for epochs, reason in ((1, "no C++ compiler"), (2, None)):
        monkeypatch.setattr(native, "unavailable_reason", lambda reason=reason: reason)
        config = small_config(
            tmp_path, data=data, optim={"epochs": epochs, "milestones": []}, train={"change": "optim.epochs"}
        )
        trainer.fit(config)
        assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["conditions"]["loader"] == "dali"
    fresh = small_config(tmp_path / "fresh", data=data)
    with trainer.init_distributed("cpu") as world:
        assert "through the native loader" in Run(fresh, world, find_start(fresh)).description()
        assert "through the dali loader" in Run(config, world, find_start(config)).description()
        monkeypatch.setattr(native, "unavailable_reason", lambda: "no C++ compiler")
        assert (
            "through the dali (not native: no C++ compiler) loader"
            in Run(fresh, world, find_start(fresh)).description()
        )


@pytest.mark.slow
def test_a_run_whose_loader_cannot_be_used_any_more_is_told_so(image_folders, tmp_path, monkeypatch):
    data = {"dir": str(image_folders), "loader": "auto", "crop_size": 16, "resize_size": 18}
    config = small_config(tmp_path, data=data, optim={"epochs": 1})
    trainer.fit(config)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no C++ compiler")
    with pytest.raises(
        UserError, match="data.loader is native, but no C.. compiler; .* began with it, .* resume where"
    ):
        trainer.dry_run(config)


def test_without_a_compiler_dali_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("c++") is None
    with pytest.raises(cpp.CppUnavailableError, match="no C\\+\\+ compiler"):
        native.load.__wrapped__()
