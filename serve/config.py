"""All settings of the server: a tree of frozen records, filled from defaults, then one TOML file, then the command line."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

from dynamo.kvcache.config import DiskPlace
from dynamo.kvcache.policies import AdmissionName, EvictionName
from dynamo.serve.consistency import check_consistency
from dynamo.serve.engine.dtypes import FLOAT_DTYPES
from dynamo.serve.errors import ConfigError
from dynamo.serve.fleet_settings import FleetSettings, RouterSettings
from dynamo.serve.options import (
    Notation,
    Option,
    byte_size,
    default_disk_place,
    default_threads,
    disk_place,
    file_path,
    header_text,
    number,
    one_of,
    option,
    options_of,
    or_word,
    or_zero,
    positive_size,
    switch,
    text,
)
from dynamo.serve.path_refusal import path_refusal

__all__ = [
    "API_KEY_VARIABLE",
    "DEMO_MODEL",
    "SECTIONS",
    "CacheSettings",
    "Config",
    "EngineSettings",
    "FleetSettings",
    "LoadedConfig",
    "MockerSettings",
    "ModelSettings",
    "RouterSettings",
    "ServerSettings",
    "load_config",
    "render_toml",
]

API_KEY_VARIABLE: Final = "DYNAMO_API_KEY"
DEMO_MODEL: Final = "demo"

_MAX_FILE_BYTES = 1 << 20
_DEVICE = re.compile("cpu|cuda(:[0-9]{1,18})?")
_AUTO = "auto"
_OFF = "off"


def _parse_device(value: Any) -> str:
    if _DEVICE.fullmatch(str(value)):
        return str(value)
    raise ValueError("cpu, cuda, cuda:N")


def _parse_block_size(value: Any) -> int:
    size = number(int, 1, 1024).parse(value)
    if size & (size - 1):
        raise ValueError("a power of two from 1 to 1024")
    return int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model is served, and where its arithmetic happens."""

    path: str = option(
        DEMO_MODEL, f"local Hugging Face folder; {DEMO_MODEL}: the small demo model", text, metavar="MODEL", flag=None
    )
    served_model_name: str | None = option(
        None, "name clients use; auto: the folder's name", or_word(text, _AUTO), metavar="NAME"
    )
    device: str | None = option(
        None,
        "cpu, cuda or cuda:N; auto: a GPU where there is one",
        or_word(Notation(_parse_device), _AUTO),
        metavar="DEVICE",
    )
    dtype: str | None = option(
        None,
        "float32, bfloat16 or float16; auto: the checkpoint's",
        or_word(one_of(*FLOAT_DTYPES), _AUTO),
        metavar="DTYPE",
    )
    max_model_len: int | None = option(
        None,
        "most tokens of prompt and completion together; auto: what the model and the device cache allow",
        or_word(number(int, 2, 2**24), _AUTO),
        metavar="TOKENS",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Sizes of the tiers that hold KV blocks."""

    block_size: int = option(16, "tokens per KV block, a power of two", Notation(_parse_block_size), metavar="TOKENS")
    device_cache: int | None = option(
        None,
        "device tier, such as 64MiB; auto: 256MiB on a CPU, half of the free memory of a GPU",
        or_word(positive_size, _AUTO),
        metavar="SIZE",
    )
    host_cache: int = option(1 << 30, "host memory tier, such as 1GiB; 0 for none", byte_size, metavar="SIZE")
    host_cache_max: int | None = option(
        None,
        "to what the host tier may be resized while it serves; off: not beyond its size",
        or_word(positive_size, _OFF),
        metavar="SIZE",
    )
    disk_cache: DiskPlace | None = option(  # noqa: RUF009  # a field's declaration, made once
        default_disk_place,
        "disk tier, such as /mnt/nvme/kv:200GiB; several devices share the size; off for none",
        or_word(disk_place, _OFF),
        metavar="PATH[,PATH...]:SIZE",
    )
    disk_write_budget: int | None = option(
        None,
        "most bytes written to the disk tier in a day, such as 500GB; off: no limit",
        or_word(positive_size, _OFF),
        metavar="SIZE",
    )
    eviction: EvictionName = option(  # noqa: RUF009  # a field's declaration, made once
        "hit_density",
        "which blocks of a full tier go first: hit_density, lru or s3_fifo",
        one_of(*get_args(EvictionName)),
        metavar="POLICY",
    )
    admission: AdmissionName = option(  # noqa: RUF009  # a field's declaration, made once
        "always",
        "which blocks the host and disk tiers take: always, second_sighting or adaptive",
        one_of(*get_args(AdmissionName)),
        metavar="POLICY",
    )
    io_threads: int = option(8, "threads that read and write the disk tier", number(int, 1, 64), metavar="N")
    load_patience: float | None = option(
        0.03,
        "share of the time to compute a prompt that waiting for its blocks may cost; off: wait for all of them",
        or_word(number(float, 0, 10), _OFF),
        metavar="SHARE",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How sequences share the device."""

    engine: str = option(
        "model",
        "model, or mocker: no model, simulated timings, real block accounting",
        one_of("model", "mocker"),
        metavar="KIND",
    )
    max_batch_tokens: int = option(2048, "most tokens computed in one step", number(int, 1, 2**20), metavar="TOKENS")
    max_running: int = option(64, "most sequences generating at the same time", number(int, 1, 65536), metavar="N")
    max_waiting: int = option(
        1024, "most sequences waiting; more are refused with 429", number(int, 0, 2**20), metavar="N"
    )
    threads: int = option(default_threads, "torch's CPU threads", number(int, 1, 1024), metavar="N")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where and for whom the server listens."""

    host: str = option("127.0.0.1", "address to listen on", text, metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0 takes a free one", number(int, 0, 65535), metavar="PORT")
    api_key: str | None = option(
        None,
        f"key every client must send; {API_KEY_VARIABLE} in the environment keeps it out of ps",
        header_text,
        metavar="KEY",
        secret=True,
    )
    admin: bool = option(
        False, "serve the admin endpoints under /admin/cache; needs --api-key beyond this machine", switch, metavar=""
    )
    key_log: Path | None = option(  # noqa: RUF009  # a field's declaration, made once
        None,
        "file that gets one line per finished request: sizes and block keys, no text; off: none",
        or_word(file_path, _OFF),
        metavar="FILE",
    )
    stream_interval: float = option(
        0.005,
        "seconds between two writes of a stream whose tokens come faster; 0 writes at each step",
        number(float, 0, 1),
        metavar="SECONDS",
    )
    drain_timeout: float = option(
        30.0, "seconds that running requests get when the server is stopped", number(float, 0, 86400), metavar="SECONDS"
    )
    log_level: str = option(
        "info", "debug, info, warning or error", one_of("debug", "info", "warning", "error"), metavar="LEVEL"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MockerSettings:
    """The machine that `--engine mocker` pretends to be: about an 8-billion-parameter model on one data-centre GPU."""

    prefill_rate: float = option(
        20000.0,
        "prompt tokens computed per second",
        number(float, 1e-3, 1e12),
        metavar="TOKENS/S",
        flag="--mocker-prefill-rate",
    )
    step_time: float = option(
        0.006, "seconds that any step takes", number(float, 0, 3600), metavar="SECONDS", flag="--mocker-step-time"
    )
    token_time: float = option(
        0.00005,
        "seconds that each generating sequence adds to a step",
        number(float, 0, 3600),
        metavar="SECONDS",
        flag="--mocker-token-time",
    )
    speedup: float = option(
        1.0, "divides all of these; 0 does not wait at all", or_zero(number(float, 1e-3, 1e9)), metavar="FACTOR"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings. Attributes are the tables of the TOML file and the groups of --help."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    mocker: MockerSettings = field(default_factory=MockerSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    router: RouterSettings = field(default_factory=RouterSettings)


SECTIONS: Final[Mapping[str, tuple[Option, ...]]] = {
    name: tuple(options_of(section)) for name, section in get_type_hints(Config).items()
}
"""All settings by section; what --help groups, and what the TOML file may say."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """Settings, and for each "section.key" that is no default where it came from."""

    config: Config
    sources: Mapping[str, str]


def load_config(file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Puts the settings together.

    Args:
        file: TOML, or None.
        flags: "section.key" to the command line's text, for the flags that were given.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is not accepted, or two do not go together.
    """
    given: dict[str, tuple[Any, str]] = {}
    if file is not None:
        given |= {key: (value, str(file)) for key, value in _read_toml(file).items()}
    if key_from_environ := environ.get(API_KEY_VARIABLE):
        given["server.api_key"] = (key_from_environ, f"environment variable {API_KEY_VARIABLE}")
    options = {f"{section}.{entry.name}": entry for section, entries in SECTIONS.items() for entry in entries}
    given |= {key: (value, options[key].flag or "command line") for key, value in flags.items()}
    values: dict[str, dict[str, Any]] = {}
    for key, (value, source) in given.items():
        section, _, name = key.partition(".")
        entry = options[key]
        is_of_file = source == str(file)
        try:
            values.setdefault(section, {})[name] = entry.notation.parse(value)
        except ValueError as error:
            named = key if is_of_file else entry.flag or entry.metavar
            where = named if source in (named, "command line") else f"{source}: {named}"
            shown = "the value" if entry.secret else _shown(entry, value, is_toml=is_of_file)
            raise ConfigError(f"{where}: {shown} is not accepted; accepted is {error}") from None
    config = Config()
    changed = {section: replace(getattr(config, section), **entries) for section, entries in values.items()}
    loaded = LoadedConfig(replace(config, **changed), {key: source for key, (_, source) in given.items()})
    check_consistency(loaded.config)
    return loaded


def render_toml(loaded: LoadedConfig) -> str:
    """The settings as TOML that `load_config` reads back, without secrets; every line says where its value came from."""
    lines: list[str] = []
    for section, entries in SECTIONS.items():
        lines.append(f"[{section}]")
        for entry in entries:
            source = loaded.sources.get(f"{section}.{entry.name}", "default")
            value = getattr(getattr(loaded.config, section), entry.name)
            if entry.secret:
                shown = "not set" if value is None else "set, and not shown"
                lines.append(f"# {entry.name}: {shown} ({source})")
            else:
                lines.append(f"{entry.name} = {_toml_value(entry.notation.render(value))}  # {source}")
        lines.append("")
    return "\n".join(lines[:-1])


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {file}: {path_refusal(file, error, 'read')}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"--config {file}: it has more than {_MAX_FILE_BYTES >> 20} MiB, so it is no file of settings"
        )
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"))  # some editors begin a file with a byte-order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    known = {section: [entry.name for entry in entries] for section, entries in SECTIONS.items()}
    result: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in known:
            if isinstance(table, dict):
                raise ConfigError(f"{file}: unknown section [{section}]{_nearest(section, list(known))}")
            homes = [other for other, keys in known.items() if section in keys]
            hint = f"; put it below [{homes[0]}]" if homes else _nearest(section, [])
            raise ConfigError(f"{file}: key {section} belongs to no section{hint}")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} = {table!r} must be a table, [{section}]")
        for name, value in table.items():
            if name not in known[section]:
                elsewhere = [f"{other}.{name}" for other, keys in known.items() if name in keys]
                hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(name, known[section])
                raise ConfigError(f"{file}: unknown key {section}.{name}{hint}")
            result[f"{section}.{name}"] = value
    return result


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; `python -m dynamo.serve config` prints all there are"


def _shown(entry: Option, value: Any, *, is_toml: bool) -> str:
    """A value as it was written."""
    if isinstance(value, bool):
        return str(value).lower()
    if not is_toml and entry.notation.is_list and isinstance(value, list):  # the flag was given several times
        return ", ".join(map(repr, value))
    return repr(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)
