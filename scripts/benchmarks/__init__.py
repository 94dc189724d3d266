"""The benchmarks behind scripts/benchmark.py, one subject a file."""
