"""The checks of `python -m tools.gpu`: each a function with a line in `CHECKS`. The tests run them on CPU.

A check returns what it has seen. It raises `Skipped` where it cannot look, and anything else where what it sees is wrong.
It imports within what its own packages need (`Check.needs`), so that the others run where those are missing.
"""

import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.compilation import compile_network
from pipeline.distributed import World, data_parallel
from pipeline.errors import exit_on_user_error, is_out_of_memory
from pipeline.models import triton_block
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, create_scaler, set_tf32
from tools.support.gpu_speed import measure_speed

LOWEST_TORCH = 2, 11
FLOAT64 = 1e-10  # relative, of each tensor; see `worst`
FLOAT32 = 3e-2  # relative, of all gradients as one: DenseNet-121 multiplies float32's rounding to 0.006 to 0.02, TF32's to 0.4
WRONG = 0.9  # what has nothing to do with the right result is farther away; what is all zeros is 1 away
NEAR = 0.05  # standard deviations of ImageNet's pixels, in the mean of an image: decoders round otherwise
TIMES_EAGER = 2.0  # how many times as far from float64 as the modules an implementation may be
# Layers of the network that is compiled, where each takes seconds; and of what is computed in fewer bits than float32's, whose
# rounding DenseNet-121 multiplies until its gradients are as far from float64's as chance is.
SHALLOW: tuple[int, ...] = 2, 1, 1, 1
WAITS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")


class Skipped(Exception):  # noqa: N818 - no error
    """A check cannot look; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where checks run.

    Attributes:
        folder: theirs to write into.
        deadline: of `time.monotonic`; what can be shortened ends by then.
    """

    device: torch.device
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def keep(self, found: "Found") -> None:
        """Keep what a check has seen so far, in case that its process ends."""
        file = self.folder / "kept"
        file.with_suffix(".new").write_text(json.dumps(found))
        file.with_suffix(".new").replace(file)

    def kept(self) -> "Found | None":
        """What the check that was begun last has kept."""
        file = self.folder / "kept"
        return Found(*json.loads(file.read_text())) if file.exists() else None

    def forget(self) -> None:
        (self.folder / "kept").unlink(missing_ok=True)


class Found(NamedTuple):
    """What a check has seen, in a line, and figures for the JSON file."""

    text: str
    figures: Any = None


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        group: G0 to G9.
        needs: modules without which it cannot run.
    """

    group: str
    title: str
    look: Callable[[Setting], Found]
    needs: tuple[str, ...] = ()

    def run(self, setting: Setting) -> dict[str, Any]:
        """Its outcome: group, title, status (ok, FAIL or skipped), text, figures and seconds."""
        start = time.monotonic()
        setting.forget()
        set_tf32("fp32")  # torch begins with TF32, and a check before this one may have left it on
        torch.backends.cudnn.benchmark = False
        if torch.are_deterministic_algorithms_enabled():  # as a run has left it
            torch.use_deterministic_algorithms(False)
        try:
            status, found = "ok", self._look(setting)
        except Skipped as reason:
            status, found = "skipped", Found(str(reason))
        except Exception as error:
            lines = str(error).splitlines() or [""]
            status, found = "FAIL", Found(f"{type(error).__name__}: {lines[0]}")
        return {
            "group": self.group,
            "check": self.title,
            "status": status,
            "text": found.text,
            "figures": found.figures,
            "seconds": round(time.monotonic() - start, 2),
        }

    def _look(self, setting: Setting) -> Found:
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise Skipped(f"{name} is not installed or does not load ({error})") from None
        return self.look(setting)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


# Networks to look at


def sizes(setting: Setting) -> dict[str, Any]:
    """DenseNet-121's on a GPU, a tiny network's on CPU."""
    blocks = (6, 12, 24, 16) if setting.on_gpu else (2, 1, 1, 1)
    rate = 32 if setting.on_gpu else 4
    return dict(growth_rate=rate, blocks=blocks, stem_channels=2 * rate)


def own_network(setting: Setting, dense_block: str, blocks: tuple[int, ...] | None = None, **options: Any) -> DenseNet:
    """The same weights at each call: norms far from what they are drawn as."""
    spec = sizes(setting)
    torch.manual_seed(1)
    network = DenseNet(
        spec["growth_rate"], blocks or spec["blocks"], "imagenet", spec["stem_channels"], num_classes=10,
        dense_block=dense_block, **options,
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.to(setting.device)


def some_images(setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, side = (8, 224) if setting.on_gpu else (4, 64)
    x = torch.randn(images, 3, side, side, generator=generator)
    return x.to(setting.device), torch.randint(10, (images,), generator=generator).to(setting.device)


def step(network: nn.Module, data: tuple[Tensor, Tensor], precision: str = "fp32") -> dict[str, list[Tensor]]:
    """Logits, gradients and running statistics of a forward and backward pass in training."""
    images, labels = data
    network.train().zero_grad()
    with autocast(precision, images.device):
        logits = network(images)
    F.cross_entropy(logits.double(), labels).backward()
    return {
        "logits": [logits.detach()],
        "gradients": [p.grad.clone() for p in network.parameters() if p.grad is not None],
        "statistics": [buffer.clone() for buffer in network.buffers() if buffer.is_floating_point()],
    }


def layouts_of(precision: str) -> tuple[torch.memory_format, ...]:
    """The memory formats that a run may have in a precision."""
    return (torch.contiguous_format, torch.channels_last) if precision == "fp32" else (torch.channels_last,)


def blocks_for(precision: str) -> tuple[int, ...] | None:
    """The layers of a network whose gradients in a precision say something of who has computed them."""
    return None if precision == "fp32" else SHALLOW


def exact_step(
    setting: Setting, data: tuple[Tensor, Tensor], blocks: tuple[int, ...] | None
) -> dict[str, list[Tensor]]:
    """What the modules give in float64."""
    network = own_network(setting, "eager", blocks).double()
    batch = data[0].double(), data[1]
    return step(network, batch) | {"answers": [answers(network, batch[0], "fp32")]}


def answers(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Logits in evaluation."""
    network.eval()
    with torch.no_grad(), autocast(precision, images.device):
        return network(images)


def laid_out(
    network: DenseNet, data: tuple[Tensor, Tensor], layout: torch.memory_format
) -> tuple[DenseNet, tuple[Tensor, Tensor]]:
    return network.to(memory_format=layout), (data[0].contiguous(memory_format=layout), data[1])


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest relative distance of two tensors; one that is next to nothing is taken for a thousandth of the largest.

    The gradient of the first norm's weight is such a one, as the next norm undoes what it does.
    """
    least = 1e-3 * max(e.double().norm().item() for e in expected)
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - e.double()).norm() / e.double().norm().clamp(min=least)).item() for a, e in pairs)


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The relative distance of all tensors as one."""
    return worst(*([torch.cat([t.double().flatten() for t in tensors])] for tensors in (actual, expected)))


def deterministic_cudnn() -> Any:
    """While it is entered, cuDNN gives the same bits each time."""
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


def as_asked(network: DenseNet) -> None:
    selection = network.selection
    require(selection is not None and selection.method == network.dense_block, f"{network.dense_block}: {selection}")


# G0


def versions(setting: Setting) -> Found:
    """What is installed; torch is not too old, and the device is there."""
    names = "torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "nvidia-nvjpeg", "pydantic", "submitit"
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    require(release >= LOWEST_TORCH, f"torch {torch.__version__} is older than {'.'.join(map(str, LOWEST_TORCH))}")
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "driver": driver[0] if driver else None,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return Found(", ".join(f"{name} {version or 'missing'}" for name, version in found.items()), found)


def tf32_flags(setting: Setting) -> Found:
    """Matrix products in fp32 are none of TF32's, whatever the variable of NVIDIA's containers says."""
    errors = {}
    for value in ("0", "1"):
        if setting.on_gpu:  # torch reads the variable once
            script = "from tools.support.gpu_checks import product_error; print(product_error('cuda'))"
            environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": value}
            outcome = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
            )
            errors[value] = float(outcome.stdout.split()[-1])
        else:
            torch.backends.cuda.matmul.allow_tf32 = value == "1"  # what the variable does
            errors[value] = product_error("cpu")
            require(not torch.backends.cuda.matmul.allow_tf32, "set_tf32 leaves TF32 on for matrix products")
    require(max(errors.values()) < 1e-5, f"a product in fp32 is off by {max(errors.values()):.1e}: TF32 is on")
    return Found(f"a product in fp32 is off by {max(errors.values()):.1e} with the variable 0 and 1", errors)


def product_error(device: str) -> float:
    """How far a matrix product in fp32 is from float64's, relative, after `set_tf32`."""
    set_tf32("fp32")
    a = torch.randn(256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    return worst([a.float() @ a.float()], [a.float().double() @ a.float().double()])


def nvjpeg(setting: Setting) -> Found:
    """DALI gets the nvJPEG of requirements.txt, though torchvision brings another."""
    from pipeline.nvjpeg import installed_nvjpeg, load_nvjpeg, nvjpeg_of_process

    load_nvjpeg()
    import torchvision  # noqa: F401 - after it

    found, installed = nvjpeg_of_process(), installed_nvjpeg()
    require(found is not None, "none loads")
    path, version = found or ("", "")
    require(installed in (None, path), f"nvJPEG {version} ({path}) would decode, not {installed}")
    return Found(f"nvJPEG {version} ({path})")


# G1


def float64_as_torchvision(setting: Setting) -> Found:
    """Logits, gradients and statistics in float64 are torchvision's, in both layouts, and gradients lie as parameters."""
    import torchvision

    spec = sizes(setting)
    reference = torchvision.models.DenseNet(
        spec["growth_rate"], spec["blocks"], spec["stem_channels"], num_classes=10
    ).to(setting.device)
    reference.load_state_dict(own_network(setting, "eager").state_dict())
    images, labels = some_images(setting)
    expected = step(reference.double(), (images.double(), labels))
    found = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        for dense_block in ("eager", "memory_efficient", *([] if setting.on_gpu else ["fused"])):
            network = own_network(setting, dense_block).double().to(memory_format=layout)
            actual = step(network, (images.double().contiguous(memory_format=layout), labels))
            as_asked(network)
            for what, tensors in expected.items():
                far = worst(actual[what], tensors)
                require(far <= FLOAT64, f"{dense_block}, {layout}: {what} differ by {far:.1e}")
                found = max(found, far)
            for name, parameter in network.named_parameters():
                require(
                    lies_alike(parameter.grad, parameter),
                    f"{dense_block}, {layout}: the gradient of {name} lies otherwise than the parameter",
                )
    return Found(f"at most {found:.1e} apart, relative, of {FLOAT64:.0e}", found)


def lies_alike(a: Tensor | None, b: Tensor) -> bool:
    """Whether the strides are the same, but for dimensions of size 1, where they mean nothing."""
    return a is not None and all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), b.shape, strict=True))


def checkpointing(setting: Setting) -> Found:
    """Activation checkpointing changes no bit."""
    names = own_backends(setting)
    for dense_block in names:
        with deterministic_cudnn():
            plain, again = (
                step(own_network(setting, dense_block, activation_checkpointing=blocks), some_images(setting))
                for blocks in ("none", "all")
            )
        for what, tensors in plain.items():
            same = all(map(torch.equal, tensors, again[what]))
            require(same, f"{dense_block}: {what} are others with activation checkpointing")
    return Found(f"the same bits: {', '.join(names)}")


def own_backends(setting: Setting) -> list[str]:
    """The backends for this device that can run here."""
    fast = "triton" if setting.on_gpu else "fused"
    can = fast == "fused" or not triton_block.refusal(setting.device)
    return ["memory_efficient", *([fast] if can else [])]


def low_precision(setting: Setting) -> Found:
    """In each precision implementations are about as near to float64 as the modules are."""
    data = some_images(setting)
    depths: set[tuple[int, ...] | None] = {None, SHALLOW}
    exacts = {blocks: exact_step(setting, data, blocks) for blocks in depths}
    figures: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "tf32", "bf16", "fp16") if setting.on_gpu else ("fp32", "bf16", "fp16"):
        set_tf32(precision)
        blocks = blocks_for(precision)
        exact = exacts[blocks]
        figures[precision] = far = {}
        for dense_block in ("eager", *own_backends(setting)):
            if precision == "fp16" and dense_block == "fused":
                continue  # which has no fp16
            far[dense_block] = 0.0
            for layout in layouts_of(precision):
                network, batch = laid_out(own_network(setting, dense_block, blocks), data, layout)
                actual = step(network, batch, precision)
                as_asked(network)
                far[dense_block] = max(far[dense_block], distance(actual["gradients"], exact["gradients"]))
        most = FLOAT32 if precision == "fp32" else WRONG
        for name, value in far.items():
            limit = min(max(TIMES_EAGER * far["eager"], 1e-5), most)
            require(value <= limit, f"{name} in {precision}: gradients are {value:.1e} off, eager's {far['eager']:.1e}")
    texts = [
        f"{precision}: " + ", ".join(f"{name} {value:.1e}" for name, value in far.items())
        for precision, far in figures.items()
    ]
    return Found(f"gradients against float64: {'; '.join(texts)}", figures)


# G2


def colours(setting: Setting) -> Found:
    """Training batches with all augmentation are the CPU's, and an image has the same pixels in each batch."""
    from pipeline.config import DataConfig

    far = 0.0
    for side in (17, 224) if setting.on_gpu else (17,):  # kernels are chosen by how many pixels there are, too
        config = DataConfig(loader="synthetic", crop_size=side, resize_size=side)
        own, cpus = (generated(22, config, device, 8) for device in (setting.device, torch.device("cpu")))
        far = max(far, *((image - cpus[row][0]).abs().max().item() for row, (image, _) in own.items()))
        require(far < 1e-4, f"pixels differ from the CPU's by {far:.1e}")
        require(all(label == cpus[row][1] for row, (_, label) in own.items()), "labels differ from the CPU's")
        require_same_in_other_batches(own, 22, config, setting.device)
    return Found(f"22 images, at most {far:.1e} from the CPU's, the same in other batches")


def generated(images: int, config: Any, device: torch.device, batch_size: int) -> dict[int, tuple[Tensor, int]]:
    """An epoch's generated images as they are trained on, and their labels, by their row in the index."""
    from pipeline.data.loader import Shard, TrainingLoader
    from pipeline.data.synthetic import synthetic_index

    index, shard = synthetic_index(images, 3, config.crop_size, "train"), Shard(0, 1, device, 1)
    loader = TrainingLoader(index, config, shard, seed=1, batch_size=batch_size, accumulation=1)
    return {
        int(row): (image.cpu(), int(label))
        for batch in loader.batches(0)
        for row, image, label in zip(batch.ids, batch.images.clone(), batch.labels, strict=True)
    }


def require_same_in_other_batches(
    found: dict[int, tuple[Tensor, int]], images: int, config: Any, device: torch.device
) -> None:
    for batch_size in (5, images):
        other = generated(images, config, device, batch_size)
        differing = sum(not torch.equal(image, other[row][0]) for row, (image, _) in found.items())
        require(not differing, f"{differing} of {images} images are others in batches of {batch_size}")


def augmentation(setting: Setting) -> Found:
    """Batches with all operations of RandAugment and TrivialAugment, cutout, and erasing with noise are nearly the CPU's."""
    from pipeline.config import DataConfig
    from pipeline.data.policies import SPACES

    far = 0.0
    for space in SPACES:
        config = DataConfig(
            loader="synthetic",
            crop_size=32,
            resize_size=32,
            auto_augment=space,  # type: ignore[arg-type]
            color_jitter=0,
            pca_noise=0,
            cutout=8,
            random_erasing=0.5,
            erasing_fill="noise",
        )
        own, cpus = (generated(64, config, device, 64) for device in (setting.device, torch.device("cpu")))
        apart = [(image - cpus[row][0]).abs().mean() for row, (image, _) in own.items()]
        far = max(far, torch.stack(apart).mean().item())
        require(far < 2e-3, f"{space}: pixels differ from the CPU's by {far:.1e} in the mean")
        require_same_in_other_batches(own, 64, config, setting.device)
    return Found(f"{len(SPACES)} spaces, at most {far:.1e} from the CPU's in the mean, the same in other batches")


def evaluation(setting: Setting) -> Found:
    """Single and ten crops with a smaller last batch give the CPU's answers and totals."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import EvaluationLoader, Shard
    from pipeline.data.synthetic import synthetic_index
    from pipeline.evaluation import evaluate
    from pipeline.models import create_model

    far = 0.0
    for crops in (1, 10):
        found = []
        for device in (torch.device("cpu"), setting.device):
            torch.manual_seed(1)
            network = create_model("densenet_bc10_k3", 7).to(device)
            config = DataConfig(loader="synthetic", crop_size=16, resize_size=16)
            index, shard = synthetic_index(11, 7, 16, "val"), Shard(0, 1, device, 1)
            loader = EvaluationLoader(index, config, shard, batch_size=4, crops=crops)
            found.append(evaluate(network, loader, World(0, 0, 1, 1, device), keep_logits=True))
        logits = [torch.from_numpy(answers.logits) for answers in found if answers.logits is not None]
        far = max(far, worst(logits[1:], logits[:1]))
        require(far < FLOAT32, f"{crops} crops: logits differ from the CPU's by {far:.1e}")
        require(len(found[0].top5) == len(found[1].top5) == 11, "images are missing")
        require(found[0].score.images == found[1].score.images == 11, "the totals count other images")
    return Found(f"1 and 10 crops of 11 images, logits at most {far:.1e} from the CPU's")


# G3


def a_run(setting: Setting, name: str, hooks: tuple[Any, ...] = (), **sections: dict[str, Any]) -> Any:
    """Train a tiny network on generated images; return its progress."""
    from pipeline.config import from_dict
    from pipeline.trainer import fit

    tree: dict[str, Any] = {
        "run_dir": str(setting.folder / name),
        "model": {"name": "densenet_bc10_k3", "dense_block": "eager"},  # named, so that nothing is measured first
        "data": {
            "loader": "synthetic", "crop_size": 16, "resize_size": 16, "synthetic_images": 30, "synthetic_classes": 3
        },
        "optim": {"epochs": 1, "batch_size": 8, "milestones": []},
        "train": {
            "log_every": 2,
            "device": setting.device.type,
            "pictures_every": 0,
            "memory_format": "channels_last",
            "compile": "none",
        },
    }  # fmt: skip
    for section, fields in sections.items():
        tree[section] = {**tree[section], **fields}
    return fit(from_dict(tree, name), hooks)


def resumed(setting: Setting, name: str = "synthetic", **sections: dict[str, Any]) -> Found:
    """SIGTERM ends a run so that its command ends with 75; resumed, it has the bits of a run that was not cut."""
    from pipeline.errors import InterruptedRunError
    from pipeline.hooks import Hook

    class Keep(Hook):
        changes_network = False

        def __init__(self, cut: bool = False):
            self.cut, self.state = cut, dict[str, Tensor]()

        def on_step(self, trainer, result):
            if self.cut and trainer.run.done_steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_end(self, trainer):
            self.state = {name: t.cpu().clone() for name, t in trainer.run.network.state_dict().items()}

    whole, cut, rest = Keep(), Keep(cut=True), Keep()
    options = {"train": {"deterministic": setting.on_gpu}, **sections}
    a_run(setting, f"{name}-whole", (whole,), **options)
    code = None
    with redirect_stderr(io.StringIO()):
        try:
            a_run(setting, f"{name}-cut", (cut,), **options)
        except InterruptedRunError as error:
            code = ended_with(error)
    require(code == 75, f"SIGTERM ends a run with {code}")
    a_run(setting, f"{name}-cut", (rest,), **options)
    differing = [name for name, tensor in whole.state.items() if not torch.equal(tensor, rest.state[name])]
    require(not differing, f"a resumed run has other bits in {', '.join(differing[:3])}")
    require(any(not torch.equal(t, cut.state[name]) for name, t in whole.state.items()), "the run was not cut")
    return Found("exit code 75; resumed with the same bits")


def ended_with(error: Exception) -> Any:
    """The exit code of a command whose work raises this."""

    def work() -> None:
        raise error

    try:
        exit_on_user_error(work)
    except SystemExit as end:
        return end.code
    return None


def precisions(setting: Setting) -> Found:
    """`fit` trains in each precision, with gradient accumulation, to finite weights."""
    from pipeline.hooks import Hook

    class Finite(Hook):
        def on_epoch(self, trainer, result):
            tensors = trainer.run.network.state_dict().values()
            require(all(bool(tensor.isfinite().all()) for tensor in tensors), "a weight is not finite")

    names = ("fp32", "tf32", "bf16", "fp16") if setting.on_gpu else ("fp32", "bf16", "fp16")
    for precision in names:
        options: dict[str, dict[str, Any]] = {"train": {"precision": precision}, "optim": {"grad_accum_steps": 2}}
        progress = a_run(setting, precision, (Finite(),), **options)
        require(progress.epoch == 1, f"{precision}: the run did not end")
    return Found(", ".join(names))


def overflow(setting: Setting) -> Found:
    """A step of fp16 whose scaled loss overflows is left out, and the next one with a lower scale is taken."""
    scaler = create_scaler("fp16", setting.device)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60, "backoff_factor": 2.0**-50})
    network = own_network(setting, "eager")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = some_images(setting)
    moved = []
    for _ in range(2):
        before = network.classifier.weight.detach().clone()
        optimizer.zero_grad()
        with autocast("fp16", setting.device):
            loss = F.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, network.classifier.weight))
    require(moved == [False, True], f"the two steps moved the weights: {moved}")
    return Found(f"left out once; the scale fell to {scaler.get_scale():.0f}")


def out_of_memory(setting: Setting) -> Found:
    """Too little memory is one line with what to lower, and exit code 2."""
    try:
        torch.empty(2**50, device=setting.device)
    except Exception as error:
        require(is_out_of_memory(error), f"it is not taken for lack of memory: {error}")
        said = io.StringIO()
        with redirect_stderr(said):
            code = ended_with(error)
        lines = said.getvalue().splitlines()
        require(code == 2 and len(lines) == 1 and "lower the batch size" in lines[0], f"code {code}: {lines}")
        return Found(f"exit code 2; {lines[0][:60]}...")
    raise AssertionError("a petabyte could be had")


# G4


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += str(func.overloadpacket) in WAITS
        return func(*args, **(kwargs or {}))


def host_waits(setting: Setting) -> Found:
    """No step of a run that is not logged waits for the device; on a GPU torch itself stops at one."""
    from pipeline.hooks import Hook

    class Watch(Hook):
        changes_network = False

        def __init__(self):
            self.steps = 0

        def on_step_start(self, trainer):
            run = trainer.run
            nth, last = run.done_steps + 1, run.progress.step + 1 == run.train_loader.steps_per_epoch
            self.watched = not last and nth % run.config.train.log_every != 0
            self.waits = Waits()
            if self.watched and setting.on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            elif self.watched:
                self.waits.__enter__()

        def on_step(self, trainer, result):
            if self.watched and setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            elif self.watched:
                self.waits.__exit__(None, None, None)
                require(not self.waits.found, f"a step waits for the device {self.waits.found} times")
            self.steps += self.watched

    names = ["eager", *own_backends(setting)]
    for name in names:
        watch = Watch()
        try:
            a_run(setting, f"waits-{name}", (watch,), model={"dense_block": name})
        finally:
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        require(watch.steps > 0, "no step was watched")
    return Found(f"none in {watch.steps} steps of {', '.join(names)}")


class Operators(TorchDispatchMode):
    """Counts torch's operators that make kernels."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        self.found += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        return outcome


def launches(setting: Setting) -> Found:
    """A step launches at most twice as many kernels as it has operators under fake tensors."""
    from tools.support.fake_gpu import Launch, Step, run_step

    model, images, side = ("densenet121", 32, 224) if setting.on_gpu else ("densenet_bc10_k3", 4, 16)
    counted = {}
    for dense_block in ("eager", "triton"):
        operators, own = Operators(), list[Launch]()
        run_step(Step(model, dense_block, images, side, "bf16"), own.append, operators)
        counted[dense_block] = operators.found + len(own)
    text = ", ".join(f"{name} {count}" for name, count in counted.items())
    if not setting.on_gpu:
        raise Skipped(f"only a GPU launches kernels; operators of a step under fake tensors: {text}")
    from pipeline.models import create_model
    from tools.support.gpu_speed import count_launches

    measured = {}
    x = torch.randn(images, 3, side, side, device=setting.device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.long, device=setting.device)
    for dense_block, count in counted.items():
        if dense_block == "triton" and triton_block.refusal(setting.device):
            continue
        network = create_model(model, dense_block=dense_block).to(setting.device).to(memory_format=torch.channels_last)
        take = functools.partial(bare_step, network, x, labels)
        take()
        launched = count_launches(take)
        if launched is None:
            raise Skipped(f"torch's profiler sees no kernels here; operators of a step under fake tensors: {text}")
        measured[dense_block] = launched
        require(count / 2 <= launched <= 2 * count, f"{dense_block}: {launched} launches, counted {count}")
    return Found(f"measured {measured}; operators under fake tensors: {text}", measured)


def bare_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What `run_step` counts: a forward and a backward pass in bf16."""
    network.zero_grad()
    with autocast("bf16", images.device):
        logits = network(images)
    F.cross_entropy(logits.float(), labels).backward()


# G5


def process_groups(setting: Setting) -> Found:
    """NCCL (on CPU gloo) with a gloo group beside it, in a world of one."""
    backend = "nccl" if setting.on_gpu else "gloo"
    bound: dict[str, Any] = dict(device_id=setting.device) if setting.on_gpu else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **bound)
    try:
        side: Any = dist.new_group(backend="gloo")
        ours, hosts = torch.ones(3, device=setting.device), torch.ones(3)
        dist.all_reduce(ours)
        dist.all_reduce(hosts, group=side)
        require(ours.sum().item() == hosts.sum().item() == 3, "sums over one rank are wrong")
    finally:
        dist.destroy_process_group()
    return Found(f"{backend} and gloo")


def two_ranks(setting: Setting) -> Found:
    """Two ranks on one device average their gradients as one process does that computes both halves."""
    # Who has used a GPU, or autograd's threads, cannot fork: a server that has only loaded torch does it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=one_of_two_ranks, args=(rank, setting)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(1.0, setting.deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    require(codes == [0, 0], f"the ranks ended with {codes}")
    found = [torch.load(setting.folder / f"rank{rank}.pt", map_location=setting.device) for rank in range(2)]
    halves = []
    for rank in range(2):
        halves.append(step(own_network(setting, "eager"), half_of(setting, rank))["gradients"])
    expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    far = distance(found[0], expected)
    require(all(map(torch.equal, *found)), "the ranks have different gradients")
    require(far < FLOAT32, f"the ranks' gradients are {far:.1e} off")
    return Found(f"gradients {far:.1e} from one process's")


def half_of(setting: Setting, rank: int) -> tuple[Tensor, Tensor]:
    images, labels = some_images(setting)
    return images[rank::2], labels[rank::2]


def one_of_two_ranks(rank: int, setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.set_device(setting.device)
    else:
        torch.set_num_threads(1)
    set_tf32("fp32")
    store = dist.FileStore(str(setting.folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    network = data_parallel(own_network(setting, "eager"), World(rank, rank, 2, 2, setting.device))
    torch.save(step(network, half_of(setting, rank))["gradients"], setting.folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def lost_rank(setting: Setting) -> Found:
    """A rank that is killed: the others leave with 75. Two GPUs are needed, and this command is for one."""
    raise Skipped("`fit` takes two ranks on two GPUs only; on CPU python -m tools.lab.chaos kills ranks")


# G6


def compiled(setting: Setting) -> Found:
    """torch.compile's network gives the modules' gradients, leaves the last, smaller batch alone and compiles little."""
    from torch._dynamo.utils import counters

    images, labels = some_images(setting)
    small = images[:-1], labels[:-1]
    # Inductor takes minutes on CPU: there the graph is traced, and called as it is.
    traced = functools.partial(torch.compile, backend="eager")
    far = 0.0
    for mode in ("default", "reduce-overhead") if setting.on_gpu else ("default",):
        torch.compiler.reset()
        counters.clear()
        with nullcontext() if setting.on_gpu else mock.patch.object(torch, "compile", traced):
            network = compile_network(own_network(setting, "auto", SHALLOW), mode, len(images), 1)
        reference = own_network(setting, "eager", SHALLOW)
        graphs = 0
        for batch in ((images, labels), small, (images, labels)):
            actual, expected = step(network, batch), step(reference, batch)
            far = max(far, distance(actual["gradients"], expected["gradients"]))
            require(far < FLOAT32, f"{mode}: gradients differ by {far:.1e}")
            now = counters["stats"]["unique_graphs"]
            require(1 <= now <= 3 and now == (graphs or now), f"{mode}: {graphs} graphs, then {now} were compiled")
            graphs = now
    return Found(f"gradients {far:.1e} from the modules'" + ("" if setting.on_gpu else "; traced, not compiled"))


def cuda_graphs(setting: Setting) -> Found:
    """Steps replayed as CUDA graphs have the bits of steps that are not, on all that a run may do between them."""
    if not setting.on_gpu:
        raise Skipped("there are none on CPU")
    blocks = ["eager", *([] if triton_block.refusal(setting.device) else ["triton"])]
    cases = [*itertools.product(blocks, ("fp32", "bf16"), (False, True)), ("memory_efficient", "bf16", False)]
    for dense_block, precision, parallel in cases:
        deep = precision == "bf16" and parallel == (dense_block == "triton")  # one of each: a few layers show as much
        take = functools.partial(graph_steps, setting, dense_block, precision, parallel, None if deep else SHALLOW)
        plain, replayed = take("none"), take("graphs")
        if differing := sum(not torch.equal(*pair) for pair in zip(plain, replayed, strict=True)):
            chance = sum(not torch.equal(*pair) for pair in zip(plain, take("none"), strict=True))
            name = f"{dense_block} in {precision}{' with DDP' if parallel else ''}"
            raise AssertionError(
                f"{name}: {differing} of {len(plain)} tensors have other bits than without graphs, where {chance} have other "
                "bits in a second run"
            )
    names = ", ".join([*blocks, "memory_efficient"])
    return Found(f"the same bits in {len(SIDES)} steps of {names} in fp32 and bf16, with DDP too")


SIDES = 160, 160, 160, 160, 128, 128, 128, 160, 128, 160
"""Of the images in steps of `graph_steps`: two sizes are captured, whose graphs share their memory and take turns."""


def graph_steps(
    setting: Setting, dense_block: str, precision: str, parallel: bool, blocks: tuple[int, ...] | None, mode: Any
) -> list[Tensor]:
    """Logits, gradients and answers of training steps, one of fewer images, and the network after them.

    Args:
        parallel: with DDP, in a world of one.
        blocks: the network's layers, if not all.
        mode: of train.compile.
    """
    if parallel:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=setting.device)
    try:
        generator, seen = torch.Generator().manual_seed(3), list[Tensor]()
        dropout = 0.2 if dense_block == "eager" else 0.0
        bare = own_network(setting, dense_block, blocks, dropout=dropout).to(memory_format=torch.channels_last)
        compiled = network = compile_network(bare, mode, 8, 1)
        if parallel:
            network = DistributedDataParallel(network, [setting.device], gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        scaler = create_scaler(precision, setting.device)
        for i, side in enumerate(SIDES):
            images = torch.randn(7 if i == 3 else 8, 3, side, side, generator=generator).to(setting.device)
            labels = torch.randint(10, (len(images),), generator=generator).to(setting.device)
            images = images.contiguous(memory_format=torch.channels_last)
            bare.train()
            with deterministic_cudnn():
                if mode == "graphs":
                    with autocast(precision, setting.device):
                        compiled.capture(images)  # type: ignore[operator]
                torch.manual_seed(i)
                with autocast(precision, setting.device):
                    logits = network(images)
                scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
                scaler.step(optimizer)
                scaler.update()
                seen += [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
                optimizer.zero_grad()
                if mode == "none":  # a replay selects nothing
                    as_asked(bare)
                seen.append(answers(bare, images, precision))
        if mode == "graphs":
            require(len(compiled._graphs) == 2, f"{len(compiled._graphs)} sizes were captured")  # type: ignore
        return seen + [tensor.clone() for tensor in bare.state_dict().values()]
    finally:
        if parallel:
            dist.destroy_process_group()


def runs_in_graphs(setting: Setting) -> Found:
    """`fit` in CUDA graphs ends with the bits of one without: with all that it may do between replays, and in two sizes."""
    from pipeline.hooks import Hook

    class Keep(Hook):
        changes_network = False

        def __init__(self):
            self.graphs, self.state = 0, dict[str, Tensor]()

        def on_end(self, trainer):
            run = trainer.run
            self.graphs = len(getattr(run.compiled, "_graphs", ()))
            for kind, network in run.validated.items():
                self.state |= {f"{kind} {name}": t.cpu().clone() for name, t in network.state_dict().items()}

    # Of so many images an epoch makes five whole batches, or one.
    images, graphs = (46, "graphs") if setting.on_gpu else (14, "none")
    plain: dict[str, Any] = {"data": {"synthetic_images": images}, "train": {"deterministic": setting.on_gpu}}
    everything: dict[str, Any] = {
        "model": {"dropout": 0.1},
        "data": {
            **plain["data"], "mixup_alpha": 0.2, "random_erasing": 0.5,
            "train_crop_size": [12, 16], "train_crop_milestones": [1],
        },
        "optim": {"epochs": 2, "clip_grad_norm": 1.0, "class_weights": "balanced"},
        "train": {**plain["train"], "precision": "fp16", "not_finite": "skip", "ema_decay": 0.9},
    }  # fmt: skip
    replays, replay = Counter[str](), torch.cuda.CUDAGraph.replay
    for name, sections, sizes in (("plain", plain, 1), ("everything", everything, 2)):
        without, replayed = Keep(), Keep()

        def counted(graph: Any, name: str = name) -> None:
            replays[name] += 1
            replay(graph)

        for folder, mode, keep in (("without", "none", without), ("replayed", graphs, replayed)):
            train = {**sections["train"], "compile": mode}
            with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted):
                a_run(setting, f"{name}-{folder}", (keep,), **{**sections, "train": train})
        require(not setting.on_gpu or replayed.graphs == sizes, f"{name}: {replayed.graphs} sizes were captured")
        passes = 2 * sizes * (images // 8)  # each size has an epoch
        require(
            not setting.on_gpu or replays[name] == passes, f"{name}: {replays[name]} of {passes} passes were replayed"
        )
        differing = [key for key, tensor in without.state.items() if not torch.equal(tensor, replayed.state[key])]
        require(not differing, f"{name}: other bits in {', '.join(differing[:3])}")
    return Found("the same bits" + ("" if setting.on_gpu else "; without graphs, of which there are none on CPU"))


# G7


def photos(folder: Path, count: int, seed: int = 1) -> Any:
    """An index of smooth random JPEG images of odd sizes."""
    import numpy as np
    from PIL import Image

    from pipeline.data.index import scan_classes

    generator = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), np.uint8))
        coarse.resize((71 + i, 53 + 2 * i), Image.Resampling.BICUBIC).save(path, quality=90)
    return scan_classes(folder)


def odd_photos(folder: Path) -> Any:
    """An index of images that are not plain JPEG, or have a size, a place for a mark or a direction that is rare."""
    import numpy as np
    from PIL import Image

    from pipeline.data.index import scan_classes

    generator = np.random.default_rng(2)
    pictures = (
        Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8)).resize(
            (61 + 3 * i, 83 - 2 * i), Image.Resampling.BICUBIC
        )
        for i in range(20)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a right angle, which nobody does
    alpha = next(pictures)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    files: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "gray.jpg": (next(pictures).convert("L"), "JPEG", {}),
        "progressive.jpg": (next(pictures), "JPEG", {"progressive": True}),
        "restarts.jpg": (next(pictures), "JPEG", {"restart_marker_blocks": 3}),
        "full colours.jpg": (next(pictures), "JPEG", {"subsampling": "4:4:4"}),
        "half colours.jpg": (next(pictures), "JPEG", {"subsampling": "4:2:2"}),
        "rotated.jpg": (next(pictures), "JPEG", {"exif": exif}),
        "pixel.jpg": (next(pictures).resize((1, 1)), "JPEG", {}),
        "narrow.jpg": (next(pictures).resize((9, 200)), "JPEG", {}),
        "cmyk.jpg": (next(pictures).convert("CMYK"), "JPEG", {}),
        "png.jpg": (next(pictures), "PNG", {}),
        "rgba.png": (alpha, "PNG", {}),
        "palette.png": (next(pictures).quantize(16), "PNG", {}),
        "bmp.bmp": (next(pictures), "BMP", {}),
    }
    (folder / "class0").mkdir(parents=True)
    for name, (picture, kind, options) in files.items():
        picture.save(folder / "class0" / name, kind, **options)
    return scan_classes(folder)


CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 crop": (1, {}),
    "10 crops": (10, {}),
    "random_resized_crop": (0, {}),
    "random_crop": (0, {"train_crop": "random_crop", "padding": 4}),
}
"""What is cut from an image: views of an evaluation, or 0 for a training's one, and fields of the configuration."""
INTERPOLATIONS = "torch7-bicubic", "pil-bilinear", "pil-bicubic"


def pixels(
    index: Any, device: torch.device, interpolation: str, cut: str, batch_size: int, loader: str = "dali"
) -> dict[int, Tensor]:
    """What a loader makes of each image, by its row in the index."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader

    views, fields = CUTS[cut]
    config = DataConfig(
        loader=loader,
        crop_size=32,
        resize_size=40,
        interpolation=interpolation,  # type: ignore[arg-type]
        **fields,
    )
    shard = Shard(0, 1, device, 2)
    if views:
        batches = EvaluationLoader(index, config, shard, batch_size=batch_size, crops=views).batches()
    else:
        batches = TrainingLoader(index, config, shard, seed=1, batch_size=batch_size, accumulation=1).batches(0)
    found: dict[int, Tensor] = {}
    held = []
    for batch in batches:
        images = batch.images.unflatten(0, (-1, batch.views))
        held.append((images, images.clone()))
        found |= {int(row): image.cpu() for row, image in zip(batch.ids, images, strict=True)}
    require(all(torch.equal(*pair) for pair in held), "a batch changes while others are loaded")
    require(len(found) == len(index), f"{len(found)} of {len(index)} images came")
    return found


def dali_pixels(setting: Setting) -> Found:
    """DALI's graphs: near to Pillow's pixels, the same bits in each run and in whatever batch an image comes."""
    index = photos(setting.folder / "photos", 12)
    cpu = torch.device("cpu")
    far, graphs, wrong = 0.0, 0, []
    for name in INTERPOLATIONS if setting.on_gpu else INTERPOLATIONS[:1]:
        for cut in CUTS if setting.on_gpu else ("10 crops", "random_resized_crop", "random_crop"):
            first, again, other = (pixels(index, setting.device, name, cut, size) for size in (4, 4, 5))
            expected = pixels(index, cpu, name, cut, 4, "reference")
            mean = max((first[row] - expected[row]).abs().mean().item() for row in first)
            for what, images in (("in a second run", again), ("in other batches", other)):
                apart = [(first[row] - images[row]).abs().max().item() for row in first]
                if count := sum(value != 0 for value in apart):  # a NaN, too
                    wrong.append(f"{name}, {cut}: {count} of {len(apart)} {what}, by {max(apart):.1e}")
            if not mean < NEAR:
                wrong.append(f"{name}, {cut}: {mean:.3f} from Pillow's in the mean")
            far, graphs = max(far, mean), graphs + 1
    require(not wrong, f"images differ, in standard deviations: {'; '.join(wrong)}")
    return Found(f"{graphs} graphs, at most {far:.1e} standard deviations from Pillow's in the mean of an image")


def dali_odd(setting: Setting) -> Found:
    """Gray, CMYK, progressive, turned, tiny and other images, each by its name, are near to Pillow's pixels."""
    index = odd_photos(setting.folder / "odd")
    first, expected = (
        pixels(index, device, INTERPOLATIONS[0], "1 crop", 5, loader)
        for device, loader in ((setting.device, "dali"), (torch.device("cpu"), "reference"))
    )
    far = {index.names[row]: (first[row] - expected[row]).abs().mean().item() for row in first}
    wrong = [f"{name} {value:.3f}" for name, value in far.items() if not value < NEAR]
    require(not wrong, f"pixels differ from Pillow's in the mean, in standard deviations: {', '.join(wrong)}")
    return Found(
        f"{len(far)} images, at most {max(far.values()):.1e} standard deviations from Pillow's in the mean", far
    )


def dali_corrupt(setting: Setting) -> Found:
    """A corrupt image is replaced and does not count."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import Shard, TrainingLoader

    folder = setting.folder / "corrupt"
    index = photos(folder, 8)
    path = folder / "class1" / "3.jpg"
    path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100))
    config = DataConfig(loader="dali", crop_size=32, resize_size=40, corrupt_images="skip")
    loader = TrainingLoader(index, config, Shard(0, 1, setting.device, 2), seed=1, batch_size=8, accumulation=1)
    with redirect_stderr(io.StringIO()):
        (batch,) = loader.batches(0)
    require(batch.weights.sum().item() == 7, f"{batch.weights.sum().item():.0f} of 8 images count")
    return Found("7 of 8 images count")


def dali_resumed(setting: Setting) -> Found:
    """A run that DALI feeds with JPEG files, cut and resumed; on a GPU in CUDA graphs."""
    folder = setting.folder / "files"
    photos(folder / "train", 40)
    photos(folder / "val", 10, seed=2)
    data = {"loader": "dali", "dir": str(folder), "crop_size": 32, "resize_size": 40}
    train = {"deterministic": setting.on_gpu, "compile": "graphs" if setting.on_gpu else "none"}
    return resumed(setting, "files", data=data, train=train)


WARM, EPOCHS = 5, 20
"""Epochs in which the pools of DALI and torch may still grow, and all of them."""
GROWN = 100.0
"""MiB that may come after: a block of DALI's pool has 64, a batch 11.5, of which one lost an epoch makes 172."""


def dali_memory(setting: Setting) -> Found:
    """The memory of the GPU that is taken grows no more after some epochs."""
    if not setting.on_gpu:
        raise Skipped("of a GPU's memory; on CPU python -m tools.lab.endurance looks")
    from pipeline.config import DataConfig
    from pipeline.data.loader import Shard, TrainingLoader

    index, config = photos(setting.folder / "memory", 60), DataConfig(loader="dali")
    loader = TrainingLoader(index, config, Shard(0, 1, setting.device, 2), seed=1, batch_size=20, accumulation=1)
    taken = []
    for epoch in range(EPOCHS):
        for _ in loader.batches(epoch):
            pass
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(setting.device)
        taken.append((total - free) / 2**20)
    text = f"MiB more than after the first epoch: {', '.join(f'{value - taken[0]:.0f}' for value in taken[1:])}"
    require(taken[-1] - taken[WARM] < GROWN, text)
    return Found(text, {"MiB": taken})


# G8


def triton_kernels(setting: Setting) -> Found:
    """The Triton kernels run, are as near to float64 as the modules, and give the same bits twice."""
    if not setting.on_gpu:
        from tools.support.fake_gpu import Launch, Step, run_step

        own = list[Launch]()
        run_step(Step("densenet_bc10_k3", "triton", 4, 16, "bf16"), own.append)
        require(bool(own), "a step under fake tensors launches no kernel")
        raise Skipped(f"they run on a GPU only; a step under fake tensors launches {len(own)}")
    refusal = triton_block.refusal(setting.device)
    if refusal:
        raise Skipped(refusal)
    return triton_beside_modules(setting, ("fp32", "tf32", "bf16", "fp16"))


def triton_beside_modules(setting: Setting, precisions: tuple[str, ...]) -> Found:
    """The kernels' logits, gradients, statistics and answers in evaluation are as near to float64 as the modules'."""
    data = some_images(setting)
    data = data[0].contiguous(memory_format=torch.channels_last), data[1]
    depths: set[tuple[int, ...] | None] = {None, SHALLOW}
    exacts = {blocks: exact_step(setting, data, blocks) for blocks in depths}
    figures: dict[str, Any] = {}
    for precision in precisions:
        set_tf32(precision)
        blocks = blocks_for(precision)

        def network(dense_block: str, blocks: tuple[int, ...] | None = blocks) -> DenseNet:
            return own_network(setting, dense_block, blocks).to(memory_format=torch.channels_last)

        with deterministic_cudnn():
            found = []
            for dense_block in ("triton", "triton", "eager"):
                own = network(dense_block)
                found.append(step(own, data, precision))
                as_asked(own)
                found[-1]["answers"] = [answers(own, data[0], precision)]
                as_asked(own)
        first, again, eager = found
        same = all(all(map(torch.equal, first[what], again[what])) for what in first)
        require(same, f"{precision}: two steps have other bits")
        for what, tensors in exacts[blocks].items():
            own_far, eager_far = distance(first[what], tensors), distance(eager[what], tensors)
            limit = min(max(TIMES_EAGER * eager_far, 1e-5), WRONG)
            require(own_far <= limit, f"{precision}: {what} are {own_far:.1e} off, eager's {eager_far:.1e}")
            figures[f"{precision} {what}"] = {"triton": own_far, "eager": eager_far}
    return Found(
        ", ".join(f"{what} {far['triton']:.1e} (eager {far['eager']:.1e})" for what, far in figures.items()), figures
    )


def sanitizer(setting: Setting) -> Found:
    """compute-sanitizer finds no fault in the Triton kernels' memory accesses."""
    if not setting.on_gpu:
        raise Skipped("it is for a GPU's kernels")
    if shutil.which("compute-sanitizer") is None:
        raise Skipped("compute-sanitizer is not installed")
    if refusal := triton_block.refusal(setting.device):
        raise Skipped(refusal)
    script = (
        "import torch; from pipeline.models import create_model; "
        "m = create_model('densenet_bc10_k8', 3, dense_block='triton').cuda(); "
        "m(torch.randn(3, 3, 19, 17).cuda()).sum().backward(); torch.cuda.synchronize(); print(m.selection)"
    )
    # Calls of the API that fail, as torch's and cuDNN's questions to the driver may, are no faults of kernels.
    command = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", script]
    # Each tensor by itself: within one of torch's blocks of memory an access beyond a tensor's end is none beyond the block's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = max(1.0, setting.deadline - time.monotonic())
    try:
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise Skipped(f"it took more than {left:.0f} s: give more --minutes") from None
    require(outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-300:])
    require("triton" in outcome.stdout, "the modules were called")
    return Found("no fault")


# G9


def speed(setting: Setting) -> Found:
    """Images a second, launches and peak memory of training steps, beside torchvision and timm."""

    def found(rows: list[dict[str, Any]], left_out: dict[str, str]) -> Found:
        best = max(rows, key=lambda row: row["images_per_s"])
        text = (
            f"{len(rows)} measured, {len(left_out)} left out; fastest {best['implementation']} in {best['precision']}"
        )
        speed = f"batch {best['batch_size']}: {best['images_per_s']:,.0f} images/s"
        return Found(f"{text}, {speed}", {"rows": rows, "left_out": left_out})

    rows, left_out = measure_speed(setting.device, setting.deadline, lambda *so_far: setting.keep(found(*so_far)))
    require(bool(rows), f"nothing could be measured: {left_out}")
    return found(rows, left_out)


def choice_of_auto(setting: Setting) -> Found:
    """What `auto` measures at the start of a run, in bf16, and in fp32 if there is time: all that can run here is right."""
    from pipeline.autotune import measure, measure_apart
    from pipeline.config import from_dict
    from pipeline.models import create_model

    model, images, side = ("densenet121", 32, 224) if setting.on_gpu else ("densenet_bc10_k3", 4, 16)
    texts: list[str] = []
    begin = time.monotonic()
    for precision in ("bf16", "fp32"):  # which has twice the candidates, for its two memory formats
        if texts and setting.on_gpu and setting.deadline - time.monotonic() < 3 * (time.monotonic() - begin):
            texts.append(f"{precision}: no time was left, give more --minutes")
            break
        tree = {
            "model": {"name": model},
            "data": {"crop_size": side, "resize_size": side},
            "train": {"precision": precision},
        }
        config = from_dict(tree, "the check")
        if setting.on_gpu:
            tuning = measure_apart(config, 1000, setting.device, images)
        else:  # without the seconds of another process
            network = create_model(model, 10)
            require(isinstance(network, DenseNet), "it is none of ours")
            tuning = measure(network, config, setting.device, images)  # type: ignore[arg-type]
        first, *others = tuning.text.splitlines()
        require(first.startswith("computes with"), first)
        require(not others, f"{precision}: {'; '.join(others)}")
        texts.append(f"{precision}: {first}")
    return Found("; ".join(texts), texts)


CHECKS = [
    Check("G0", "versions", versions),
    Check("G0", "TF32 flags", tf32_flags),
    Check("G0", "nvJPEG", nvjpeg, ("nvidia.dali", "torchvision")),
    Check("G1", "float64 as torchvision", float64_as_torchvision, ("torchvision",)),
    Check("G1", "activation checkpointing", checkpointing),
    Check("G1", "precisions against float64", low_precision),
    Check("G2", "colours", colours, ("pydantic",)),
    Check("G2", "augmentation", augmentation, ("pydantic",)),
    Check("G2", "evaluation", evaluation, ("pydantic",)),
    Check("G3", "cut and resumed", resumed, ("pydantic",)),
    Check("G3", "training in each precision", precisions, ("pydantic",)),
    Check("G3", "overflow in fp16", overflow),
    Check("G3", "out of memory", out_of_memory),
    Check("G4", "waits of the host", host_waits, ("pydantic",)),
    Check("G4", "launches of a step", launches, ("triton",)),
    Check("G5", "process groups", process_groups),
    Check("G5", "two ranks on one device", two_ranks),
    Check("G5", "a killed rank", lost_rank),
    Check("G6", "CUDA graphs", cuda_graphs),
    Check("G6", "CUDA graphs in runs", runs_in_graphs, ("pydantic",)),
    Check("G6", "torch.compile", compiled),
    Check("G7", "DALI's pixels", dali_pixels, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI and odd images", dali_odd, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI and a corrupt image", dali_corrupt, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI, cut and resumed", dali_resumed, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI's memory", dali_memory, ("pydantic", "nvidia.dali")),
    Check("G8", "Triton kernels", triton_kernels, ("triton",)),
    Check("G8", "compute-sanitizer", sanitizer, ("triton",)),
    Check("G8", "auto's choice", choice_of_auto, ("pydantic",)),
    Check("G9", "speed", speed),
]  # fmt: skip
GROUPS = sorted({check.group for check in CHECKS})
