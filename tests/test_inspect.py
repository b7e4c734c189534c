"""tools.inspect: the paper's Table 1, and memory as counted by hand and in autograd's graph."""

import pytest
import torch
from conftest import run_module

from pipeline.errors import UserError
from pipeline.models import create_model, kernels
from tools import inspect
from tools.inspect import MODES, kept_bytes, stages_of

# Parameters, billions of multiply-accumulates, layers of the blocks.
IMAGENET = {
    "densenet121": (7_978_856, 2.834, (6, 12, 24, 16)),
    "densenet161": (28_681_000, 7.728, (6, 12, 36, 24)),
    "densenet169": (14_149_480, 3.360, (6, 12, 32, 32)),
    "densenet201": (20_013_928, 4.291, (6, 12, 48, 32)),
    "densenet264": (33_337_704, 5.752, (6, 12, 64, 48)),
}
# 12 layers of 197 tokens with 192 channels: query, key, value and projection; attention; the perceptron. Patches, head.
VIT_TINY = 12 * (4 * 197 * 192**2 + 2 * 197**2 * 192 + 8 * 197 * 192**2) + 196 * 768 * 192 + 192 * 1000
FLOAT = 4  # bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_stages_are_table_1(name):
    count, work, blocks = IMAGENET[name]
    stages = stages_of(create_model(name), 224)
    expected = [("convolution", 112, "7x7 conv, stride 2"), ("pooling", 56, "3x3 max pool, stride 2")]
    for i, (side, layers) in enumerate(zip((56, 28, 14, 7), blocks, strict=True), start=1):
        expected.append((f"dense block {i}", side, f"[1x1 conv, 3x3 conv] x {layers}"))
        if i < 4:
            expected.append((f"transition {i}", side, "1x1 conv"))
            expected.append((f"transition {i}", side // 2, "2x2 average pool, stride 2"))
    expected.append(("classification", 1000, "7x7 global average pool, 1000D fully-connected"))
    assert [(stage.name, stage.output[-1], stage.layers) for stage in stages] == expected
    assert all(stage.output[1] == stage.output[2] for stage in stages[:-1])
    assert sum(stage.parameters for stage in stages) == count
    assert sum(stage.multiply_accumulates for stage in stages) / 1e9 == pytest.approx(work, abs=1e-3)


def test_a_stages_figures_are_those_of_its_convolutions():
    convolution, block, transition, pooling, *_, classification = stages_of(create_model("densenet_bc10_k3", 7), 8)
    # 6 stem channels; a layer with 12 bottleneck channels adds 3; 9 become 4; maps of 8 x 8 pixels.
    assert (convolution.parameters, convolution.multiply_accumulates) == (6 * 27, 64 * 6 * 27)
    assert block.parameters == 2 * 6 + 6 * 12 + 2 * 12 + 12 * 3 * 9
    assert block.multiply_accumulates == 64 * (6 * 12 + 12 * 3 * 9)
    assert (transition.output, pooling.output) == ((4, 8, 8), (4, 4, 4))
    assert (transition.parameters, transition.multiply_accumulates) == (2 * 9 + 9 * 4, 64 * 9 * 4)
    assert (pooling.parameters, pooling.multiply_accumulates) == (0, 0)
    assert (classification.parameters, classification.multiply_accumulates) == (
        2 * 6 + 7 * 6 + 7,
        7 * 6,
    )  # 4+3=7, 3+3=6


@pytest.mark.parametrize(
    ("name", "count", "work"),
    [
        ("resnet50", 25_557_032, 4.089),
        ("vit_tiny_patch16_224", 5_717_416, VIT_TINY / 1e9),
        ("pit_ti_224", 4_847_272, 0.699),  # whose class token is an expanded parameter
    ],
)
def test_timms_networks_by_their_outermost_modules(name, count, work):
    stages = stages_of(create_model(f"timm:{name}"), 224)
    assert sum(stage.parameters for stage in stages) == count
    assert sum(stage.multiply_accumulates for stage in stages) / 1e9 == pytest.approx(work, abs=1e-3)
    by_name = {stage.name: stage for stage in stages}
    if name == "resnet50":
        assert (by_name["layer3"].output, by_name["layer3"].layers) == ((1024, 14, 14), "Sequential")
        assert "the rest" not in by_name
    elif name == "vit_tiny_patch16_224":  # the class token and the positions belong to no module
        assert by_name["the rest"].parameters == 192 * (1 + 197)


def whole_vectors(channels: int) -> int:
    """Channels of a row of the kernels' matrices."""
    lanes = kernels.vector_lanes(torch.float32)
    return -(-channels // lanes) * lanes


def counted_by_hand(images: int, side: int, dense_block: str, recompute: str) -> int:
    """Floats that a densenet_bc22_k6 keeps: three blocks of three layers, 12 stem channels."""
    growth, layers, channels = 6, 3, 12
    row = whole_vectors if dense_block == "fused" else int
    floats = 3 * images * side**2  # the images, which the first convolution keeps
    for block in range(3):
        pixels = images * side**2
        keeps_bottlenecks = recompute == "none" or (recompute == "first" and block > 0)
        if dense_block != "eager":
            out = channels + layers * growth
            floats += pixels * channels + pixels * row(out) + 2 * out  # input, maps, their mean and variance
            floats += layers * keeps_bottlenecks * pixels * row(4 * growth)
            floats += layers * 2 * 4 * growth * (dense_block == "fused")  # the bottlenecks' means and variances
            channels = out
        else:
            for _ in range(layers):  # of both norms: input, output after ReLU, mean and deviation
                floats += 2 * (pixels * channels + channels) + 2 * (pixels * 4 * growth + 4 * growth)
                channels += growth
            floats += 2 * (pixels * channels + channels)  # the transition's norm, or the last
        if block < 2:  # what the transition's convolution and its pooling keep, one after the other or the reverse
            side //= 2
            floats += images * side**2 * channels if dense_block != "eager" else pixels * (channels // 2)
            channels //= 2
    return floats + images * channels  # the classifier's input


@pytest.mark.parametrize(("dense_block", "recompute"), MODES)
def test_memory_is_what_a_count_by_hand_gives(dense_block, recompute):
    if dense_block == "fused" and kernels.unavailable_reason():
        pytest.skip(kernels.unavailable_reason())
    network = create_model("densenet_bc22_k6", 5, dense_block=dense_block, activation_checkpointing=recompute).train()
    images = torch.randn(3, 3, 16, 16)
    expected = FLOAT * counted_by_hand(3, 16, dense_block, recompute)
    assert kept_bytes(network.to(memory_format=torch.channels_last), images) == expected
    assert network.selection.method == dense_block


def in_the_graph(output: torch.Tensor) -> dict[int, int]:
    """Address -> bytes of all that the nodes of autograd's graph have saved."""
    found, seen, ahead = {}, set(), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in (*saved, *getattr(node, "saved_tensors", ())):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.slow
def test_memory_of_densenet121_is_what_lies_in_the_graph_and_shrinks_as_promised():
    network = create_model("densenet121").to(memory_format=torch.channels_last).train()
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}
    for network.dense_block, network.activation_checkpointing in MODES:
        output = network(images)
        expected = sum(size for address, size in in_the_graph(output).items() if address not in own)
        mode = network.dense_block, network.activation_checkpointing
        kept[mode] = kept_bytes(network, images)
        assert kept[mode] == expected, mode
    assert kept["eager", "none"] > 4 * kept["memory_efficient", "none"]
    for dense_block in {name for name, _ in MODES} - {"eager"}:
        none, first, every = (kept[dense_block, recompute] for recompute in ("none", "first", "all"))
        assert none > first > every
    # fused keeps the places of the stem's maxima, a byte each, and rounds rows up to whole vectors.
    if not kernels.unavailable_reason():
        assert kept["memory_efficient", "none"] < kept["fused", "none"] < 1.1 * kept["memory_efficient", "none"]


@pytest.mark.slow
def test_the_command_prints_the_table():
    done = run_module("tools.inspect", "densenet_bc22_k6", "--batch", 3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "densenet_bc22_k6: 32 x 32 pixels, 10 classes"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    cells = {row[0]: row for row in rows}
    network = create_model("densenet_bc22_k6", 10)
    assert cells["all"][3] == f"{sum(p.numel() for p in network.parameters()):,}"
    kept = FLOAT * counted_by_hand(3, 32, "eager", "none") / 3 / 2**20
    assert cells["eager"] == ["eager", "none", "eager", f"{kept:.1f}"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["densnet121"], "did you mean 'densenet121'"),
        (["densenet_bc101_k12"], "there is no network"),
        (["timm:resnet5"], "did you mean 'resnet50'"),
        (["densenet121", "--size", "16"], "cannot take 2 images of 16 x 16 pixels: "),
        (["densenet_bc22_k6", "--size", "4", "--batch", "1"], "cannot take 1 image of 4 x 4 pixels: "),
        (["densenet121", "--size", "0"], "a positive number is needed"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, words, expected):
    monkeypatch.setattr("sys.argv", ["tools.inspect", *words])
    with pytest.raises(UserError, match=expected) as error:
        inspect.main()
    assert "\n" not in str(error.value)
