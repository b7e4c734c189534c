"""Under torchrun: train the configurations that the arguments name, one after the other in the same processes.

Of a configuration called spike.yaml, images of the last rank are infinite in a step.
"""

import os
import sys
from pathlib import Path

from pipeline import trainer
from pipeline.config_file import load_stored_config
from tests.training_hooks import Spike

for word in sys.argv[1:]:
    spike = [Spike(step=1, rank=int(os.environ.get("WORLD_SIZE", 1)) - 1)] if Path(word).stem == "spike" else []
    trainer.fit(load_stored_config(Path(word)), spike)
