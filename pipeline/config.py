"""What a run is: the fields, as frozen dataclasses, with the paper's values as defaults.

A type says what a field takes, from a file and from the command line alike (config_file.py).
"""

import dataclasses
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline import renamed
from pipeline.errors import did_you_mean
from pipeline.followers import resize_with
from pipeline.parsing import (
    STRICT,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Number,
    PathText,
    Positive,
    PositiveFloat,
    PositiveRange,
    Probability,
    flatten,
    names_between_commas,
)
from pipeline.unused import WITHOUT_NESTEROV
from pipeline.words import counted

OfChannels = Annotated[tuple[Number, ...], Field(min_length=1, max_length=3)]
PositiveOfChannels = Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=3)]
Interpolation = Literal["torch7-bicubic", "pil-bilinear", "pil-bicubic"]
TrainCrop = Literal["random_resized_crop", "random_crop"]
Labels = Literal["single", "multi"]
Sampling = Literal["shuffle", "balanced"]
CorruptImages = Literal["stop", "skip"]
NotFinite = Literal["stop", "skip"]
BestBy = Literal["ema", "raw"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
ActivationCheckpointing = Literal["none", "first", "all"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Compile = Literal["auto", "none", "graphs", "default", "reduce-overhead", "max-autotune"]

# Fields of the data section that belong to weights, in groups that are given or taken over together.
OF_WEIGHTS = (("channels",), ("crop_size", "resize_size"), ("interpolation",), ("mean", "std"))

# Of the three colours' numbers, as all have the same share in a gray image.
MEAN_OF_GRAY, STD_OF_GRAY = (0.449,), (0.226,)


def _name_of_today(dense_block: str) -> str:
    if dense_block in renamed.VALUES["model.dense_block"]:
        raise ValueError(f"'{dense_block}' is now called '{renamed.VALUES['model.dense_block'][dense_block]}'")
    return dense_block


def _fraction(value: Any) -> Any:
    """1/3 of a command line or a file as a number."""
    if isinstance(value, str) and (parts := re.fullmatch(r"(\d+)/([1-9]\d*)", value.strip())):
        return int(parts[1]) / int(parts[2])
    return value


Milestone = NonNegative | Annotated[float, Field(gt=0, lt=1), BeforeValidator(_fraction)]


def _whole(value: Any) -> Any:
    """A number among others that a field may have, from a command line's word."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Channels = Annotated[Literal[1, 3], BeforeValidator(_whole)]
Depth = Annotated[Literal[8, 16], BeforeValidator(_whole)]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    name: str = "densenet121"
    """A network of pipeline/models/zoo.py, or timm:NAME."""
    dropout: Fraction = 0.0
    """Probability of dropping a unit after every convolution but the first (the paper: 0.2 without augmentation); of timm's
    networks what they call drop_rate, mostly before the classifier alone."""
    drop_path: Fraction = 0.0
    """Stochastic depth: probability of leaving out a block, of timm's networks that have it, which let it grow from 0 to
    this with depth."""
    dense_block: Annotated[str, AfterValidator(_name_of_today)] = "auto"
    """How our DenseNets compute: auto, eager, or a name in pipeline/models/backends.py. eager: module by module;
    memory_efficient: shared statistics, less memory; fused: C++ kernels for CPU (not fp16); auto: on CPU fused where it
    can be, else eager; on CUDA the fastest as measured at the start of a new run. All give the same result up to rounding."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Blocks whose bottlenecks memory_efficient, fused and triton compute again in the backward pass, for less memory."""
    weights: PathText | None = None
    """Weights to begin with: a file that tools.convert reads, or timm:NAME.TAG from timm's cache. All but a classifier for
    other classes must fit. A run that resumes does not read them again."""
    weights_sha256: str | None = None
    """SHA-256 that the file of model.weights must have; a run notes here that of the file."""
    freeze: NonNegative | None = None
    """Parts that do not train, batch-norm statistics included: 0: the stem; N: the stem and the first N blocks with the
    transitions after them."""

    @property
    def weights_text(self) -> str:
        """The file of the initial weights, and its checksum if that is known."""
        return f"{self.weights} (SHA-256 {self.weights_sha256})" if self.weights_sha256 else str(self.weights)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    dir: PathText = "data/imagenet"
    """Folder of the data set."""
    dataset: str = "images"
    """images: files of images, see data.train; else a data set of that name as torchvision keeps it in data.dir."""
    download: bool = False
    """Have torchvision fetch its data set if data.dir lacks it."""
    train: PathText = "train"
    """Training images, relative to data.dir: CLASS/IMAGE in a folder, tar or zip file; ILSVRC2012_img_train.tar as it is; a
    table (.csv, .tsv) with a header and a line an image; or WebDataset's shards, as train-{000000..000146}.tar."""
    val: PathText = "val"
    """Validation images, likewise; or without classes together with data.val_labels, as ILSVRC2012_img_val.tar."""
    val_labels: PathText | None = None
    """Labels of a flat validation set: a line 'CLASS' for each file in sorted order, lines 'FILE CLASS', or ImageNet's
    development kit (.tar.gz)."""
    file_column: str | None = None
    """Header of a table's column of files; none: known by its name, as file or image, else the first."""
    label_column: str | None = None
    """Header of a table's column of classes; none: known by its name, as label or class, or the only other one."""
    labels: Labels = "single"
    """single: each image has one class; multi: any number of labels. data.train and data.val are then CSV files in data.dir,
    with a header: a column of files and either one of names between |, or one of 0 and 1 for each class."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Mixup: two training images are added with shares from the Beta distribution of this parameter, as 0.1; 0: none."""
    cutmix_alpha: NonNegativeFloat = 0.0
    """Cutmix: a box of each of two training images comes from the other, its area from the Beta distribution of this
    parameter, as 1.0; 0: none."""
    mix_prob: Probability = 1.0
    """Probability that two images are mixed, where mixup or cutmix is on."""
    mix_switch_prob: Probability = 0.5
    """Probability of cutmix, and not mixup, where both are on."""
    sampling: Sampling = "shuffle"
    """shuffle: each image once an epoch; balanced: equally many images of each class, of the rare ones more than once."""
    loader: str = "auto"
    """native: C++, on CPU; dali: DALI, on GPU and CPU; reference: PIL, slow; auto: the first that can be used of dali and
    native for files on GPU, else of native and dali, and reference where neither can. synthetic: generated images, no files."""
    holdout: NonNegative = 0
    """Training images that are held out and validated on in place of data.val: the same whatever the seed."""
    corrupt_images: CorruptImages = "stop"
    """What an image that does not decode does to training. stop: ends it; skip: another of its batch replaces it, without
    counting, and a file that is no image is left out. Evaluation always ends, because an error is over all images."""
    hw_decoder_load: Fraction = 0.0
    """Share of the JPEG images that DALI gives to a GPU's hardware decoder, if it has one. That decoder's pixels differ
    slightly, and which images it gets depends on the batch: with 0 an image has the same pixels in every batch."""
    crop_size: Positive = 224
    """Side of the square that the network sees, in pixels."""
    resize_size: Positive = 256
    """Short side to which an image is resized before the evaluation crops, and the training crop random_crop, in pixels.
    Where crop_size changes alone it keeps its ratio to it."""
    train_crop_size: tuple[Positive, ...] = ()
    """Side of the square that the network sees in training, in pixels; none: crop_size. Several: one after the other, from
    data.train_crop_milestones on; random_crop first resizes in proportion."""
    train_crop_milestones: tuple[Positive, ...] = ()
    """Epochs after which training goes on to the next of several data.train_crop_size."""
    aug_repeats: Positive = 1
    """How often an epoch has each image that it takes, with other draws each time. It stays as long, and so takes a part
    of the images."""
    interpolation: Interpolation = "torch7-bicubic"
    """Resize filter. torch7-bicubic: the paper's (Catmull-Rom, align-corners, no antialias); pil-*: Pillow's,
    with antialias."""
    train_crop: TrainCrop = "random_resized_crop"
    """random_resized_crop: a random area and aspect ratio, resized to crop_size (the paper on ImageNet); random_crop: a
    random place in the image of resize_size with data.padding around it (the paper on CIFAR)."""
    padding: NonNegative = 4
    """Pixels on each side around an image for the training crop random_crop; of the mean colour, which becomes 0 where no
    colours are changed."""
    scale: PositiveRange = (0.08, 1.0)
    """Range of a random crop's area as a fraction of the image's."""
    ratio: PositiveRange = (3 / 4, 4 / 3)
    """Range of a random crop's aspect ratio."""
    hflip: bool = True
    """Flip each training image left to right with probability 0.5."""
    color_jitter: Fraction = 0.4
    """Brightness, contrast and saturation factors are drawn from 1 -+ this; 0 turns the jitter off."""
    pca_noise: NonNegativeFloat = 0.1
    """Standard deviation of the PCA colour noise (AlexNet's); 0 turns it off."""
    auto_augment: Literal["none", "randaugment", "randaugment-timm", "trivialaugment"] = "none"
    """Random operations on each training image, after crop and flip. randaugment, trivialaugment (wide): torchvision's;
    randaugment-timm: timm's rand-mM-nN-mstdS-inc1. The jitter and the noise above come after them unless they are off."""
    randaugment_ops: Annotated[Positive, Field(le=8)] = 2
    """Operations that RandAugment applies to an image, one after the other (in timm's space each with probability 0.5)."""
    randaugment_magnitude: NonNegative = 9
    """RandAugment's magnitude: of 30, in timm's space of 10."""
    randaugment_magnitude_std: NonNegativeFloat = 0.0
    """Standard deviation of the magnitude in timm's space."""
    warp_interpolation: Literal["nearest", "bilinear"] = "bilinear"
    """Filter of the operations that shear, shift and rotate."""
    cutout: NonNegative = 0
    """Side in pixels of a square of the mean colour at a random place in each training image; 0: none."""
    random_erasing: Probability = 0.0
    """Probability that a random rectangle of a training image is erased; 0: never."""
    erasing_scale: PositiveRange = (0.02, 1 / 3)
    """Range of the rectangle's area as a fraction of the crop's."""
    erasing_ratio: PositiveRange = (0.3, 1 / 0.3)
    """Range of its aspect ratio, height / width."""
    erasing_fill: Literal["zero", "noise"] = "zero"
    """What a pixel of it becomes. zero: the mean colour; noise: a normal random number in each colour (timm's mode pixel)."""
    mean: OfChannels = (0.485, 0.456, 0.406)
    """Mean that is subtracted from each channel, in [0, 1]: three numbers, or one with data.channels 1, where 0.449 is the
    default."""
    std: PositiveOfChannels = (0.229, 0.224, 0.225)
    """Standard deviation by which each channel is divided: three numbers, or one with data.channels 1, where 0.226 is the
    default."""
    channels: Channels = 3
    """3: images are red, green and blue; 1: gray (colours by their luma), and the network's first convolution has one
    channel."""
    depth: Depth = 8
    """Bits of a pixel's colour. 16: gray images of 16 bits are read as such, those of 8 bits as they are, and others are
    refused; with data.channels 1, through Pillow, and resized without rounding."""
    exif_orientation: bool = False
    """Turn images as their EXIF data say; false: they are read as stored, as the paper's code did."""
    from_weights: Annotated[tuple[str, ...], BeforeValidator(names_between_commas)] = ()
    """Fields of this section that a new run takes from the source of model.weights: of channels, crop_size and resize_size,
    interpolation, mean and std those that neither the file nor the command line gives."""
    threads: NonNegative = 0
    """Loader threads of each rank; 0: the machine's cores divided among its ranks."""
    synthetic_images: Positive = 1024
    """Number of training images of the synthetic loader; the first quarter of them are its validation images, too."""
    synthetic_classes: Positive = 10
    """Number of classes of the synthetic loader."""

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @model_validator(mode="before")
    @classmethod
    def _gray_has_a_mean_of_its_own(cls, given: Any) -> Any:
        keywords = getattr(given, "kwargs", None)  # pydantic's ArgsKwargs, where a program makes a DataConfig itself
        values = given if keywords is None else keywords
        if not isinstance(values, dict) or str(values.get("channels")) != "1" or {"mean", "std"} & values.keys():
            return given
        completed = {**values, "mean": MEAN_OF_GRAY, "std": STD_OF_GRAY}
        return completed if keywords is None else type(given)(given.args, completed)

    @model_validator(mode="after")
    def _numbers_are_of_the_channels(self) -> "DataConfig":
        for name in ("mean", "std"):
            if (numbers := len(getattr(self, name))) != self.channels:
                wanted = "one number" if self.channels == 1 else "three numbers"
                raise ValueError(f"{name} has {numbers} of them, and channels is {self.channels}: give {wanted}")
        return self

    @model_validator(mode="after")
    def _deep_images_are_gray_files(self) -> "DataConfig":
        if self.depth == 16 and self.channels != 1:
            raise ValueError("depth 16 is for gray images, as Pillow reads colours with 8 bits: set channels 1")
        if self.depth == 16 and (self.dataset != "images" or self.loader == "synthetic"):
            raise ValueError("depth 16 is for files of images: leave it out")
        if self.depth == 16 and self.auto_augment != "none":
            raise ValueError(
                f"auto_augment {self.auto_augment} computes with 8 bits, and depth is 16: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataConfig":
        if self.resize_size < self.crop_size:
            raise ValueError(f"resize_size ({self.resize_size}) must be at least crop_size ({self.crop_size})")
        return self

    @model_validator(mode="after")
    def _each_size_has_its_epochs(self) -> "DataConfig":
        milestones = self.train_crop_milestones
        if len(milestones) != max(0, len(self.train_crop_size) - 1):
            raise ValueError(
                f"train_crop_milestones has {counted(len(milestones), 'epoch')}, and train_crop_size "
                f"{counted(len(self.train_crop_size), 'size')}: "
                "give the epochs after which the next size begins"
            )
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("train_crop_milestones: each epoch must come after the one before")
        return self

    @model_validator(mode="after")
    def _magnitude_is_in_its_space(self) -> "DataConfig":
        greatest = 10 if self.auto_augment == "randaugment-timm" else 30
        if self.randaugment_magnitude > greatest:
            raise ValueError(f"randaugment_magnitude must be at most {greatest} with auto_augment {self.auto_augment}")
        return self

    @model_validator(mode="after")
    def _dataset_has_a_loader(self) -> "DataConfig":
        if self.dataset != "images" and self.loader == "synthetic":
            raise ValueError(f"dataset {self.dataset} has images of its own: loader cannot be synthetic")
        if self.dataset != "images" and self.val_labels:
            raise ValueError(f"dataset {self.dataset} has labels of its own: val_labels is for images")
        return self

    @model_validator(mode="after")
    def _several_labels_are_in_tables(self) -> "DataConfig":
        if self.labels == "multi":
            if self.dataset != "images" or self.loader == "synthetic":
                raise ValueError(
                    "labels multi is for files of images: set dataset images, and another loader than synthetic"
                )
            if self.val_labels:
                raise ValueError("with labels multi data.val is the file with the labels: leave out val_labels")
            if self.sampling == "balanced":
                raise ValueError("sampling balanced is for images with one class each: set optim.class_weights instead")
        return self

    @model_validator(mode="after")
    def _columns_are_of_tables(self) -> "DataConfig":
        named = [name for name in ("file_column", "label_column") if getattr(self, name)]
        if named and (self.labels == "multi" or self.dataset != "images" or self.loader == "synthetic"):
            raise ValueError(f"{named[0]} is for a table of files with one class each: leave it out")
        return self

    @model_validator(mode="after")
    def _of_weights(self) -> "DataConfig":
        known = [name for group in OF_WEIGHTS for name in group]
        for name in self.from_weights:
            if name not in known:
                raise ValueError(f"from_weights: weights have no '{name}'; choose {', '.join(known)}")
        return self

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Sides of the training crops, one after the other."""
        return self.train_crop_size or (self.crop_size,)

    @property
    def train_sizes_text(self) -> str:
        """The same, and from which epoch on."""
        first, *others = self.train_sizes
        later = zip(others, self.train_crop_milestones, strict=True)
        return ", ".join([str(first), *(f"{size} from epoch {epoch + 1} on" for size, epoch in later)])

    def of_epoch(self, epoch: int) -> "DataConfig":
        """This section as training takes it in an epoch: `crop_size` is the training crop's, `resize_size` in proportion."""
        if not self.train_crop_size:
            return self
        size = self.train_sizes[sum(epoch >= milestone for milestone in self.train_crop_milestones)]
        resize_size = resize_with(size, self.crop_size, self.resize_size)
        return dataclasses.replace(
            self, crop_size=size, resize_size=resize_size, train_crop_size=(), train_crop_milestones=()
        )


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    epochs: Positive = 90
    """Passes over the training set."""
    batch_size: Positive = 256
    """Images of one optimiser step, over all ranks."""
    objective: str = "cross_entropy"
    """What a step minimises, one of pipeline/objective.py."""
    class_weights: PathText | None = None
    """Weights of the classes in the loss: balanced (rare classes weigh as much as frequent ones), or a file with a line
    'CLASS WEIGHT' for each; with several labels an image, of a class's positive images."""
    optimizer: str = "sgd"
    """Optimiser: sgd (the paper), or one of timm's that pipeline/optim.py names, as lamb or adamw."""
    grad_accum_steps: Positive = 1
    """Gradient accumulation steps: forward and backward passes of a rank for one optimiser step."""
    lr: Annotated[PositiveFloat, Field(le=1e6)] = 0.1
    """Learning rate after warm-up."""
    head_lr: Annotated[PositiveFloat, Field(le=1e6)] | None = None
    """Learning rate of the classifier after warm-up, which follows the same schedule; none: optim.lr."""
    layer_decay: Annotated[PositiveFloat, Field(le=1)] = 1.0
    """Factor of the learning rate from each part of the network to the one before it: classifier, blocks, stem."""
    momentum: Fraction = 0.9
    """SGD momentum, without dampening; of timm's optimisers for those that have one."""
    nesterov: bool = True
    """Nesterov momentum, of sgd."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty on every parameter, batch-norm and biases included; of timm's optimisers their own kind of weight decay."""
    decay_norms: bool = True
    """Weight decay on norms and biases too (the paper); false: on parameters of two dimensions or more only."""
    clip_grad_norm: PositiveFloat | None = None
    """Scale the gradient of a step down to this norm where that of all parameters together is greater; none: never."""
    schedule: Literal["step", "cosine", "polynomial", "one_cycle"] = "step"
    """step: lr times lr_gamma at each milestone (the paper); cosine, polynomial: down to min_lr over all epochs; one_cycle:
    torch's OneCycleLR, from lr / 25 up to lr over 30 % of the steps, and down to lr / 250,000."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedules cosine and polynomial."""
    poly_power: PositiveFloat = 1.0
    """Exponent of the polynomial schedule; 1: a straight line."""
    milestones: tuple[Milestone, ...] = (30, 60)
    """Epochs after which the step schedule drops the learning rate, or fractions of all epochs (1/3, 0.5). Where epochs
    changes alone they keep their fractions; a run that resumes with more keeps them as they are."""
    lr_gamma: PositiveFloat = 0.1
    """Factor of each drop of the step schedule."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises linearly from 0 (the paper: none)."""
    label_smoothing: Fraction = 0.0
    """Label smoothing (the paper: none)."""
    bce_target_threshold: Fraction | None = None
    """Of the objective binary_cross_entropy: targets above it count as 1, all others as 0, after mixing; none: targets stay
    soft. It would undo label_smoothing."""
    large_batch: bool = False
    """Let lr follow batch_size in proportion, from the file's, else from 0.1 for 256 images, and warm up over 5 epochs, or a
    fifth of fewer than 25 (as Goyal et al. 2017, but from 0; there from the small batch's rate); a given lr or warmup_epochs
    stays."""
    fused: bool = True
    """On a GPU update the parameters in torch's fused kernel, with sgd: fewer launches, and in fp16 no wait for the scale."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "OptimConfig":
        if self.nesterov and not self.momentum and self.optimizer not in WITHOUT_NESTEROV:
            raise ValueError("nesterov needs momentum above 0")
        return self

    @model_validator(mode="after")
    def _smoothing_is_not_undone(self) -> "OptimConfig":
        if self.label_smoothing and self.bce_target_threshold is not None and self.objective != "cross_entropy":
            raise ValueError(
                "bce_target_threshold makes targets 0 or 1, which undoes label_smoothing: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _rates_fit_the_schedule(self) -> "OptimConfig":
        if self.schedule in ("cosine", "polynomial") and self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must be at most lr ({self.lr})")
        if self.warmup_epochs and self.schedule == "one_cycle":
            raise ValueError("the schedule one_cycle has a warm-up of its own: leave out warmup_epochs")
        return self

    @model_validator(mode="after")
    def _milestones_are_epochs(self) -> "OptimConfig":
        """Turn fractions into whole epochs, as followers.py does: rounded down, and a drop before the first epoch is none."""
        epochs: list[int] = []
        for drop in self.milestones:
            epoch = drop if isinstance(drop, int) else int(drop * self.epochs + 1e-9)
            if isinstance(drop, int) or (epoch and epoch not in epochs):
                epochs.append(epoch)
        object.__setattr__(self, "milestones", tuple(epochs))  # the dataclass is frozen for everybody else
        return self


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    device: Device = "auto"
    """auto: CUDA where there is a GPU."""
    precision: Precision = "fp32"
    """fp32 (the paper), tf32, or autocast to bf16 or fp16 (with loss scaling)."""
    memory_format: MemoryFormat = "auto"
    """Order of feature maps in memory. channels_last: NHWC; contiguous: NCHW; auto: channels_last; on CUDA in fp32 the faster
    as measured at the start of a new run, or contiguous, cuDNN's order without tensor cores, where nothing is measured."""
    compile: Compile = "auto"
    """How training passes over whole batches are started. none: kernel by kernel; graphs: as CUDA graphs, the same kernels with
    the same results; auto: the faster of the two on a GPU, as measured at the start of a new run, else none; the others are
    torch.compile's modes, of which the two last use CUDA graphs, too. An epoch's last batch, if it is smaller, and validation
    are computed as they are."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its kernels for each new shape and take the fastest; not with train.deterministic."""
    deterministic: bool = False
    """Allow kernels only that give the same bits each time on the same GPU; may be slower."""
    eval_batch_size: Positive = 64
    """Images a rank evaluates at once."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights (EMA) from step to step, as 0.9999; smaller in the first steps. 0:
    none. It is validated, saved and resumed beside the raw weights."""
    best_by: BestBy = "ema"
    """Which weights' validation error chooses best.pt, and stands in records as val/: ema, or raw; without train.ema_decay
    there are only raw ones."""
    log_every: Positive = 20
    """Steps between two log lines."""
    pictures_every: NonNegative = 10
    """Epochs between two sets of pictures in TensorBoard: a training batch with its classes, answers to validation images,
    feature reuse (the paper's Figure 5). The first and the last epoch have one; 0: none."""
    checkpoint_every: NonNegative = 0
    """Steps between two checkpoints within an epoch; 0: no such rule."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between two checkpoints within an epoch; 0: no such rule."""
    heartbeat_timeout: Annotated[Positive, Field(ge=5)] = 600
    """Seconds without progress after which a run ends and names the rank that the others wait for; more than a step or a
    save takes. The first step of a start may take an hour if it compiles (train.compile)."""
    allow_world_size_change: bool = False
    """Let a checkpoint resume with another number of ranks or gradient accumulation steps: the same batches and
    augmentation, but other batch-norm statistics."""
    change: Annotated[tuple[str, ...], BeforeValidator(names_between_commas)] = ()
    """Fields, by key, that may have another value than in the checkpoint that the run resumes from: optim.lr, say. The
    change is recorded in the run's history."""
    not_finite: NotFinite = "stop"
    """What a loss or a gradient that is not finite does. stop: ends the run; skip: leaves the step out, and says so; it
    waits for the device in each step. In fp16 the loss scaler leaves steps out by itself, until its scale is 1."""


@dataclass(frozen=True, config=STRICT)
class PublishedConfig:
    """Errors in percent that the paper (or the named source) reports, shown beside the run's own."""

    source: str | None = None
    """Where the figures are from."""
    recipe: str | None = None
    """The recipe that the configuration follows, one of pipeline/recipes.py; tools.audit --recipe compares with it."""
    images: tuple[Positive, ...] = ()
    """Numbers of training and validation images that they are of: they stand beside no others. None: beside any."""
    top1: Number | None = None
    """Single-crop top-1 error."""
    top5: Number | None = None
    """Single-crop top-5 error."""
    top1_10crop: Number | None = None
    """Ten-crop top-1 error."""
    top5_10crop: Number | None = None
    """Ten-crop top-5 error."""
    auroc: Number | None = None
    """Mean area under the ROC curve over the classes, from 0 to 1, where images have several labels."""


@dataclass(frozen=True, config=STRICT)
class Config:
    run_dir: PathText = ""
    """Folder of the run; a run resumes from what is there. Default: runs/NAME-OF-THE-CONFIG-FILE."""
    seed: Annotated[NonNegative, Field(lt=2**63)] = 1
    """Seed of everything random: initial weights, sample order, augmentation, dropout."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    published: PublishedConfig = PublishedConfig()

    @model_validator(mode="after")
    def _objective_is_for_these_labels(self) -> "Config":
        if self.optim.objective == "cross_entropy" and self.data.labels == "multi":
            raise ValueError(
                "optim.objective: cross_entropy is for data.labels single, and they are multi: set optim.objective "
                "binary_cross_entropy"
            )
        return self

    @model_validator(mode="after")
    def _each_size_is_reached(self) -> "Config":
        late = [epoch for epoch in self.data.train_crop_milestones if epoch >= self.optim.epochs]
        if late:
            raise ValueError(
                f"data.train_crop_milestones: epoch {late[0]} is never reached with optim.epochs {self.optim.epochs}: give "
                "earlier ones, or fewer sizes in data.train_crop_size"
            )
        return self

    @model_validator(mode="after")
    def _changed_fields_exist(self) -> "Config":
        known = flatten(dataclasses.asdict(self))
        for key in self.train.change:
            if key not in known:
                raise ValueError(
                    f"train.change: there is no field '{key}'{did_you_mean(key, known)}; name fields as optim.lr"
                )
        return self
