"""Commands around the pipeline, one a file."""

import pipeline  # noqa: F401 - before torch, whose threads it sets up
