"""Training runs: run folders -> comparison -> verdict, tables and figures."""
