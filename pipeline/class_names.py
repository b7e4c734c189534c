"""ImageNet's classes: their WordNet ids, and what they are called in English."""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

WORDNET_ID = re.compile(r"n\d{8}")


def human_names(classes: Sequence[str]) -> dict[str, str]:
    """All English names, between commas, of the classes that are WordNet ids."""
    ids = [name for name in classes if WORDNET_ID.fullmatch(name)]
    if not ids:
        return {}
    from timm.data import ImageNetInfo  # takes seconds to import

    names, info = {}, ImageNetInfo()
    for name in ids:
        with suppress(KeyError):  # an id that timm does not know
            names[name] = info.label_name_to_description(name)
    return names


def short_names(classes: Sequence[str]) -> list[str]:
    """One name for each class, no two alike: its first English one, with the id where several classes have that; or its own."""
    known = human_names(classes)
    first = [known[name].split(", ")[0] if name in known else name for name in classes]
    count = Counter(first)
    return [short if count[short] == 1 else f"{short} ({name})" for name, short in zip(classes, first, strict=True)]


def imagenet_ids() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1000 classes, in the order of the outputs of everyone's networks."""
    from timm.data import ImageNetInfo  # takes seconds to import

    return tuple(ImageNetInfo("imagenet-1k").label_names())
