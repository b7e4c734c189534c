import math

import pytest
import torch

from pipeline.config import OptimConfig
from pipeline.optim import create_optimizer, learning_rate

STEPS = 5005


def test_the_papers_schedule_drops_at_epochs_30_and_60():
    config = OptimConfig()
    rates = {epoch: learning_rate(config, epoch * STEPS, STEPS) for epoch in (0, 29, 30, 59, 60, 89)}
    assert rates == pytest.approx({0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001}, rel=1e-12)
    assert learning_rate(config, 30 * STEPS - 1, STEPS) == pytest.approx(0.1)


def test_warm_up_then_cosine_to_zero():
    config = OptimConfig(epochs=10, schedule="cosine", warmup_epochs=2)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1 / 200)
    assert learning_rate(config, 199, 100) == pytest.approx(0.1)
    assert learning_rate(config, 600, 100) == pytest.approx(0.05)
    assert learning_rate(config, 999, 100) == pytest.approx(0.05 * (1 + math.cos(math.pi * 799 / 800)))


def test_updates_follow_the_torch7_formula_with_decay_on_every_parameter():
    """optim/sgd.lua: g += wd w; v = mu v + g (v = g first); g += mu v; w -= lr g."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).double()
    weights = [p.detach().clone() for p in network.parameters()]
    velocity = [None] * len(weights)
    optimizer = create_optimizer(network, OptimConfig())
    for _ in range(4):
        gradients = [torch.randn_like(w) for w in weights]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for i, gradient in enumerate(gradients):
            gradient = gradient + 1e-4 * weights[i]
            velocity[i] = gradient if velocity[i] is None else 0.9 * velocity[i] + gradient
            weights[i] = weights[i] - 0.1 * (gradient + 0.9 * velocity[i])
    for parameter, weight in zip(network.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-13, atol=1e-14)
