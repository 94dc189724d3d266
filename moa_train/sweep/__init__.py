"""Many runs from one command: which there are, how each is doing, here or on a cluster, and one table of all."""
