"""Numbers with their nouns and verbs."""


def counted(number: float, noun: str, plural: str = "") -> str:
    """``1 epoch``, ``0.5 epochs``, ``1,000 images``."""
    text = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    return f"{text} {agreed(number, noun, plural or f'{noun}s')}"


def agreed(number: float, singular: str, plural: str) -> str:
    """The word that goes with a number."""
    return singular if number == 1 else plural


def sizes_text(sizes: tuple[int, int]) -> str:
    """The smallest and the largest number as ``5 or 6``; one where they are the same."""
    smallest, largest = sizes
    return str(smallest) if smallest == largest else f"{smallest} or {largest}"
