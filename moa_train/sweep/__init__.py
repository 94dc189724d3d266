"""Sweeps: the cross product of configs, values and seeds, run on this machine or on a Slurm cluster."""
