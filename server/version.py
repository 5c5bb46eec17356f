"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version

UNINSTALLED = "0+source"


def own_version() -> str:
    """As installed; `UNINSTALLED` where only the source folder is on the path."""
    try:
        return version("mat-steer")
    except PackageNotFoundError:
        return UNINSTALLED
