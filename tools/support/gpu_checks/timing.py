"""G9, and what `auto` takes: how fast a step is, and a run beside it."""

import time
from pathlib import Path
from typing import Any

import torch

from pipeline.models import triton_block
from pipeline.models.densenet import DenseNet
from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.runs import a_run
from tools.support.gpu_speed import CHANNELS_LAST, Case, measure, measure_speed


def speed(setting: Setting) -> Finding:
    """Images a second, launches and peak memory of training steps, beside torchvision and timm."""

    def found(rows: list[dict[str, Any]], left_out: dict[str, str]) -> Finding:
        best = max(rows, key=lambda row: row["images_per_s"])
        text = (
            f"{len(rows)} measured, {len(left_out)} left out; fastest {best['implementation']} in {best['precision']}"
        )
        speed = f"batch {best['batch_size']}: {best['images_per_s']:,.0f} images/s"
        return Finding(f"{text}, {speed}", {"rows": rows, "left_out": left_out})

    rows, left_out = measure_speed(setting.device, setting.deadline, lambda *so_far: setting.keep(found(*so_far)))
    require(bool(rows), f"nothing could be measured: {left_out}")
    return found(rows, left_out)


def choice_of_auto(setting: Setting) -> Finding:
    """What `auto` measures at the start of a run, in bf16, and in fp32 if there is time: all that can run here is right."""
    from pipeline.autotune import measure, measure_apart
    from pipeline.config_file import from_dict
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
    return Finding("; ".join(texts), texts)


def run_beside_steps(setting: Setting) -> Finding:
    """Images a second of a small network in a whole run, through each loader, and in steps alone: what else a run costs."""
    from pipeline.data.loader import unavailable_reason
    from pipeline.hooks import Hook

    class Clock(Hook):
        changes_network = False

        def __init__(self):
            self.moments = list[float]()

        def on_step(self, trainer, result):
            if result.last or trainer.run.progress.step == 1:
                if setting.on_gpu:
                    torch.cuda.synchronize()
                self.moments.append(time.perf_counter())

    model, batch, side, steps = (
        ("densenet_bc100_k12", 128, 32, 40) if setting.on_gpu else ("densenet_bc10_k3", 4, 16, 3)
    )
    block = "triton" if setting.on_gpu and not triton_block.refusal(setting.device) else "eager"
    mode: Any = "graphs" if setting.on_gpu else "none"
    folder = setting.folder / "small"
    small_photos(folder / "train", batch * steps, side)
    small_photos(folder / "val", batch, side, seed=2)
    case = Case(block, model, "bf16", CHANNELS_LAST, batch, side, mode)
    rates = {"steps alone": measure(case, setting.device, setting.deadline)["images_per_s"]}
    for loader in ("native", "dali"):
        if unavailable_reason(loader):
            continue
        clock = Clock()
        a_run(
            setting, f"small-{loader}", (clock,),
            model={"name": model, "dense_block": block},
            data={
                "loader": loader, "dir": str(folder), "crop_size": side, "resize_size": side,
                "train_crop": "random_crop", "cutout": 8,
            },
            optim={"epochs": 3, "batch_size": batch},
            train={"precision": "bf16", "compile": mode, "ema_decay": 0.999, "log_every": 20},
        )  # fmt: skip
        rates[f"a run through {loader}"] = (steps - 1) * batch / (clock.moments[-1] - clock.moments[-2])
    if len(rates) == 1:
        raise Skipped("neither native nor dali can be used here")
    text = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return Finding(f"images/s of {model}, batch {batch}: {text}", rates)


def small_photos(folder: Path, count: int, side: int, seed: int = 1) -> None:
    """Square JPEG images of noise in two classes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    for name in ("class0", "class1"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i}.jpg")
