"""How an epoch is cut into batches, in words."""

import pytest
import torch
from conftest import small_config

from pipeline.batches import Batches, statistic_images
from pipeline.distributed import World
from pipeline.report import summary
from pipeline.run import Run

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (Batches(512, 256, 4), "64 images at once (what a batch norm sees); 2 steps an epoch"),
        (  # ImageNet on the paper's four GPUs
            Batches(1_281_167, 256, 4),
            "64 images at once (what a batch norm sees); 5,005 steps an epoch, the last one of 143 images "
            "(35 or 36 at once)",
        ),
        (  # a part without images gets a replacement
            Batches(66, 64, 4),
            "16 images at once (what a batch norm sees); 2 steps an epoch, the last one of 2 images (1 at once)",
        ),
        (  # pairs that are mixed stay in one part
            Batches(70, 64, 2, together=2),
            "32 images at once (what a batch norm sees); 2 steps an epoch, the last one of 6 images (2 or 4 at once)",
        ),
        (
            Batches(450, 1000, 1),
            "1,000 images; 1 step an epoch, of all 450 images (450 at once: what a batch norm sees)",
        ),
    ],
)
def test_what_a_batch_norm_statistic_sees(batches, text):
    assert batches.text("so many parts") == f"batch {batches.size} = so many parts x {text}"


def test_parts_of_a_batch_differ_by_what_stays_together():
    assert statistic_images(21, 4, together=1) == (5, 6) and statistic_images(256, 4, together=1) == (64, 64)
    assert statistic_images(226, 2, together=2) == (112, 114)


def test_the_start_and_the_summary_tell_the_same_of_a_batch_that_is_all_images(tmp_path):
    """Ten images, mixed in five pairs, on two parts."""
    config = small_config(
        tmp_path, data={"synthetic_images": 10, "mixup_alpha": 0.2}, optim={"batch_size": 12, "grad_accum_steps": 2}
    )
    run = Run(config, ALONE)
    assert "of all 10 images (4 or 6 at once: what a batch norm sees)" in run.description()
    assert "\nimages in a batch-norm statistic: 4 or 6" in summary(run)
    assert run.measured.statistics == ((0, (4, 6)),)


@pytest.mark.parametrize(("name", "told"), [("densenet_bc22_k8", True), ("timm:convnext_atto", False)])
def test_the_summary_of_a_network_without_batch_norms_has_no_statistic_of_one(tmp_path, name, told):
    run = Run(small_config(tmp_path, model={"name": name}, data={"crop_size": 32, "resize_size": 32}), ALONE)
    assert ("images in a batch-norm statistic" in summary(run)) == told
