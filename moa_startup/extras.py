"""Which extra of the package installs a library that is missing."""

from importlib.util import find_spec

__all__ = ["require"]


def require(package: str, extras: str, *libraries: str) -> None:
    """Raise ImportError with the `pip install` command if a library that `package` imports is not installed.

    Args:
        package: name of the importing package.
        extras: extras that bring the libraries, comma-separated; any one of them is enough.
        libraries: top-level modules.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        commands = " or ".join(f"pip install 'mixture-of-activations[{extra}]'" for extra in extras.split(","))
        raise ImportError(f"{package} needs {', '.join(missing)}, not installed: {commands}", name=missing[0])
