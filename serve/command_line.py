"""The command line of `python -m dynamo.serve`: flags made from the settings, grouped as they are."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from dynamo.serve.config import SECTIONS, Config, LoadedConfig, load_config
from dynamo.serve.errors import ConfigError
from dynamo.serve.options import Option, file_path, switch
from dynamo.serve.roles import Role, check_role, settings_of

__all__ = ["Command", "parse_command_line"]

_PROGRAM = "python -m dynamo.serve"
_PARTS: Final = {Role.SERVER: "[frontend | worker] ", Role.FRONTEND: "frontend ", Role.WORKER: "worker "}
_FIRST_WORDS: Final = ("config", Role.FRONTEND.value, Role.WORKER.value)
_DESCRIPTIONS: Final = {
    Role.SERVER: "Serves a language model over a tiered KV cache, with OpenAI's API. One process does all, unless --workers "
    "says how many compute. 'frontend' starts only the front of workers that are found in --discovery DIR; 'worker' "
    "starts one of those. Each has a --help of its own.",
    Role.FRONTEND: "The front alone: takes the clients' requests, and sends each to one of the workers that register in "
    "--discovery DIR, or of the servers of other makes that --external names. It computes nothing.",
    Role.WORKER: "One worker alone: computes what the fronts that look for it in --discovery DIR send. No client reaches it.",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What the user asked for: to serve as this part of a server, or only to see the configuration."""

    role: Role
    loaded: LoadedConfig
    show_config: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        close = get_close_matches(unknown, list(self._option_string_actions), n=1) if unknown.startswith("--") else []
        if close:
            message = f"{message}; did you mean {close[0]}?"
        raise ConfigError(f"{message}; see {_PROGRAM} --help")


def parse_command_line(arguments: Sequence[str]) -> Command:
    """Reads flags and the TOML file they may name. `--help` prints and exits.

    Raises:
        ConfigError: a flag, key or value is not accepted.
    """
    rest = list(arguments)
    show_config = rest[:1] == ["config"]
    if show_config:
        del rest[0]
    role = Role.SERVER
    if rest and rest[0] in (Role.FRONTEND.value, Role.WORKER.value):
        role = Role(rest.pop(0))
    namespace = vars(_parser(role).parse_args(rest))
    _check_first_word(namespace.get("model.path"))
    file = _config_file(namespace.pop("config"))
    flags: dict[str, Any] = {key: value for key, value in namespace.items() if value is not None}
    loaded = load_config(file, flags)
    check_role(role, loaded)
    return Command(role, loaded, show_config)


def _check_first_word(model: str | None) -> None:
    """A part that is named behind flags would pass for a model, and its flags for mistakes."""
    if model in _FIRST_WORDS and not Path(model).is_dir():
        raise ConfigError(f"{model!r} comes first, before all flags: {_PROGRAM} {model}; see {_PROGRAM} --help")


def _config_file(value: str | None) -> Path | None:
    try:
        return None if value is None else file_path.parse(value)
    except ValueError as error:
        raise ConfigError(f"--config: {value!r} is not accepted; accepted is {error}") from None


def _parser(role: Role) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [config] {_PARTS[role]}[MODEL] [flags]",
        description=_DESCRIPTIONS[role],
        epilog=f"'{_PROGRAM} config [flags]' prints the effective configuration as TOML and where each value came from.",
        allow_abbrev=False,
    )
    taken = settings_of(role)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings; flags win over it")
    defaults = Config()
    for section, entries in SECTIONS.items():
        group = parser.add_argument_group(section.capitalize())
        for entry in entries:
            arguments: dict[str, Any] = {
                "metavar": entry.metavar,
                "help": _help(entry, getattr(getattr(defaults, section), entry.name)).replace("%", "%%"),
                "default": None,
            }
            key = f"{section}.{entry.name}"
            if key not in taken:
                arguments["help"] = argparse.SUPPRESS  # read all the same, so that the refusal can say where it belongs
            if entry.flag is None:
                group.add_argument(key, nargs="?", **arguments)
            elif entry.notation.is_list:
                group.add_argument(entry.flag, dest=key, action="append", **arguments)
            elif entry.notation is switch:
                del arguments["metavar"]
                group.add_argument(entry.flag, dest=key, action="store_const", const=True, **arguments)
            else:
                group.add_argument(entry.flag, dest=key, **arguments)
    return parser


def _help(entry: Option, default: Any) -> str:
    if entry.secret:
        return entry.help
    if entry.notation is switch:
        return f"{entry.help} (default: {'on' if default else 'off'})"
    if entry.notation.is_list:
        return f"{entry.help}; may be given several times (default: none)"
    shown = entry.notation.render(default)
    return f"{entry.help} (default: {f'{shown:g}' if isinstance(shown, float) else shown})"
