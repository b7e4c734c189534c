"""Commands around the pipeline, one a file."""
