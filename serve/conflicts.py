"""NVIDIA's ai-dynamo installs a package `dynamo.router` of its own: one environment cannot hold both."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["describe_conflict"]

_THEIRS = ("ai-dynamo", "ai-dynamo-runtime")


def describe_conflict() -> str | None:
    """What to tell the user when ai-dynamo is installed beside us, and None when it is not. Imports nothing of theirs."""
    our_root = Path(__file__).resolve().parent.parent
    installed = [f"{name} {found}" for name in _THEIRS if (found := _version(name)) is not None]
    spec = find_spec("dynamo.router")
    origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    hidden = origin is not None and origin.parent.parent != our_root
    if not installed and not hidden:
        return None
    found = " and ".join(installed) or f"another dynamo.router ({origin})"
    effect = f"dynamo.router is theirs ({origin})" if hidden else "installing or removing either may break the other"
    return (
        f"{found} is installed in this environment, and both projects own the package dynamo.router: {effect}. "
        "Install dynamo-kv into a virtual environment of its own"
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
