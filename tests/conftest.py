"""Settings of every test."""

import os

os.environ.setdefault("MOA_FFN_COMPILE", "0")  # compiling costs seconds a process; tests/ffn/test_compiled.py does it
