"""Comparison of lm-eval results: reader, paired tests, and the page section with verdict, tables and figure."""
