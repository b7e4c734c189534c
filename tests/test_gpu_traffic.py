"""The counting of bytes and launches: torch's operators by hand, and the walk that stands for autograd's engine."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from conftest import with_random_norms

from pipeline.models import create_model
from pipeline.models.backends import BACKENDS

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tools.lab import gpu_traffic
from tools.support.fake_gpu import Step, gradients


@pytest.mark.parametrize("dense_block", ["eager", "memory_efficient"])
def test_the_walk_gives_autograds_gradients(dense_block, monkeypatch):
    torch.manual_seed(0)
    network = with_random_norms(create_model("densenet_bc10_k3", 3, dense_block="eager")).double()
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    parameters = list(network.parameters())
    expected = torch.autograd.grad(F.cross_entropy(network(images), labels), parameters)
    monkeypatch.setattr(torch.autograd, "grad", gradients)  # which memory_efficient uses within
    if dense_block == "eager":
        logits = network(images)
    else:
        logits = network.classifier(network._by_stages(images, BACKENDS[dense_block]))
    for own, engine in zip(gradients(F.cross_entropy(logits, labels), parameters), expected, strict=True):
        torch.testing.assert_close(own, engine, rtol=1e-9, atol=1e-12)


def test_torchs_operators_are_counted_as_by_hand():
    x = torch.randn(2, 5, 6, 6, requires_grad=True)
    weight, gamma, beta = torch.randn(7, 5, 3, 3, requires_grad=True), torch.rand(7), torch.rand(7)
    x_bytes, y_bytes, w_bytes = 4 * x.numel(), 4 * 2 * 7 * 36, 4 * weight.numel()
    traffic = gpu_traffic.Traffic()
    with traffic:
        y = F.conv2d(x, weight, padding=1)
        z = torch.relu(F.batch_norm(y, None, None, gamma, beta, training=True))
        torch.autograd.grad(z, [x, weight], torch.ones(2, 7, 6, 6))
    found = traffic.by_kernel
    count = gpu_traffic.Count
    assert found["convolution"] == count(1, x_bytes + w_bytes, y_bytes)
    assert found["relu"] == count(1, y_bytes, y_bytes)
    assert found["convolution_backward"] == count(2, 2 * y_bytes + x_bytes + w_bytes, x_bytes + w_bytes)
    assert found["threshold_backward"] == count(1, 2 * y_bytes, y_bytes)
    [norm] = [own for name, own in found.items() if name.endswith("batch_norm")]
    assert norm.launches == 2 and 0 <= norm.read - 2 * y_bytes <= 4 * 4 * 7 and 0 <= norm.written - y_bytes <= 4 * 4 * 7


def test_the_fused_block_moves_less_in_fewer_launches():
    found = {
        name: gpu_traffic.traffic(Step("densenet_bc10_k8", name, 64, 32, "bf16")).total
        for name in gpu_traffic.IMPLEMENTATIONS
    }
    moved = {name: count.read + count.written for name, count in found.items()}
    assert 1.9 * moved["triton"] < moved["eager"] < moved["memory_efficient"]
    assert found["triton"].launches < 0.85 * found["eager"].launches < 0.85 * found["memory_efficient"].launches
