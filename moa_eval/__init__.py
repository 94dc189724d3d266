"""Reads what training and evaluation left behind; trains nothing."""
