"""Where a model that was asked for lies, and the name it has unless it is given another."""

import stat
from difflib import get_close_matches
from pathlib import Path

from dynamo.serve import demo
from dynamo.serve.config import DEMO_MODEL
from dynamo.serve.errors import ConfigError
from dynamo.serve.path_refusal import path_refusal

__all__ = ["find_model"]

_WORDS = {
    "config": "which prints the settings",
    "frontend": "which serves the workers of other processes",
    "worker": "which computes for a front",
    DEMO_MODEL: "the small model that is included",
}


def find_model(path: str) -> tuple[Path, str]:
    """The folder of the MODEL argument, and the model's default name.

    Raises:
        ConfigError: there is no such folder.
    """
    if path == DEMO_MODEL:
        return Path(demo.__file__).parent / "model", DEMO_MODEL
    try:
        folder = Path(path).expanduser()
        mode = folder.stat().st_mode
    except (FileNotFoundError, RuntimeError):  # or there is no such user
        mode = 0
    except OSError as error:
        raise ConfigError(f"MODEL {path!r}: {path_refusal(folder, error, 'read')}") from error
    if not stat.S_ISDIR(mode):
        close = get_close_matches(path, _WORDS, n=1)
        hint = f"did you mean {close[0]!r}, {_WORDS[close[0]]}? Else " if close else ""
        raise ConfigError(
            f"MODEL {path!r} is no folder; {hint}give a local Hugging Face folder "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    return folder, folder.resolve().name
