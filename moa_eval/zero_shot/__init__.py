"""Harness results -> comparison -> verdict, tables and figure."""
