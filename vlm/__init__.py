"""Classify images with small vision-language models: one forward pass for training, class probabilities and text."""

__version__ = "0.1.0"
