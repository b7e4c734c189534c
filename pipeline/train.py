"""Train a network: ``python -m pipeline.train CONFIG.yaml [--section.field VALUE ...]``, also under torchrun."""

import os
import sys

from pipeline.command import exit_on_user_error
from pipeline.preemption import exit_when_asked


def main() -> None:
    from pipeline.config_file import (
        parse_command_line,  # here, so that signals are heard before anything slow is imported
    )

    config, options = parse_command_line(
        sys.argv[1:],
        program="python -m pipeline.train",
        description="Train a network; a run that was interrupted goes on from its run directory.",
        options={
            "dry-run": {
                "action": "store_true",
                "help": "print the configuration and build everything, but do not train",
            }
        },
    )
    from pipeline import trainer  # after the command line is known to be right: torch takes seconds to import

    if not options.dry_run:
        trainer.fit(config)
        return
    description = trainer.dry_run(config)
    if os.environ.get("RANK", "0") == "0":
        print(description)


if __name__ == "__main__":
    exit_when_asked()
    exit_on_user_error(main)
