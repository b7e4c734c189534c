"""G9, and what `auto` takes: how fast a step is."""

import time
from typing import Any

from pipeline.models.densenet import DenseNet
from tools.support.gpu_checks.check import Finding, Setting, require
from tools.support.gpu_speed import measure_speed


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
