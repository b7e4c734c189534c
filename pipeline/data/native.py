"""Executes plans with native.cpp: each image from its file to the network's input in one call, on CPU.

Threads take the images of a batch one by one, and work in C++ without Python's lock. They decode JPEG files with the
library that Pillow decodes with: it is there wherever Pillow is, and gives Pillow's pixels to the bit. What may be seen
otherwise, is damaged or lies in no file is decoded by Pillow (decoding.py), and goes on in C++. Of a data set in memory C++
is given the pixels.
"""

import ctypes
import dataclasses
import functools
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, _imaging
from torch import Tensor

from pipeline.config import CorruptImages, DataConfig, Interpolation
from pipeline.cpp import CppUnavailableError, load_cpp, reason_if_unavailable
from pipeline.data.color import apply_colors
from pipeline.data.decoding import decode
from pipeline.data.formats import pnm_pixels
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan, surround
from pipeline.data.reader import Reader
from pipeline.data.reference import PILLOW_FILTERS, views_of
from pipeline.data.replacements import collect
from pipeline.data.source import PlacedSource, SourceInMemory
from pipeline.errors import LocalUserError
from pipeline.machine import allow_many_files

SOURCE = Path(__file__).with_name("native.cpp")
FILTERS = {"torch7-bicubic": 0, "pil-bilinear": 1, "pil-bicubic": 2}
READ, DECODE, ALL = range(3)  # stages: the last that is done
BATCHES_AHEAD = 2
LIBJPEG = [  # in the order of `libjpeg` in native.cpp
    "jpeg_std_error",
    "jpeg_CreateDecompress",
    "jpeg_destroy_decompress",
    "jpeg_abort_decompress",
    "jpeg_mem_src",
    "jpeg_read_header",
    "jpeg_start_decompress",
    "jpeg_crop_scanline",
    "jpeg_skip_scanlines",
    "jpeg_read_scanlines",
]
# What Pillow's resizes are tried on: sizes before and after, smaller and larger, in both orders of its passes.
TRIALS = (((61, 23), (17, 21)), ((23, 61), (21, 17)), ((9, 14), (31, 20)), ((40, 40), (25, 25)))


AHEAD = 4  # files that a thread has open, as in native.cpp


class _Batch(ctypes.Structure):
    """`Batch` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "views", "crop", "channels", "filter", "bfloat16", "last", "next")),
        *((name, ctypes.c_void_p) for name in ("paths", "files", "array")),
        *((name, ctypes.c_int64) for name in ("width", "colors")),
        *((name, ctypes.c_void_p) for name in ("positions", "lengths", "boxes", "sizes", "corners")),
        *((name, ctypes.c_void_p) for name in ("hflip", "color", "mean_color", "shift")),
        ("around", ctypes.c_float * 3),
        ("out", ctypes.c_void_p),
    ]


class _Claims(ctypes.Structure):
    """`Claims` of native.cpp."""

    _fields_ = [("count", ctypes.c_int64), ("images", ctypes.c_int64 * AHEAD), ("files", ctypes.c_int32 * AHEAD)]


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        CppUnavailableError: it cannot be compiled, or this Pillow decodes or resizes otherwise than it expects.
    """
    library = load_cpp([SOURCE])
    library.native_open.restype = ctypes.c_char_p
    library.native_run.restype = ctypes.c_int64
    pillow, functions = ctypes.CDLL(_imaging.__file__), (ctypes.c_void_p * len(LIBJPEG))()
    for i, name in enumerate(LIBJPEG):
        try:
            functions[i] = ctypes.cast(getattr(pillow, name), ctypes.c_void_p).value
        except AttributeError:
            raise CppUnavailableError(f"this Pillow's JPEG library has no function {name}") from None
    if why := library.native_open(functions):
        raise CppUnavailableError(f"this Pillow's JPEG library is of another kind ({why.decode()})")
    if not _resizes_as_pillow(library):
        raise CppUnavailableError(
            f"Pillow {Image.__version__} resizes otherwise than the versions that are known: install requirements.txt"
        )
    return library


@functools.cache
def unavailable_reason() -> str | None:
    """Why images cannot be loaded so on this machine, in one line; None if they can."""
    return reason_if_unavailable(load)


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """The threads that load images: training and evaluation take turns at the same ones."""
    return ThreadPoolExecutor(number, f"load images, {number} threads")


class NativePipeline:
    """Turns plans into pixels or into the network's input, a few batches ahead.

    A batch's tensor is used again when no tensor looks at its memory any more.

    Attributes:
        last: the last stage that is done; before `ALL` what comes out is left over.
    """

    last = ALL

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        threads: int,
        views: int,
        corrupt_images: CorruptImages | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self._index, self._config, self._views, self._corrupt_images = index, config, views, corrupt_images
        self._library, self._number, self._pool, self._dtype = load(), threads, _threads(threads), dtype
        allow_many_files()
        self._reader = Reader(index)
        self._memory = Memory()
        # Images that C++ has handed back once: it need not read them again.
        readable = isinstance(index.source, PlacedSource | SourceInMemory)
        self._by_python = np.full(len(index), config.depth != 8 or not readable)
        self._array = _in_memory(index)
        if index.turned is not None:
            self._by_python |= index.turned

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, K) float32 in 0..255, bicubic overshoot included.

        Corrupt images are replaced, or raised, as in `replacements.collect`.
        """
        yield from self._run(plans, colored=False)

    def run_with_colors(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """As `run`, with the plans' colours mapped: (n * V, C, H, W) of the dtype asked for, channels-last in memory."""
        for plan, images in self._run(plans, colored=True):
            yield plan, images.flatten(0, 1).permute(0, 3, 1, 2)

    def _run(self, plans: Iterable[BatchPlan], colored: bool) -> Iterator[tuple[BatchPlan, Tensor]]:
        ahead: deque[_Work] = deque()
        try:
            for plan in plans:
                ahead.append(self._start(plan, colored))
                if len(ahead) > BATCHES_AHEAD:
                    yield self._finish(ahead.popleft())
            while ahead:
                yield self._finish(ahead.popleft())
        finally:
            for work in ahead:  # of a run that was abandoned
                work.batch.next = work.batch.n

    def _start(self, plan: BatchPlan, colored: bool) -> "_Work":
        crop = self._config.crop_size
        dtype = self._dtype if colored else torch.float32
        channels = self._config.channels if colored else len(surround(self._config))
        out = self._memory.take((len(plan), self._views, crop, crop, channels), dtype)
        work = _Work(plan, out, colored, self._config, self.last, *self._places(plan, colored), self._array)
        for _ in range(min(self._number, len(plan))):
            work.tasks.append(self._pool.submit(self._work_on, work))
        return work

    def _finish(self, work: "_Work") -> tuple[BatchPlan, Tensor]:
        for task in work.tasks:
            task.result()
        if not work.errors:
            return work.plan, work.out
        futures: list[Future[int]] = []
        for i in range(len(work.plan)):
            future: Future[int] = Future()
            if i in work.errors:
                future.set_exception(work.errors[i])
            else:
                future.set_result(i)
            futures.append(future)
        plan, rows = collect(work.plan, futures, self._corrupt_images)
        return plan, work.out[rows]

    def _places(self, plan: BatchPlan, colored: bool) -> tuple[ctypes.Array[ctypes.c_char_p], dict[str, np.ndarray]]:
        """The paths of a batch's files, and its arrays, by their names in native.cpp."""
        index, ids = self._index, plan.ids
        n = len(ids)
        files, positions = np.full(n, -1, np.int32), np.zeros(n, np.int64)
        names = (ctypes.c_char_p * n)()
        if isinstance(index.source, PlacedSource):
            for i, row in enumerate(ids.tolist()):
                if self._by_python[row]:
                    continue
                with suppress(OSError):  # of an archive that cannot be opened: Python says so
                    found = index.source.place(index.names[row], int(index.offsets[row]))
                    if found is None:
                        continue
                    place, positions[i] = found
                    if isinstance(place, int):
                        files[i] = place
                    else:
                        names[i] = os.fsencode(place)
        if self._array is not None:
            positions = index.offsets[ids] * self._array[0].nbytes
        if not colored:
            n, same = len(plan), np.eye(3)
            plan = dataclasses.replace(
                plan, color=np.tile(255 * same, (n, 1, 1)), mean_color=np.zeros((n, 3, 3)), shift=np.zeros((n, 3))
            )
        return names, {"files": files, "positions": positions, "lengths": index.lengths[ids], **_arrays(plan)}

    def _work_on(self, work: "_Work") -> None:
        """What each thread does to a batch: take images until there are none."""
        claims = _Claims()
        while (i := self._library.native_run(ctypes.byref(work.batch), ctypes.byref(claims))) >= 0:
            self._by_python[work.plan.ids[i]] = True
            try:
                self._load_by_python(work, i)
            except Exception as error:
                work.errors[i] = error.with_traceback(None)  # which would keep the image's bytes alive

    def _load_by_python(self, work: "_Work", i: int) -> None:
        row = int(work.plan.ids[i])
        content, location = self._reader.read(row), self._index.location(row)
        read_as = pixel_format(self._config)
        pixels = pnm_pixels(content) if read_as.depth == 8 else None
        image = decode(content, location, read_as) if pixels is None else Image.fromarray(pixels)
        if read_as.depth != 8:  # C++ takes bytes
            _finish_deep(work, i, image, self._config)
        elif not _finish(self._library, work.batch, i, image):
            raise LocalUserError(
                f"not enough memory to resize the image {location}: raise the limit on memory (ulimit -v, or the job's)"
            )


def _in_memory(index: DatasetIndex) -> np.ndarray | None:
    """The pixels of a data set in memory, which C++ reads at the index's places; None if it is in files.

    Raises:
        LocalUserError: this process has read others than those that were indexed.
    """
    if not isinstance(index.source, SourceInMemory):
        return None
    pixels = index.source.pixels()
    of_bytes = pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.shape[3:] in ((), (3,))
    as_indexed = bool((index.sizes == pixels.shape[1:3]).all() and (index.offsets < len(pixels)).all())
    if not of_bytes or not as_indexed:
        raise LocalUserError(
            f"the images in {index.root} are not those that were indexed ({len(pixels):,} of {pixels.shape[1]} x "
            f"{pixels.shape[2]} pixels): have the same files on every machine"
        )
    return pixels


class _Work:
    """A batch in the making: what C++ is given of it, and what it points to.

    Attributes:
        errors: of images that could not be loaded, by their place in the plan.
    """

    def __init__(
        self,
        plan: BatchPlan,
        out: Tensor,
        colored: bool,
        config: DataConfig,
        last: int,
        paths: ctypes.Array[ctypes.c_char_p],
        arrays: dict[str, np.ndarray],
        data_set: np.ndarray | None = None,
    ):
        self.plan, self.out, self.colored, self._pointed_to = plan, out, colored, (paths, arrays, data_set)
        self.tasks: list[Future[None]] = []
        self.errors: dict[int, Exception] = {}
        self.batch = _Batch(
            n=len(plan),
            views=plan.hflip.shape[1],
            crop=config.crop_size,
            channels=out.shape[-1],
            filter=FILTERS[config.interpolation],
            paths=ctypes.cast(paths, ctypes.c_void_p),
            array=None if data_set is None else data_set.ctypes.data,
            width=0 if data_set is None else data_set.shape[2],
            colors=data_set.shape[3] if data_set is not None and data_set.ndim == 4 else 1,
            around=(ctypes.c_float * 3)(*surround(config)),
            bfloat16=out.dtype is torch.bfloat16,
            last=last,
            out=out.data_ptr(),
            **{name: array.ctypes.data for name, array in arrays.items()},
        )


def _arrays(plan: BatchPlan) -> dict[str, np.ndarray]:
    """A plan's arrays by their names in native.cpp."""
    integers = {"boxes": plan.crop_boxes, "sizes": plan.sizes, "corners": plan.offsets}
    floats = {"color": plan.color, "mean_color": plan.mean_color, "shift": plan.shift}
    if (lacking := 3 - plan.shift.shape[1]) > 0:  # rows of zeros, which C++ leaves out again
        floats = {k: np.pad(v, [(0, 0), (0, lacking), *[(0, 0)] * (v.ndim - 2)]) for k, v in floats.items()}
    return {
        **{name: np.ascontiguousarray(array, np.int32) for name, array in integers.items()},
        **{name: np.ascontiguousarray(array, np.float32) for name, array in floats.items()},
        "hflip": np.ascontiguousarray(plan.hflip),
    }


def _finish(library: ctypes.CDLL, batch: _Batch, i: int, image: Image.Image) -> bool:
    """Do to a decoded image what `native_run` does to a file, as image number `i`; return whether there was memory for it."""
    region = (ctypes.c_int32 * 4)()
    if not library.native_region(ctypes.byref(batch), ctypes.c_int64(i), region):
        return False
    top, left, height, width = region
    pixels = np.asarray(image.crop((left, top, left + width, top + height)).convert("RGB"))
    pointer, stride = ctypes.c_void_p(pixels.ctypes.data), ctypes.c_int64(3 * width)
    return bool(library.native_finish(ctypes.byref(batch), ctypes.c_int64(i), pointer, stride))


def _finish_deep(work: _Work, i: int, image: Image.Image, config: DataConfig) -> None:
    """Do to a decoded image of 16 bits what `_finish` does to one of 8, in NumPy and Pillow."""
    with torch.inference_mode():  # the batch may be of an evaluation, and nobody wants a gradient of pixels
        pixels = torch.from_numpy(views_of(image, work.plan, i, config))
        if work.colored:
            pixels = apply_colors(pixels[None], work.plan.take(np.array([i])), pixels.device).permute(0, 2, 3, 1)
        work.out[i] = pixels


def _resizes_as_pillow(library: ctypes.CDLL) -> bool:
    """Whether the installed Pillow gives the bytes that native.cpp gives, at some sizes."""
    random = np.random.default_rng(0)
    for (height, width), size in TRIALS:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        for interpolation, kernel in PILLOW_FILTERS.items():
            expected = np.asarray(image.resize(size[::-1], kernel))
            if not np.array_equal(resized(library, image, size, interpolation), expected):
                return False
    return True


def resized(
    library: ctypes.CDLL, image: Image.Image, size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """(height, width, 3) float32: an image in another size, with one view that has room for all of it."""
    crop = max(size)
    plan = BatchPlan(
        ids=np.zeros(1, np.int64),
        weights=np.ones(1, np.float32),
        crop_boxes=np.array([[0, 0, image.height, image.width]], np.int32),
        sizes=np.array([size], np.int32),
        offsets=np.zeros((1, 1, 2), np.int32),
        hflip=np.zeros((1, 1), bool),
        color=255 * np.eye(3, dtype=np.float32)[None],
        mean_color=np.zeros((1, 3, 3), np.float32),
        shift=np.zeros((1, 3), np.float32),
    )
    out = torch.empty(1, 1, crop, crop, 3)
    config = DataConfig(crop_size=crop, resize_size=crop, interpolation=interpolation)
    work = _Work(plan, out, True, config, ALL, (ctypes.c_char_p * 1)(), _arrays(plan))
    _finish(library, work.batch, 0, image)
    return out[0, 0, : size[0], : size[1]].numpy()


class Memory:
    """Tensors whose memory is used again as soon as no tensor looks at it."""

    def __init__(self):
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that nobody else has, float32 or bfloat16; what it holds is left over."""
        free = self._free.setdefault((shape, dtype), [])
        try:
            array = free.pop()
        except IndexError:
            array = np.empty(shape, np.float32 if dtype is torch.float32 else np.uint16)
        lent = array.view()  # lives until the last tensor that shares the memory is gone, as its views do
        weakref.finalize(lent, free.append, array).atexit = False
        return torch.from_numpy(lent).view(dtype)
