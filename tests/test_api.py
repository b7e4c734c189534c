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


def test_weights_of_a_run_on_another_machine_are_evaluated_with_what_is_here(tmp_path, image_folders, monkeypatch):
    from pipeline import evaluate, fit
    from pipeline.data import loader

    data = {"loader": "reference", "dir": str(image_folders), "crop_size": 16, "resize_size": 18, "threads": 3}
    fit(small_config(tmp_path, data=data, optim={"epochs": 1}))
    made = []
    real = loader.EvaluationLoader.__init__

    def noting(self, index, config, *more, **options):
        made.append((config.loader, config.threads))
        real(self, index, config, *more, **options)

    monkeypatch.setattr(loader.EvaluationLoader, "__init__", noting)
    evaluate(tmp_path / "checkpoints" / "last.pt", image_folders / "val", batch_size=4)
    assert made == [("auto", 0)]


def test_an_evaluation_leaves_frozen_parts_as_they_are(tmp_path, image_folders):
    """One that a hook makes in the middle of an epoch."""
    import torch

    from pipeline.data.loader import EvaluationLoader, Shard
    from pipeline.data.scan import scan_classes
    from pipeline.distributed import World
    from pipeline.evaluation import evaluate
    from pipeline.models import create_model
    from pipeline.models.parts import freeze

    network = create_model("densenet_bc22_k8", num_classes=3).train()
    for module in freeze(network, 1, "network"):
        module.eval()
    modes = [module.training for module in network.modules()]
    config = small_config(tmp_path, data={"loader": "auto", "dir": str(image_folders)}).data
    cpu = torch.device("cpu")
    loader = EvaluationLoader(scan_classes(image_folders / "val"), config, Shard(0, 1, cpu, 1), batch_size=4, crops=1)
    evaluate(network, loader, World(0, 0, 1, 1, cpu))
    assert [module.training for module in network.modules()] == modes and {*modes} == {True, False}


def test_to_import_the_package_costs_no_torch():
    script = "import sys, pipeline; assert 'torch' not in sys.modules; from pipeline import fit; assert callable(fit)"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
