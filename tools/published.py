"""Errors in percent that others have published, to draw our own runs among."""

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

# ImageNet validation, top-1, one crop: the paper's Table 3, and the ResNets of fb.resnet.torch's README, which Figure 3 shows.
DENSENETS_ON_IMAGENET = {"densenet121": 25.02, "densenet169": 23.80, "densenet201": 22.58, "densenet264": 22.15}
RESNETS_ON_IMAGENET = {"resnet34": 26.73, "resnet50": 24.01, "resnet101": 22.44, "resnet152": 22.16}
