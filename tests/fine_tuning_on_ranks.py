"""As several ranks: train a run whole, and interrupted and resumed, in the same processes. Arguments: two configurations."""

import sys
from contextlib import nullcontext
from pathlib import Path

from pipeline import trainer
from pipeline.config_file import load_stored_config
from pipeline.distributed import init_distributed
from tests.training_hooks import InterruptAfter, InterruptionError

whole, cut = (load_stored_config(Path(word)) for word in sys.argv[1:])
with init_distributed("cpu") as world:
    trainer.init_distributed = lambda device: nullcontext(world)  # the ranks meet once
    trainer.fit(whole)
    try:
        trainer.fit(cut, hooks=[InterruptAfter(3)])
    except InterruptionError:
        trainer.fit(cut)
