"""Networks: the DenseNets of the paper, and timm's by name."""

from pipeline.models.zoo import create_model, create_network

__all__ = ["create_model", "create_network"]
