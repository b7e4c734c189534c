"""DenseNet training at ImageNet scale: data, models, trainer and evaluation."""

import os

# GNU's OpenMP, which reads this when torch is loaded, has waiting threads spin for a long while. With another busy thread
# on the machine, such as a loader's, each parallel region then waits for the scheduler: a step takes ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
