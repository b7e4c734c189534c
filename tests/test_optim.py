import math

import pytest
import torch
from conftest import small_config
from test_trainer import last_state, records

from pipeline import trainer
from pipeline.config import OptimConfig
from pipeline.errors import UserError
from pipeline.hooks import Hook
from pipeline.measured import decayed_parameters, momentum_text
from pipeline.optim import TIMM, create_optimizer, learning_rate, load_state, set_learning_rate, state_of
from pipeline.unused import WITHOUT_MOMENTUM

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


def rates_of_torch(scheduler, optimizer, steps):
    """The learning rate of each step as one of torch's schedulers has it."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("fields", "create"),
    [
        (
            {"schedule": "one_cycle"},
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, total_steps=40, cycle_momentum=False),
        ),
        (
            {"schedule": "polynomial", "poly_power": 2.0},
            lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 40, power=2.0),
        ),
        (
            {"schedule": "cosine", "min_lr": 0.1},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1),
        ),
    ],
)
def test_schedules_are_torchs(fields, create):
    config = OptimConfig(epochs=8, lr=0.4, **fields)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    expected = rates_of_torch(create(optimizer), optimizer, 40)
    assert [learning_rate(config, step, 5) for step in range(40)] == pytest.approx(expected, rel=1e-9)


def test_a_polynomial_begins_after_the_warm_up_and_ends_at_its_floor():
    config = OptimConfig(epochs=10, lr=0.4, schedule="polynomial", min_lr=0.2, warmup_epochs=2)
    assert [learning_rate(config, step, 10) for step in (0, 19, 20, 60, 100)] == pytest.approx(
        [0.02, 0.4, 0.4, 0.3, 0.2]
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"min_lr": 1.0, "schedule": "cosine"}, r"min_lr \(1.0\) must be at most lr"),
        ({"schedule": "one_cycle", "warmup_epochs": 5}, "a warm-up of its own"),
    ],
)
def test_rates_that_do_not_fit_the_schedule_are_refused(tmp_path, fields, expected):
    with pytest.raises(UserError, match=expected):
        small_config(tmp_path, optim=fields)


def small_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )


def train_steps(network, optimizer, steps):
    """Optimiser steps of these numbers, whose gradients and rates are functions of the number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 0.01 * (1 + step))
        optimizer.step()


def test_weight_decay_can_leave_out_norms_and_biases():
    """Without a gradient a decayed parameter shrinks by lr x decay x (1 + momentum), and no other moves."""
    network = small_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = create_optimizer(network, OptimConfig(lr=0.1, weight_decay=0.5, decay_norms=False))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 * 1.9 if name in ("0.weight", "3.weight") else 1
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert len(optimizer.param_groups) == 2 and decayed_parameters(optimizer) == (2, 6)


def test_a_state_goes_to_its_parameters_however_they_are_grouped():
    network = small_network()
    plain = create_optimizer(network, OptimConfig())
    train_steps(network, plain, range(2))
    grouped = create_optimizer(network, OptimConfig(decay_norms=False))
    load_state(grouped, network, state_of(plain, network))
    again = create_optimizer(network, OptimConfig())
    load_state(again, network, state_of(grouped, network))
    for parameter in network.parameters():
        for optimizer in (grouped, again):
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"])
    assert state_of(plain, network)["state"].keys() == plain.state_dict()["state"].keys() == set(range(6))


@pytest.mark.parametrize("name", TIMM)
def test_an_optimiser_of_timm_resumes_to_the_same_bits(tmp_path, name):
    config = OptimConfig(optimizer=name, decay_norms=False, weight_decay=0.02)
    whole, cut = small_network(), small_network()
    train_steps(whole, create_optimizer(whole, config), range(6))
    first = create_optimizer(cut, config)
    train_steps(cut, first, range(3))
    torch.save(state_of(first, cut), tmp_path / "state.pt")
    second = create_optimizer(cut, config)
    load_state(second, cut, torch.load(tmp_path / "state.pt", weights_only=True))
    train_steps(cut, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("name", TIMM)
def test_those_without_momentum_are_known(name):
    group = create_optimizer(small_network(), OptimConfig(optimizer=name, momentum=0.77)).param_groups[0]
    assert (0.77 in group.values()) == (name not in WITHOUT_MOMENTUM) and not group.get("nesterov")


def test_lamb_follows_its_paper():
    """You et al. 2020, with timm's clipping of the gradient to norm 1 and no adaptation without weight decay, in float64."""
    network = small_network().double()
    config = OptimConfig(optimizer="lamb", weight_decay=0.02, decay_norms=False)
    optimizer = create_optimizer(network, config)
    assert momentum_text(optimizer) == "betas 0.9, 0.999, gradient norm at most 1.0"
    weights = [p.detach().clone() for p in network.parameters()]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, 5):
        gradients = [torch.randn_like(w) for w in weights]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        set_learning_rate(optimizer, 0.01 * step)
        optimizer.step()
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for i, gradient in enumerate(gradients):
            gradient = gradient / max(1, norm)
            m[i], v[i] = 0.9 * m[i] + 0.1 * gradient, 0.999 * v[i] + 0.001 * gradient**2
            update = m[i] / (1 - 0.9**step) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-6)
            if weights[i].dim() > 1:
                update = update + 0.02 * weights[i]
                update = update * weights[i].norm() / update.norm()
            weights[i] = weights[i] - 0.01 * step * update
    for parameter, weight in zip(network.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-9, atol=1e-12)


class NoteStart(Hook):
    """Notes the parameters before the first step."""

    changes_network = False

    def on_start(self, trainer):
        self.weights = {name: p.detach().clone() for name, p in trainer.run.network.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_is_clipped_to_its_norm(tmp_path, precision):
    """Before its microbatches are averaged it is not, and the loss scale does not count."""
    moved, norms = [], []
    optim = {"epochs": 1, "weight_decay": 0.0, "grad_accum_steps": 2}
    for limit in (None, 0.05):
        fields = {"data": {"synthetic_images": 12}, "train": {"precision": precision, "log_every": 1}}
        config = small_config(tmp_path / str(limit), optim={**optim, "clip_grad_norm": limit}, **fields)
        start = NoteStart()
        trainer.fit(config, hooks=[start])
        end = last_state(config)["model"]
        moved.append(torch.cat([(end[name] - before).flatten() for name, before in start.weights.items()]))
        norms.append(next(r["train/gradient_norm"] for r in records(config) if "train/gradient_norm" in r))
    assert norms[0] == norms[1] > 0.1
    first_step = 0.1 * 1.9  # Nesterov's from rest
    assert moved[0].norm().item() == pytest.approx(first_step * norms[0], rel=1e-3)
    assert moved[1].norm().item() == pytest.approx(first_step * 0.05, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0).item() == pytest.approx(1, abs=1e-5)
