"""Errors for missing libraries that name the extra which installs them."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require"]


def require(package: str, extras: str, *libraries: str) -> None:
    """Raise ImportError with the `pip install` command if a library that `package` imports is not installed.

    Args:
        package: Name of the importing package.
        extras: Comma-separated extras, each of which installs the libraries.
        libraries: Top-level modules.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        commands = " or ".join(f"pip install 'mixture-of-activations[{extra}]'" for extra in extras.split(","))
        raise ImportError(f"{package} needs {', '.join(missing)}, not installed: {commands}", name=missing[0])
