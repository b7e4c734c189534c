"""The Triton kernels without a GPU: in Triton's interpreter against float64, and as compiled for three architectures."""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, small_config

from pipeline.errors import UserError
from pipeline.models import create_model, zoo
from pipeline.models.densenet import DenseNet
from pipeline.trainer import dry_run
from tools.support.fake_gpu import Step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def test_the_kernels_are_right_in_tritons_interpreter():
    """Triton decides when it is imported whether it interprets, so in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_triton_block.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_run_that_asks_for_it_without_a_gpu_is_refused_in_one_line(tmp_path):
    config = small_config(tmp_path / "run", model={"dense_block": "triton"}, train={"device": "cpu"})
    with pytest.raises(UserError) as error:
        dry_run(config)
    assert str(error.value) == (
        "model.dense_block: 'triton' cannot run here: its kernels are for CUDA devices, and this one is 'cpu'; choose auto"
    )


def test_a_network_that_was_trained_with_it_computes_on_cpu_and_says_how():
    network = create_model("densenet_bc22_k6", 3, dense_block="triton").eval()
    with torch.no_grad():
        network(torch.randn(1, 3, 8, 8))
    assert network.selection.method in ("fused", "eager")  # without a compiler
    assert network.selection.reason == "its kernels are for CUDA devices, and this one is 'cpu'"


@pytest.fixture
def network(monkeypatch, tmp_path) -> str:
    """A network of one layer, as wide as DenseNet-121's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = dict(growth_rate=32, block_sizes=(1,), stem="imagenet", stem_channels=64)
    monkeypatch.setitem(zoo.NETWORKS, "small", functools.partial(DenseNet, **spec))
    return "small"


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernels_compile_for_each_architecture_with_the_chosen_tiles(network, architecture):
    """Without spills, within the card's shared memory, and with products on its tensor cores."""
    from tools.lab.gpu_kernels import PRODUCTS, SHARED_MEMORY, compile_launch, launches  # not while Triton interprets

    kernels = set()
    for precision in ("bf16", "tf32", "fp16"):
        for launch in launches(Step(network, "triton", 16, 64, precision, architecture)):
            is_product = "BLOCK_N" in launch.constants
            if not is_product and (architecture != 80 or launch.kernel in kernels):
                continue  # what does no products compiles alike
            if precision == "tf32" and launch.kernel not in ("conv3x3_forward", "bottleneck_backward"):
                continue  # these two need the most registers, and have tiles for each architecture
            if precision == "fp16" and launch.kernel != "bottleneck_forward":
                continue  # bfloat16's tiles; in this one they need other registers
            found = compile_launch(launch, architecture)
            assert found.spills == 0, found
            assert found.shared_memory <= SHARED_MEMORY[architecture], found
            # Too few pixels in a tile for 9.0's own instruction, which takes 64 rows.
            own = 80 if launch.kernel == "conv3x3_backward_data_persistent" else architecture
            assert not is_product or found.products.get(PRODUCTS[own]), found
            if launch.kernel in ("bottleneck_forward", "norm_forward", "pool_forward", "stem_forward"):
                assert "max.NaN.f32" in found.ptx, found.launch.kernel  # else ReLU would hide what is not finite
            kernels.add(launch.kernel)
    assert len(kernels) == (18 if architecture == 80 else 5), kernels
