"""Run folders -> comparison -> verdict, tables and figures."""
