"""User errors: one line on stderr and exit code 2. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting that is not allowed; the message names the key, its value and what is allowed."""


class DataError(ValueError):
    """A data set, shard or sample that cannot be used; the message names it and gives the remedy."""


def require(key: str, value: Any, allowed: bool, wanted: str) -> None:
    """Raise ConfigError naming the key, its value and what is allowed, unless `allowed`."""
    if not allowed:
        raise ConfigError(f"{key} is {value!r}; it must be {wanted}")
