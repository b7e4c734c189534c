"""Compare a configuration with the paper: ``python -m tools.audit CONFIG.yaml [--ranks N] [--section.field VALUE ...]``."""

import sys

from pipeline.audit import audit, setting_for, to_markdown
from pipeline.config import parse_command_line
from pipeline.errors import exit_on_user_error, positive_integer


def main() -> None:
    flag = {"type": positive_integer, "metavar": "N", "help": "[the paper's: ImageNet 4, others 1]"}
    config, options = parse_command_line(sys.argv[1:], "python -m tools.audit", __doc__, {"ranks": flag})
    setting = setting_for(config)
    ranks = options.ranks or setting.ranks
    title = (
        f"{config.model.name} on {ranks} rank{'s' if ranks > 1 else ''} beside {setting.paper}'s {setting.name} setting"
    )
    print(to_markdown(audit(config, ranks * config.optim.grad_accum_steps), title))


if __name__ == "__main__":
    exit_on_user_error(main)
