"""Evaluation of a trained encoder: k nearest neighbours, linear probe, fine-tuning."""
