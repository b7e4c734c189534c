"""Compare a configuration with the paper: ``python -m tools.audit CONFIG.yaml [--ranks N] [--section.field VALUE ...]``."""

import sys

from pipeline.audit import audit, setting_for, to_markdown
from pipeline.config import parse_command_line
from pipeline.errors import exit_on_user_error, positive_integer

PAPER_RANKS = 4  # the Torch code's GPUs


def main() -> None:
    ranks = {"type": positive_integer, "default": PAPER_RANKS, "metavar": "N", "help": f"[{PAPER_RANKS}]"}
    config, options = parse_command_line(sys.argv[1:], "python -m tools.audit", __doc__, {"ranks": ranks})
    title = f"{config.model.name} on {options.ranks} ranks beside the paper's {setting_for(config).name} setting"
    print(to_markdown(audit(config, options.ranks * config.optim.accumulation), title))


if __name__ == "__main__":
    exit_on_user_error(main)
