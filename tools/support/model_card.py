"""A model card: what one must know of weights to use them, and where they come from."""

import shlex
from pathlib import Path

from pipeline.audit import frozen_text
from pipeline.weights import AVERAGED, RAW, Weights
from pipeline.words import counted
from tools.support.facts import multiply_accumulates, network_without_weights, parameters
from tools.support.markdown import table

FEW = 20  # classes that are all named


def model_card(weights: Weights, file: Path) -> str:
    """The card of weights in this file, as Markdown."""
    config, data = weights.config, weights.data
    bare = network_without_weights(config.model, len(weights.classes), data.channels)
    work = multiply_accumulates(bare, data.crop_size, data.channels)
    colors = "red, green and blue" if data.channels == 3 else f"gray, {data.depth} bits"
    turned = "applied" if data.exif_orientation else "ignored"
    drawn = "not known" if weights.audit is None else "drawn weights"
    begun_with = config.model.weights_text if config.model.weights else drawn
    rows = [
        [
            "network",
            f"{config.model.name}, {parameters(weights.network):,} parameters, {work / 1e6:,.0f} M multiply-accumulates",
        ],
        ["images", f"{colors}; EXIF orientation {turned}"],
        ["size", f"short side {data.resize_size}, centre crop {data.crop_size} pixels, filter {data.interpolation}"],
        ["normalisation", f"mean {_numbers(data.mean)}, standard deviation {_numbers(data.std)}"],
        [
            "outputs",
            f"{counted(len(weights.classes), 'class', 'classes')}, "
            f"{'one label' if data.labels == 'single' else 'any number of labels'} an image",
        ],
        ["classes", ", ".join(weights.classes[:FEW]) + (", ..." if len(weights.classes) > FEW else "")],
        ["trained on", _images_text(weights)],
        ["begun with", begun_with],
        ["trained up to", weights.trained or "not known"],
        ["training", weights.audit or "not known"],
    ]
    if config.train.ema_decay or weights.averaged:
        rows.append(["weights", AVERAGED if weights.averaged else RAW])
    if config.model.freeze is not None:
        rows.append(["did not train", frozen_text(config.model.freeze)])
    if weights.assumed:
        rows.append(["assumed", f"{', '.join(weights.assumed)}: the file that the weights come from does not say it"])
    lines = [f"# {file.name}", "", *table(["", "what"], rows, names=2), ""]
    lines.append(
        f"`python -m tools.evaluate {shlex.quote(str(file))} --data DIR --report REPORT` measures its error on your images."
    )
    return "\n".join([*lines, ""])


def _images_text(weights: Weights) -> str:
    """How many images the weights were trained on, and how many judged them."""
    if weights.measured is None:
        return "not known"
    training, validation = weights.measured.images
    data = weights.config.data
    skips = data.corrupt_images == "skip" and data.dataset == "images" and data.loader != "synthetic"
    trained_on = f"{counted(training, 'image')}{' (less any that do not decode)' if skips else ''}"
    if weights.epochs == 0:
        return f"{trained_on}, not all of them yet; not validated"
    if weights.config.data.holdout:
        return f"{trained_on}; {validation:,} more of the training set were held out to validate on"
    return f"{trained_on}; validated on {counted(validation, 'image')}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
