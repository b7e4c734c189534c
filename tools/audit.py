"""Compare a configuration with the paper: ``python -m tools.audit CONFIG.yaml [--ranks N] [--section.field VALUE ...]``."""

import sys

from pipeline.audit import audit, setting_for, to_markdown
from pipeline.config import parse_command_line
from pipeline.errors import UserError, exit_on_user_error

PAPER_RANKS = 4  # the Torch code's GPUs


def main() -> None:
    words, ranks = _take_ranks(sys.argv[1:])
    config, _ = parse_command_line(words, "python -m tools.audit", f"{__doc__} Ranks: {PAPER_RANKS} unless given.")
    parts = ranks * config.optim.accumulation
    title = f"{config.model.name} on {ranks} ranks beside the paper's {setting_for(config).name} setting"
    print(to_markdown(audit(config, parts), title))


def _take_ranks(words: list[str]) -> tuple[list[str], int]:
    """Take ``--ranks N`` out of the words; everything else belongs to the configuration."""
    if "--ranks" not in words:
        return words, PAPER_RANKS
    at = words.index("--ranks")
    value = words[at + 1] if at + 1 < len(words) else ""
    if not value.isdigit() or int(value) == 0:
        raise UserError(f"--ranks: a positive number is needed (got '{value}')")
    return words[:at] + words[at + 2 :], int(value)


if __name__ == "__main__":
    exit_on_user_error(main)
