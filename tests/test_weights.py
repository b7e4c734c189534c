"""Weights of torchvision, timm, openmmlab and ports of the Torch code, in and out again to the bit."""

import argparse
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.utils
import torch
import torchvision
from conftest import REPOSITORY, photo, run_module, small_config, with_random_norms, write_class_folders
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import api, trainer
from pipeline.class_names import imagenet_ids
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.preprocessing import PREPROCESSING, assumption, preprocessing_of
from pipeline.weights import read_weights, write_safetensors, write_torch
from tools.convert import main as convert
from tools.predict import main as predict

pytestmark = pytest.mark.slow  # for the most part

CLASSES = 7


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    return with_random_norms(torchvision.models.densenet121(num_classes=CLASSES)).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def old_torchvision(state):
    def rename(name):
        for kind in ("norm", "conv"):
            for number in "12":
                if "denselayer" in name:
                    name = name.replace(f".{kind}{number}.", f".{kind}.{number}.")
        return name

    return {rename(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def openmmlab(state):
    """As mmpretrain/models/backbones/densenet.py and its linear head build it."""
    plan = [("features.conv0", "backbone.stem.0"), ("features.norm0", "backbone.stem.1")]
    for i, layers in enumerate((6, 12, 24, 16)):
        for j in range(layers):
            for part in ("norm1", "conv1", "norm2", "conv2"):
                plan.append(
                    (f"features.denseblock{i + 1}.denselayer{j + 1}.{part}", f"backbone.stages.{i}.block.{j}.{part}")
                )
        if i < 3:
            plan += [
                (f"features.transition{i + 1}.{part}", f"backbone.transitions.{i}.{part}") for part in ("norm", "conv")
            ]
    plan += [("features.norm5", "backbone.transitions.3.0"), ("classifier", "head.fc")]
    renamed = {
        f"{there}.{leaf}": state[f"{here}.{leaf}"]
        for here, there in plan
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if f"{here}.{leaf}" in state
    }
    assert len(renamed) == len(state)
    return {"meta": {"epoch": 90}, "state_dict": renamed}


def numbered(state):
    """A chain of numbered modules, as converters of Torch7 models write it; such files count no batches."""
    modules = OrderedDict()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            modules.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = value
    return {f"{i}.{leaf}": value for i, module in enumerate(modules.values()) for leaf, value in module.items()}


DRESSES = {
    "torchvision": (lambda state: state, ""),
    "torchvision before 0.3": (old_torchvision, "names translated"),
    "DistributedDataParallel": (
        lambda state: {f"module.{name}": value for name, value in state.items()},
        "names translated",
    ),
    "compiled, nested": (
        lambda state: {"epoch": 3, "model": {f"_orig_mod.{n}": v for n, v in state.items()}},
        "names translated",
    ),
    "openmmlab": (openmmlab, "names translated"),
    "numbered": (numbered, "names unknown, matched by order and shape"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dress", DRESSES)
def test_weights_of_others_give_their_logits(tmp_path, theirs, images, dress):
    make, note = DRESSES[dress]
    torch.save(make(theirs.state_dict()), tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth")
    assert (weights.config.model.name, weights.note) == ("densenet121", note)
    # Images are prepared as the weights' source does it; of the others the paper's filter is the nearest.
    others = dress in ("openmmlab", "numbered")
    assert weights.config.data == DataConfig(interpolation="torch7-bicubic" if others else "pil-bilinear")
    assert weights.classes == tuple("0123456") and weights.microbatches is None
    for name, value in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(weights.network.state_dict()[name], value), name
    with torch.no_grad():
        expected = theirs(images)
        assert (weights.network(images) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_timms_weights_and_the_way_to_timm_and_back(tmp_path):
    torch.manual_seed(0)
    network = with_random_norms(timm.create_model("densenet121", num_classes=CLASSES))
    torch.save({"state_dict": network.state_dict(), "arch": "densenet121"}, tmp_path / "timm.pth")
    read = read_weights(tmp_path / "timm.pth")
    write_torch(read, tmp_path / "ours.pth")
    again = timm.create_model("densenet121", num_classes=CLASSES, checkpoint_path=str(tmp_path / "ours.pth"))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
def test_the_way_to_torchvision_and_back_is_exact(tmp_path):
    torch.manual_seed(0)
    ours = with_random_norms(create_model("densenet169", CLASSES))
    torch.save(ours.state_dict(), tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth")
    assert read.config.model.name == "densenet169"
    write_safetensors(read, tmp_path / "b.safetensors")
    write_torch(read, tmp_path / "b.pth")
    for state in (load_file(tmp_path / "b.safetensors"), torch.load(tmp_path / "b.pth")):
        with torch.device("meta"):
            theirs = torchvision.models.densenet169(num_classes=CLASSES)
        assert not any(theirs.load_state_dict(state, assign=True))  # neither missing nor unexpected
        save_file(theirs.state_dict(), tmp_path / "c.safetensors")
        back = read_weights(tmp_path / "c.safetensors")
        assert all(torch.equal(value, ours.state_dict()[name]) for name, value in back.network.state_dict().items())


@pytest.mark.slow
def test_a_runs_weights_keep_what_is_known_of_them(tmp_path):
    config = small_config(tmp_path / "run", optim={"grad_accum_steps": 2})
    trainer.fit(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "best.pt"
    done = run_module("tools.convert", checkpoint, tmp_path / "out.safetensors")
    assert done.returncode == 0 and done.stdout.startswith("densenet_bc22_k8, 32,277 parameters, 3 classes: "), (
        done.stderr
    )
    a = read_weights(checkpoint)
    write_torch(a, tmp_path / "out.pth")
    assert a.config == config and a.microbatches == 2 and "images in a batch-norm statistic (6; paper 64)" in a.audit
    for suffix in ("safetensors", "pth"):
        b = read_weights(tmp_path / f"out.{suffix}")
        assert (a.config, a.classes, a.microbatches, a.audit) == (b.config, b.classes, b.microbatches, b.audit)
        assert not b.assumed
        assert all(torch.equal(value, b.network.state_dict()[name]) for name, value in a.network.state_dict().items())


def test_checkpoints_of_timms_training_script(tmp_path, theirs):
    """With its arguments and the average beside the weights."""
    average = timm.utils.ModelEmaV2(theirs)
    with torch.no_grad():
        average.module.classifier.bias.fill_(3)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(model="densenet121", lr=0.1)
    saver = timm.utils.CheckpointSaver(
        theirs, optimizer, arguments, average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(epoch=1, metric=80.0)
    for ema, bias in ((False, theirs.classifier.bias), (True, torch.full((CLASSES,), 3.0))):
        network = read_weights(tmp_path / "last.pth.tar", ema=ema).network
        assert torch.equal(network.classifier.bias, bias)


def test_no_tensor_is_taken_for_another(tmp_path, theirs):
    state, stray = theirs.state_dict(), {"head.fc.weight": torch.full((CLASSES, 1024), 9.0)}
    for file, both in (("a.pth", state | stray), ("b.pth", stray | state)):
        torch.save(both, tmp_path / file)
        with pytest.raises(UserError, match="'classifier.weight' twice"):
            read_weights(tmp_path / file, "densenet121")


@pytest.mark.parametrize("spoil", [torch.Tensor.to_sparse, lambda t: t.to(torch.complex64), lambda t: t.to("meta")])
def test_tensors_that_are_not_dense_and_real_are_refused(tmp_path, theirs, spoil):
    state = theirs.state_dict()
    torch.save(state | {"classifier.weight": spoil(state["classifier.weight"])}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="'classifier.weight' is sparse, quantized, complex or empty"):
        read_weights(tmp_path / "a.pth")


def test_a_file_of_any_size_is_only_looked_at(tmp_path):
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(2**39)  # takes no place on the disk
    with pytest.raises(UserError, match="no file of weights"):
        read_weights(tmp_path / "huge.pth")


def test_a_tensor_with_two_names_is_written_under_both(tmp_path):
    weights = read_weights(REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors")
    block = weights.network.features.denseblock1
    block.denselayer2.norm2 = block.denselayer1.norm2
    write_safetensors(weights, tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert torch.equal(*(written[f"features.denseblock1.denselayer{i}.norm2.bias"] for i in (1, 2)))


def test_names_of_classes_may_begin_with_a_byte_order_mark(tmp_path):
    """As of a text file that Windows has written."""
    weights = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"), encoding="utf-8-sig")
    done = run_module("tools.convert", weights, tmp_path / "a.safetensors", "--classes", tmp_path / "names.txt")
    assert done.returncode == 0 and read_weights(tmp_path / "a.safetensors").classes == tuple("abcdefghij"), done.stderr


def test_running_averages_of_weights_are_taken_on_request(tmp_path, theirs):
    average = torch.optim.swa_utils.AveragedModel(theirs)
    average.module.classifier.bias.data += 1
    torch.save({"model": theirs.state_dict(), "model_ema": average.state_dict()}, tmp_path / "a.pth")
    torch.save(theirs.state_dict(), tmp_path / "b.pth")
    save_file(theirs.state_dict(), tmp_path / "c.safetensors")
    found = read_weights(tmp_path / "a.pth", ema=True)
    assert torch.equal(found.network.classifier.bias, theirs.classifier.bias + 1) and found.averaged
    write_safetensors(found, tmp_path / "again.safetensors")
    assert read_weights(tmp_path / "again.safetensors", ema=True).averaged
    raw = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()} | {"steps": torch.tensor(7)}
    openmmlabs = {"state_dict": average.module.state_dict(), "ema_state_dict": raw}  # as its EMAHook writes them
    torch.save(openmmlabs, tmp_path / "d.pth")
    for ema, more in ((True, 1), (None, 1), (False, 0)):
        found = read_weights(tmp_path / "d.pth", ema=ema)
        assert torch.equal(found.network.classifier.bias, theirs.classifier.bias + more)
        assert found.averaged == bool(more)
    torch.save(
        {"state_dict": theirs.state_dict(), "ema_state_dict": average.state_dict()}, tmp_path / "e.pth"
    )  # as others
    for ema, more in ((True, 1), (None, 0), (False, 0)):
        bias = read_weights(tmp_path / "e.pth", ema=ema).network.classifier.bias
        assert torch.equal(bias, theirs.classifier.bias + more)
    with pytest.raises(UserError, match="no moving average"):
        read_weights(tmp_path / "c.safetensors", ema=True)
    with pytest.raises(UserError, match="no moving average"):
        read_weights(tmp_path / "b.pth", ema=True)


def test_networks_of_timm_come_with_timms_preprocessing(tmp_path):
    name = "tf_efficientnet_lite0"
    network = with_random_norms(timm.create_model(name))
    values = [value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")]
    torch.save({f"x{i}": value for i, value in enumerate(values)}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", f"timm:{name}")
    data = weights.config.data
    assert (data.mean, data.std, data.interpolation, data.crop_size, data.resize_size) == (
        (0.5,) * 3, (0.5,) * 3, "pil-bicubic", 224, 256,
    )  # fmt: skip
    assert weights.classes[:2] == ("n01440764", "n01443537") and len(weights.classes) == 1000
    state = weights.network.state_dict()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items() if value.dim())


def test_imagenets_ids_are_sorted():
    assert list(imagenet_ids()) == sorted(imagenet_ids()) and len(set(imagenet_ids())) == 1000


@pytest.mark.parametrize("name", ["regnetx_002", "resnetv2_50", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_own_names_are_left_alone(tmp_path, name, suffix):
    """Heads that are called as openmmlab's, that are convolutions, or that are not the only matrix."""
    network = timm.create_model(name, num_classes=CLASSES)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(network.state_dict(), path)
    weights = read_weights(path, f"timm:{name}")
    assert weights.note == "" and len(weights.classes) == CLASSES
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in weights.network.state_dict().items())


def test_modules_whose_tensors_come_in_another_order_are_refused(tmp_path, theirs):
    state = numbered(theirs.state_dict())
    modules = sorted({name.split(".")[0] for name in state}, key=int)
    order = ("running_mean", "running_var", "weight", "bias")
    permuted = {f"{m}.{leaf}": state[f"{m}.{leaf}"] for m in modules for leaf in order if f"{m}.{leaf}" in state}
    torch.save(permuted, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another architecture"):
        read_weights(tmp_path / "a.pth", "densenet121")


def test_small_networks_are_prepared_for_as_the_paper_does(tmp_path):
    torch.save(create_model("densenet_bc100_k12", 100).state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert (weights.data.crop_size, weights.data.resize_size, weights.data.mean) == (32, 32, (0.5071, 0.4867, 0.4408))
    assert weights.assumed == PREPROCESSING


@pytest.mark.parametrize(
    ("name", "outputs", "tensor", "whose"),
    [
        ("densenet121", 1000, "features.denseblock1.denselayer1.norm.1.weight", ""),
        # timm's are called so too
        ("densenet121", 1000, "features.denseblock1.denselayer1.norm1.weight", "torchvision's"),
        ("timm:test_resnet", 1000, "conv1.weight", ""),
        ("timm:densenet121", 1000, "features.conv0.weight", "timm's"),  # which timm has several sets of weights for
        ("densenet121", 1000, "backbone.stages.0.block.0.norm1.weight", "the paper's"),
        ("densenet121", 10, "features.denseblock1.denselayer1.norm1.weight", "torchvision's"),
        ("timm:test_resnet", 10, "conv1.weight", "timm's"),
        ("densenet_bc22_k8", 10, "features.denseblock1.denselayer1.norm1.weight", "CIFAR's"),
        ("msdnet_cifar_4", 10, "blocks.0.0.layers.0.0.weight", "CIFAR's"),
    ],
)
def test_how_images_are_prepared_is_known_or_said_to_be_assumed(name, outputs, tensor, whose):
    """Known of the files that torchvision offers, and where timm has one set of weights."""
    data, assumed = preprocessing_of(name, create_model(name, outputs), outputs, [tensor])
    said = assumption("a.pth", Config(model=ModelConfig(name=name), data=data), assumed, "--")
    assert bool(said) == bool(whose)
    if whose:
        numbers = ",".join(map(str, data.mean))
        assert said.startswith(f"a.pth does not say how its images are prepared. {whose} preparation is ASSUMED: ")
        assert f"--crop-size {data.crop_size} --interpolation {data.interpolation} --mean {numbers} --std " in said


def test_a_run_without_a_best_checkpoint_says_what_to_take(tmp_path, user_error):
    run, output = tmp_path / "run", tmp_path / "new" / "out.pth"
    last = run / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    (run / "log.txt").touch()

    def said() -> str:
        line = user_error(convert, run, output)
        assert line == user_error(predict, last.parent, "a.jpg")
        return line.removeprefix("error: ")

    assert said() == f"the run in {run} has saved no checkpoint yet: wait for the end of its first epoch"
    last.touch()
    first = "wait for the end of the first one"
    assert said() == f"no epoch of the run in {run} is validated yet: {first}, or give {last}"
    (run / "status.json").write_text('{"epoch": 1}')
    assert said() == f"the run in {run} has lost its checkpoints/best.pt: give {last}, its last checkpoint"
    assert not output.parent.exists()


def test_a_file_that_does_not_say_how_images_are_prepared_is_told_of_until_flags_say_it(tmp_path, monkeypatch, capsys):
    bare, converted = tmp_path / "bare.pth", tmp_path / "of a blank" / "converted.pth"
    torch.save(create_model("densenet_bc22_k8", 3).state_dict(), bare)

    def warned(tool, file, *words):
        model = ("--model", "densenet_bc22_k8") if file == bare else ()
        monkeypatch.setattr("sys.argv", [str(word) for word in ("tool", file, *words, *model)])
        tool()
        return capsys.readouterr().err

    (tmp_path / "names.txt").write_text("class0\nclass1\nclass2\n")
    said = warned(convert, bare, converted, "--classes", tmp_path / "names.txt")
    assert f"warning: {bare} does not say how its images are prepared. CIFAR's preparation is ASSUMED" in said
    assert (
        "--resize-size 32 --crop-size 32 --interpolation torch7-bicubic --mean 0.4914,0.4824,0.4467 --std 0.2" in said
    )
    assert "ASSUMED" in warned(convert, converted, tmp_path / "again.safetensors")  # a guess stays one

    sizes = ("--crop-size", 28, "--interpolation", "pil-bilinear")  # the resize size follows
    said = warned(convert, tmp_path / "again.safetensors", converted, *sizes, "--card", tmp_path / "card.md")
    assert "ASSUMED: --mean 0.4914,0.4824,0.4467 --std 0.2471,0.2435,0.2616 (if" in said
    card = (tmp_path / "card.md").read_text()
    assert (
        "| assumed | mean, std" in " ".join(card.split()) and f"python -m tools.evaluate '{converted}' --data" in card
    )
    photo(0, 40, 50).save(tmp_path / "a.jpg")
    assert "ASSUMED: --mean" in warned(predict, converted, tmp_path / "a.jpg")
    numbers = ("--mean", "0.5", "--std", "0.2,0.2,0.3")
    assert warned(predict, converted, tmp_path / "a.jpg", *numbers) == ""
    assert warned(convert, converted, tmp_path / "whole.pth", *numbers) == ""
    data = read_weights(tmp_path / "whole.pth").data
    assert (data.crop_size, data.resize_size, data.interpolation) == (28, 28, "pil-bilinear")
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.3))
    with pytest.warns(UserWarning, match="ASSUMED: .*python -m tools.convert with the right ones writes a file"):
        api.evaluate(converted, write_class_folders(tmp_path / "images", 3, 3), device="cpu")


def test_what_a_run_was_prepared_with_is_not_rewritten(tmp_path, user_error):
    shipped = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
    said = user_error(convert, shipped, tmp_path / "a.pth", "--mean", "0.5")
    assert said.endswith("says how the images of its run were prepared: leave out --mean")


def test_metadata_that_others_spoilt_are_refused(tmp_path):
    state = create_model("densenet_bc22_k8", 3).state_dict()
    for odd in (7, {"about": 7}, {"about": "{"}, {"about": '{"config": {}, "classes": [], "assumed": ["crop"]}'}):
        state._metadata["densenet-pipeline"] = odd
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(UserError, match="metadata that this version does not understand"):
            read_weights(tmp_path / "a.pth")


def test_preparations_that_this_project_does_not_know_are_refused(tmp_path):
    network = timm.create_model("efficientnet_b0", num_classes=CLASSES)
    network.pretrained_cfg["crop_mode"] = "squash"
    with pytest.raises(UserError, match="crop mode squash"):
        preprocessing_of("timm:efficientnet_b0", network, CLASSES)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hostile-was-here"),)


def wrong_files(folder: Path, state: dict) -> dict[str, str]:
    """File name -> what is said of it."""
    torch.save(state, folder / "whole.pth")
    content = (folder / "whole.pth").read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    old = (folder / "old.pth").read_bytes()
    (folder / "cut-old.pth").write_bytes(old[:5000])
    torch.save({0: torch.zeros(2)}, folder / "numbers.pth")
    about = {"config": [1], "classes": ["a"], "microbatches": None}
    save_file(state, folder / "about.safetensors", {"densenet-pipeline": json.dumps(about)})
    (folder / "text.pth").write_text("no weights at all, but a text")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "hostile.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"state_dict": Hostile()}, folder / "hostile-zip.pth")
    save_file(state, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-5])
    torch.save({"state_dict": state, "lr": np.float64(1)}, folder / "numpy.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    torch.save([1, 2], folder / "list.pth")
    other = torchvision.models.resnet18(num_classes=CLASSES).state_dict()
    torch.save(other, folder / "resnet.pth")
    torch.save(
        {name: value for name, value in state.items() if "denseblock4.denselayer3" not in name}, folder / "gap.pth"
    )
    return {
        "none.pth": "cannot read the weights",
        "cut.pth": "damaged, or no file of weights",
        "cut-old.pth": "no file of weights",
        "numbers.pth": "holds no state dictionary",
        "about.safetensors": "metadata that this version does not understand",
        "text.pth": "no file of weights",
        "empty.pth": "damaged, or no file of weights",
        "hostile.pth": "holds more than tensors and plain values",
        "hostile-zip.pth": r"holds more than tensors and plain values \(\S*getattr\): torch.save the state",
        "numpy.pth": r"holds more than tensors and plain values \(numpy\S+\): torch.save the state dictionary alone",
        "cut.safetensors": "damaged, or no safetensors file",
        "nothing.pth": "holds no state dictionary",
        "list.pth": "holds no state dictionary",
        "resnet.pth": "the weights of none of the paper's networks: name it with --model",
        "gap.pth": "10 of the network's 606 tensors are not there",
    }


@pytest.mark.slow
def test_wrong_files_get_one_line_and_run_no_code(tmp_path, monkeypatch, theirs, user_error):
    monkeypatch.chdir(tmp_path)
    for name, expected in wrong_files(tmp_path, theirs.state_dict()).items():
        with pytest.raises(UserError, match=expected) as error:
            read_weights(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("hostile-was-here").exists()
    with pytest.raises(UserError, match="give as many class names, not 10"):
        read_weights(tmp_path / "whole.pth", classes=tuple("abcdefghij"))
    with pytest.raises(
        UserError, match="another architecture: .* tensors are not there, as 'features.*; .* left over, as"
    ):
        read_weights(tmp_path / "resnet.pth", "densenet121")
    with pytest.raises(UserError, match="another architecture: .*: they are of densenet121: give --model densenet121$"):
        read_weights(tmp_path / "whole.pth", "densenet_bc22_k8")
    with pytest.raises(UserError, match="4 of the network's 606 tensors are not there") as error:
        gap = {n: v for n, v in theirs.state_dict().items() if "denseblock4.denselayer3.norm1" not in n}
        torch.save(gap, tmp_path / "gap.pth")
        read_weights(tmp_path / "gap.pth", "densenet121")
    (tmp_path / "twice.txt").write_text("a\nb\nb\n")
    for words, expected in (
        (("cut.pth", "out.safetensors"), "damaged"),
        (("whole.pth", "out.txt"), "the name must end in"),
        (("whole.pth", "out.pth", "--classes", "none"), "cannot read --classes none"),
        (("whole.pth", "out.pth", "--classes", "twice.txt"), "twice.txt has 'b' twice"),
    ):
        assert expected in user_error(convert, *(tmp_path / word if "." in word else word for word in words))


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
@pytest.mark.parametrize("odd", ["epoch", "features.conv0.scale", "head.extra.weight"])
def test_an_odd_tensor_is_named_and_the_others_are_known(tmp_path, prefix, odd):
    state = {prefix + name: value for name, value in create_model("densenet_bc40_k12", 5).state_dict().items()}
    torch.save({**state, odd: torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=f"more.pth .*: 1 is left over, as '{odd}'"):
        read_weights(tmp_path / "more.pth")
    missing = prefix + "features.norm5.weight"
    torch.save({name: value for name, value in state.items() if name != missing}, tmp_path / "less.pth")
    with pytest.raises(UserError, match="less.pth .*: 1 of the network's .* is not there, as 'features.norm5.weight'"):
        read_weights(tmp_path / "less.pth")
