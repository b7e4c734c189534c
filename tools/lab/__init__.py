"""Laboratory commands: they measure this project and test what it survives. Nobody needs them to train or to evaluate."""

from pipeline.nvjpeg import load_nvjpeg

load_nvjpeg()  # before torchvision, which some of them import and which brings an older one
