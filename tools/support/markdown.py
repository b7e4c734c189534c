"""Markdown tables."""


def table(titles: list[str], rows: list[list[str]], names: int) -> list[str]:
    """Lines of a Markdown table whose first `names` columns are text and the others numbers."""
    rows = [[" ".join(cell.split("\n")).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [cell.ljust(width) for cell, width in zip(line[:names], widths[:names], strict=True)]
        + [cell.rjust(width) for cell, width in zip(line[names:], widths[names:], strict=True)]
        for line in (titles, rule, *rows)
    ]
    return [f"| {' | '.join(line)} |" for line in aligned]
