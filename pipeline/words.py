"""Numbers with their nouns and verbs."""


def counted(number: float, noun: str, plural: str = "") -> str:
    """``1 epoch``, ``0.5 epochs``, ``1,000 images``."""
    text = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    return f"{text} {agreed(number, noun, plural or f'{noun}s')}"


def agreed(number: float, singular: str, plural: str) -> str:
    """The word that goes with a number."""
    return singular if number == 1 else plural


def drawable(text: str) -> str:
    """A name for Matplotlib, which draws it as it is: dollar signs begin no formula, a first underscore hides nothing from a
    legend, and bytes of a file name that is not UTF-8 have marks."""
    text = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def sizes_text(sizes: tuple[int, int]) -> str:
    """The smallest and the largest number as ``5 or 6``; one where they are the same."""
    smallest, largest = sizes
    return str(smallest) if smallest == largest else f"{smallest} or {largest}"
