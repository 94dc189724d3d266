"""The run: configuration, optimizer, the only training loop, exact checkpoints and the run folder; knows no model."""
