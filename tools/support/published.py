"""Published errors in percent, for comparison with own runs, and what they may stand beside."""

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex

# Number of test images of which the errors are; of ImageNet its validation images.
TEST_IMAGES = {"imagenet": 50_000, "cifar10": 10_000, "cifar100": 10_000, "svhn": 26_032, "fashion-mnist": 10_000}

# The paper's Table 2: C10, C10+, C100, C100+, SVHN.
COLUMNS = ("C10", "C10+", "C100", "C100+", "SVHN")
DENSENETS_ON_SMALL_IMAGES = {
    "densenet40_k12": (7.00, 5.24, 27.55, 24.42, 1.79),
    "densenet100_k12": (5.77, 4.10, 23.79, 20.20, 1.67),
    "densenet100_k24": (5.83, 3.74, 23.42, 19.25, 1.59),
    "densenet_bc100_k12": (5.92, 4.51, 24.15, 22.27, 1.76),
    "densenet_bc250_k24": (5.19, 3.62, 19.64, 17.60, 1.74),
    "densenet_bc190_k40": (None, 3.46, None, 17.18, None),
}
# Pre-activation ResNets by depth, as Table 2 quotes them: millions of parameters, C10+, C100+.
RESNETS_ON_SMALL_IMAGES = {164: (1.7, 5.46, 24.33), 1001: (10.2, 4.62, 22.71)}

# ImageNet's validation images, top-1 and top-5: the paper's Table 3 by number of crops; one crop of torchvision's weights with
# torchvision's own filter; and one crop of the ResNets of fb.resnet.torch's README, which Figure 3 shows.
DENSENETS_ON_IMAGENET = {
    1: {
        "densenet121": (25.02, 7.71),
        "densenet169": (23.80, 6.85),
        "densenet201": (22.58, 6.34),
        "densenet264": (22.15, 6.12),
    },
    10: {
        "densenet121": (23.61, 6.66),
        "densenet169": (22.08, 5.92),
        "densenet201": (21.46, 5.54),
        "densenet264": (20.80, 5.29),
    },
}
TORCHVISION_ON_IMAGENET = {
    name: (round(100 - top1, 3), round(100 - top5, 3))
    for name, top1, top5 in (
        ("densenet121", 74.434, 91.972),
        ("densenet169", 75.600, 92.806),
        ("densenet201", 76.896, 93.370),
        ("densenet161", 77.138, 93.560),
    )
}
# With which resize filter, to which short side, and crop they are.
PREPARED_IN_THE_PAPER, PREPARED_BY_TORCHVISION = ("torch7-bicubic", 256, 224), ("pil-bilinear", 256, 224)
RESNETS_ON_IMAGENET = {"resnet34": 26.73, "resnet50": 24.01, "resnet101": 22.44, "resnet152": 22.16}


def are_test_images(index: DatasetIndex, images: int | None) -> bool:
    """Whether an index may be of a whole test set: it has images of every class, and in all as many.

    Args:
        images: of the test set; None if that is not known.
    """
    return images in (None, len(index)) and len(set(index.labels.tolist())) == len(index.classes)


def prepared_as(data: DataConfig) -> tuple[str, int, int]:
    """With which resize filter, to which short side, and crop."""
    return data.interpolation, data.resize_size, data.crop_size
