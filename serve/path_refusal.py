"""Why the system refuses a path that the user gave, and the way out, in the words of an error message."""

import errno
import os
from pathlib import Path
from typing import Literal

__all__ = ["Use", "path_refusal"]

Use = Literal["read", "write", "folder"]
"""What was tried: to read a file, to write one, or to use a folder, which is made where it is missing."""


def path_refusal(path: Path, error: OSError, use: Use) -> str:
    """What is wrong and what to do about it, to be put behind the flag and the path, such as "--key-log /logs/keys: "."""
    missing = _missing_folder(path)
    match error.errno:
        case errno.ENOENT if use == "read" and missing is None:
            return "there is no such file; check the path"
        case errno.ENOENT if missing is not None:
            return f"there is no folder {missing}; {'check the path' if use == 'read' else 'make it, or give another path'}"
        case errno.ENOENT:  # as in /proc, or where a link leads nowhere
            return f"nothing can be made there in {path.parent}; give another path"
        case errno.EISDIR:
            return "this is a folder; give the path of a file"
        case errno.EEXIST | errno.ENOTDIR:
            obstacle = _obstacle(path)
            return f"{'this' if obstacle == path else obstacle} is no folder; give another path"
        case errno.EACCES | errno.EPERM:
            verb = "read it" if use == "read" else "write there"
            return f"this user (uid {os.geteuid()}) may not {verb}; give it the permission, or give another path"
        case errno.EROFS:
            return "the file system there is read-only; give another path"
        case errno.ENOSPC | errno.EDQUOT:
            return "no space is left there; free some, or give another path"
        case errno.ENAMETOOLONG:
            return "the name is longer than the file system allows; give a shorter one"
        case _:
            return f"{error.strerror or error}; see to that, or give another path"


def _missing_folder(path: Path) -> Path | None:
    """The first of the folders above `path` that is not there."""
    return next((folder for folder in reversed(path.parents) if not os.path.lexists(folder)), None)


def _obstacle(path: Path) -> Path:
    """What lies in the way of a folder, such as a file of its name."""
    return next((part for part in (path, *path.parents) if os.path.lexists(part) and not os.path.isdir(part)), path)
