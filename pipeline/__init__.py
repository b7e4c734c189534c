"""DenseNet training at ImageNet scale: data, models, trainer and evaluation."""
