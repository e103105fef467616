"""Leaf library of tile mathematics: arrays and numbers only. Imports nothing of fasttrain."""
