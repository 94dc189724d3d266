"""Benchmarks of the layer, training, inference, data loading and evaluation: `python -m benchmarks --help`."""
