"""Training and evaluation of a network with several exits, through the same trainer as any other."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, override_flags, run_module, small_config
from test_additions import resumes_with_the_same_bits
from test_trainer import assert_equal_weights, last_state, records, weights

from pipeline.audit import audit, differences
from pipeline.config_file import load_config
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.data.synthetic import synthetic_index
from pipeline.distributed import World
from pipeline.evaluation import evaluate
from pipeline.joint_objective import JointObjective, for_all_exits
from pipeline.metrics import batch_sums
from pipeline.models import create_model
from pipeline.models.parts import classifier_of, freeze, parts_of
from pipeline.objective import BinaryCrossEntropy, CrossEntropy
from pipeline.paper import setting_for

pytestmark = pytest.mark.slow  # for the most part

CONFIGS = [
    path for path in sorted((REPOSITORY / "configs" / "msdnet").glob("*.yaml")) if path.stem != "fashion-mnist-msdnet"
]
SMALL = {"model": {"name": "msdnet_cifar_budget_2"}}


def test_a_run_records_the_errors_of_each_exit_and_resumes_with_the_same_bits(tmp_path, capsys):
    state = resumes_with_the_same_bits(tmp_path, **SMALL)
    said = capsys.readouterr().out
    config = small_config(tmp_path / "cut", **SMALL)
    last = [record for record in records(config) if "val/top1_error" in record][-1]
    for part in ("val/", "epoch/train_"):
        assert last[f"{part}exit2_top1_error"] == last[f"{part}top1_error"] and f"{part}exit3_top1_error" not in last
    errors = [last["val/exit1_top1_error"], last["val/exit2_top1_error"]]
    assert state["progress"]["last_exit_errors"] == errors
    assert f", exits {errors[0]:.2f} / {errors[1]:.2f} % (11 images)" in said  # of the epoch's line
    summary = next(line for line in said.splitlines() if line.startswith("last (epoch 2 of 2)"))
    assert summary.endswith(f", exits {errors[0]:.2f} / {errors[1]:.2f} %")
    assert "exit1_top1_error" in str(sorted(key for key in records(config)[0] if key.startswith("train/")))

    # The recorded validation errors are those that the saved network makes.
    network = create_model("msdnet_cifar_budget_2", num_classes=3).eval()
    network.load_state_dict(state["model"])
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
    index = synthetic_index(11, 3, 16, "val")
    loader = EvaluationLoader(index, config.data, Shard(0, 1, torch.device("cpu"), 1), batch_size=4, crops=1)
    wrong, loss, seen = np.zeros(2), 0.0, 0
    with torch.inference_mode():
        for batch in loader.batches():
            outputs = network(batch.images)
            wrong += [(output.argmax(dim=1) != batch.labels).sum().item() for output in outputs]
            loss += sum(F.cross_entropy(output, batch.labels, reduction="sum").item() for output in outputs)
            seen += len(batch.labels)
    assert errors == pytest.approx((100 * wrong / seen).tolist())
    assert last["val/loss"] == pytest.approx(loss / seen, rel=1e-5)  # the sum over the exits, as the training's
    assert "\nlosses are sums over 2 exits" in re.sub(r"(?m)^[-\d]+ [:\d]+ ", "", said)
    ten = evaluate(
        network,
        EvaluationLoader(index, config.data, Shard(0, 1, torch.device("cpu"), 1), batch_size=4, crops=10),
        world,
        "softmax",
    )
    assert ten.exits.shape == (11, 2) and (ten.exits[:, 1] == ten.top5[:, 0]).all()


def test_the_loss_is_the_sum_over_the_exits():
    torch.manual_seed(0)
    outputs, labels = [torch.randn(5, 3) for _ in range(3)], torch.tensor([0, 1, 2, 0, 1])
    batch = SimpleNamespace(labels=labels, partners=None)
    one = CrossEntropy(label_smoothing=0.1)
    one.class_weights = torch.tensor([1.0, 2, 3])
    expected = sum(
        F.cross_entropy(o, labels, reduction="none", label_smoothing=0.1) * one.class_weights[labels] for o in outputs
    )
    joint = JointObjective(one)
    torch.testing.assert_close(joint.losses(outputs, batch), expected)
    assert torch.equal(joint.logits(outputs), torch.stack(outputs, dim=1))
    several = SimpleNamespace(labels=torch.tensor([[1, 0, 1]] * 5, dtype=torch.uint8), partners=None)
    binary = BinaryCrossEntropy(0.0)
    expected = sum(binary.losses(o, several) for o in outputs)
    torch.testing.assert_close(JointObjective(binary).losses(outputs, several), expected)
    assert for_all_exits(one, create_model("densenet_bc22_k8", 3)) is one


def test_sums_of_a_batch_count_each_exit_where_images_count():
    logits = torch.tensor([[[2.0, 1], [1, 2]], [[1, 2], [1, 2]], [[1, 2], [2, 1]]])  # 3 images, 2 exits
    sums = batch_sums(logits, torch.tensor([0, 1, 1]), torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 1, 0]))
    assert sums.tolist() == [2, 1, 2, 3, 2, 1]
    ties = torch.randint(3, (2000, 2, 9)).bfloat16()  # of which topk and argmax take different ones
    _, right, _, _, _, last = batch_sums(ties, torch.randint(9, (2000,)), torch.ones(2000), torch.ones(2000)).tolist()
    assert right == last
    several = batch_sums(logits, torch.tensor([[0, 1], [1, 1], [1, 0]]), torch.ones(3), torch.ones(3))
    assert (
        several.tolist()
        == batch_sums(logits[:, 1], torch.tensor([[0, 1], [1, 1], [1, 0]]), torch.ones(3), torch.ones(3)).tolist()
    )


def test_two_ranks_take_the_steps_of_one_rank_with_two_passes(tmp_path):
    spread, alone = (small_config(tmp_path / name, **SMALL, optim={"epochs": 1}) for name in ("spread", "alone"))
    for config, ranks in ((spread, 2), (alone, 1)):
        flags = [*override_flags(config), "--optim.grad_accum_steps", 2 // ranks]
        done = run_module("pipeline.train", "configs/demo.yaml", *flags, ranks=ranks, cores=1)
        assert done.returncode == 0, done.stderr
    learned = [
        {n: w for n, w in weights(c).items() if "running" not in n and "batches" not in n} for c in (spread, alone)
    ]
    assert_equal_weights(*learned)
    trained = [record["epoch/train_exit1_top1_error"] for c in (spread, alone) for record in records(c)[-1:]]
    assert trained[0] == trained[1]
    assert len(last_state(spread)["epoch_metrics"]["by_rank"]) == 2


def test_its_parts_are_the_stem_the_blocks_and_the_classifiers():
    network = create_model("msdnet_cifar_budget_3", num_classes=3)
    part = parts_of(network, "network")
    numbers = {entry: number for entry, number in part.items() if entry.endswith("weight")}
    assert {number for entry, number in numbers.items() if entry.startswith("blocks.0.0.")} == {0}
    assert numbers["blocks.0.1.layers.0.conv_normal.net.0.weight"] == 1
    assert numbers["blocks.2.0.layers.0.conv_normal.net.0.weight"] == 3
    assert {number for entry, number in numbers.items() if entry.startswith("classifier.")} == {4}
    assert classifier_of(network) == tuple(f"classifier.{i}.linear" for i in range(3))
    freeze(network, 1, "network")
    still = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in network.named_parameters() if name.startswith("blocks.0.")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_the_msdnet_papers(path):
    config = load_config(path)
    setting = setting_for(config)
    assert setting.paper == "the MSDNet paper"
    assert differences(audit(config, setting.ranks)) == []
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=7))
    assert [row.part for row in differences(audit(other, setting.ranks))] == ["epochs", "learning-rate schedule"]
