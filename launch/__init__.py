"""Submits trainings to a cluster, and looks after them."""

import pipeline  # noqa: F401 - sets up torch's threads before torch is loaded
