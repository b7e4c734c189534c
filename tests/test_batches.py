"""How an epoch is cut into batches, in words."""

import pytest

from pipeline.batches import Batches


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (Batches(512, 256, 4), "64 images (what a batch-norm statistic sees); 2 steps an epoch"),
        (  # ImageNet on the paper's four GPUs
            Batches(1_281_167, 256, 4),
            "64 images (what a batch-norm statistic sees); 5,005 steps an epoch, the last one of 143 images "
            "(35 or 36 in a statistic)",
        ),
        (  # a part without images gets a replacement
            Batches(66, 64, 4),
            "16 images (what a batch-norm statistic sees); 2 steps an epoch, the last one of 2 images (1 in a statistic)",
        ),
        (  # pairs that are mixed stay in one part
            Batches(70, 64, 2, together=2),
            "32 images (what a batch-norm statistic sees); 2 steps an epoch, the last one of 6 images "
            "(2 or 4 in a statistic)",
        ),
        (
            Batches(450, 1000, 1),
            "1,000 images; 1 step an epoch, of all 450 images (what a batch-norm statistic sees: 450)",
        ),
    ],
)
def test_what_a_batch_norm_statistic_sees(batches, text):
    assert batches.text("so many parts") == f"batch {batches.size} = so many parts x {text}"
