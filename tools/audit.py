"""Compare a configuration with the paper: ``python -m tools.audit CONFIG.yaml [--ranks N] [--section.field VALUE ...]``.

With ``--recipe`` it is compared with the recipe that its published.recipe names.
"""

import sys
from typing import Any

from pipeline.audit import audit, to_markdown
from pipeline.batches import microbatches_of
from pipeline.command import exit_on_user_error, positive_integer
from pipeline.config_file import parse_command_line
from pipeline.history import batch_split
from pipeline.paper import setting_for
from pipeline.recipes import audit_recipe, recipe_of
from pipeline.words import counted


def main() -> None:
    flags: dict[str, dict[str, Any]] = {
        "ranks": {
            "type": positive_integer,
            "metavar": "N",
            "help": "[the paper's: ImageNet 4, others 1; the recipe's]",
        },
        "recipe": {"action": "store_true", "help": "compare with the recipe that published.recipe names"},
    }
    config, options = parse_command_line(sys.argv[1:], "python -m tools.audit", __doc__, flags)
    if options.ranks:
        microbatches_of(config, options.ranks, batch_split(options.ranks, config.optim.grad_accum_steps))
    if options.recipe:
        recipe = recipe_of(config)
        ranks = options.ranks or recipe.ranks
        title = f"{config.model.name} on {counted(ranks, 'rank')} beside {recipe.source}"
        print(to_markdown(audit_recipe(config, ranks), title, other=recipe.source))
        return
    setting = setting_for(config)
    ranks = options.ranks or setting.ranks
    title = f"{config.model.name} on {counted(ranks, 'rank')} beside {setting.paper}'s {setting.name} setting"
    print(to_markdown(audit(config, ranks * config.optim.grad_accum_steps), title, other=setting.paper))


if __name__ == "__main__":
    exit_on_user_error(main)
