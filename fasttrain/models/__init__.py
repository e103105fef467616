"""The model families: width and depth to a module, its parameter count and its initial weights."""

from fasttrain.models.mlp import MLP, draw_weights, parameter_count

__all__ = ["MLP", "draw_weights", "parameter_count"]
