"""The package as a library."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY, small_config

pytestmark = pytest.mark.slow


def test_the_functions_train_and_evaluate(tmp_path, image_folders):
    from pipeline import create_model, evaluate, fit, load_config

    assert create_model("densenet_bc22_k6", num_classes=3).classifier.out_features == 3
    assert load_config("configs/demo.yaml", {"optim.epochs": 1}).optim.epochs == 1
    data = {"loader": "auto", "dir": str(image_folders), "crop_size": 16, "resize_size": 18}
    fit(small_config(tmp_path, data=data, optim={"epochs": 1}))
    result = evaluate(tmp_path / "checkpoints" / "last.pt", image_folders / "val", batch_size=4)
    assert result.score.images == 11 and len(result.losses) == 11


def test_to_import_the_package_costs_no_torch():
    script = "import sys, pipeline; assert 'torch' not in sys.modules; from pipeline import fit; assert callable(fit)"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
