"""Leaf library of tile mathematics: tensors and ints in, tensors out. Imports nothing of fasttrain."""
