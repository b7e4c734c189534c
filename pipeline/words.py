"""Numbers with their nouns."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 epoch``, ``2 epochs``, ``1,000 images``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
