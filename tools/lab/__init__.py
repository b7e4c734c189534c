"""Laboratory commands: they measure this project and test what it survives. Nobody needs them to train or to evaluate."""
