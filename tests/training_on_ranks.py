"""Under torchrun: train the configurations that the arguments name, one after the other in the same processes."""

import sys
from contextlib import nullcontext
from pathlib import Path

from pipeline import trainer
from pipeline.config_file import load_stored_config
from pipeline.distributed import init_distributed

with init_distributed("cpu") as world:
    trainer.init_distributed = lambda device: nullcontext(world)  # the ranks meet once
    for word in sys.argv[1:]:
        trainer.fit(load_stored_config(Path(word)))
