"""The parts a process can play, and the settings that mean something to each.

A file may be shared by all parts, so what it says of others is passed over. A flag that would do nothing is refused.
"""

from enum import Enum
from typing import Final

from dynamo.serve.config import SECTIONS, Config, LoadedConfig
from dynamo.serve.errors import ConfigError

__all__ = ["Role", "check_role", "settings_of"]


class Role(Enum):
    """What a process of the server does; by the words of the command line, of which `SERVER` needs none."""

    SERVER = "server"
    FRONTEND = "frontend"
    WORKER = "worker"


def _all_of(*sections: str) -> frozenset[str]:
    return frozenset(f"{section}.{entry.name}" for section in sections for entry in SECTIONS[section])


_COMPUTING: Final = _all_of("model", "cache", "engine", "mocker")
_FRONT: Final = _all_of("router") | {
    "model.path",
    "model.served_model_name",
    "model.max_model_len",
    "cache.block_size",  # of external servers, which do not say
    "engine.engine",
    "server.host",
    "server.port",
    "server.api_key",
    "server.stream_interval",
    "server.drain_timeout",
    "server.log_level",
    "fleet.discovery",
    "fleet.external",
    "fleet.kv_events",
}
_WORKER: Final = _COMPUTING | {
    "server.key_log",
    "server.drain_timeout",
    "server.log_level",
    "fleet.discovery",
    "fleet.worker_id",
}
_ALONE: Final = _COMPUTING | _all_of("server") | {"fleet.workers"}
_SUPERVISOR: Final = ((_FRONT | _WORKER) - {"fleet.worker_id"}) | {"fleet.workers"}


def settings_of(role: Role) -> frozenset[str]:
    """What --help shows of this role, as "section.name": of the parts what they take, and of the whole all there is."""
    match role:
        case Role.FRONTEND:
            return _FRONT
        case Role.WORKER:
            return _WORKER
        case Role.SERVER:
            return _all_of(*SECTIONS)


def check_role(role: Role, loaded: LoadedConfig) -> None:
    """Makes sure that the settings mean something to a process of this role, and go together.

    Raises:
        ConfigError: one does not. The message names the flag and where it belongs.
    """
    config = loaded.config
    taken, whom = _taken_by(role, config)
    for section, entries in SECTIONS.items():
        for entry in entries:
            key = f"{section}.{entry.name}"
            # What the command line gave has its flag as its source.
            if key not in taken and entry.flag is not None and loaded.sources.get(key) == entry.flag:
                raise ConfigError(f"{entry.flag} means nothing to {whom}; {_way_out(key, role)}")
            if section == "mocker" and config.engine.engine != "mocker" and loaded.sources.get(key) == entry.flag:
                raise ConfigError(f"{entry.flag} means nothing to a model; add --engine mocker, or leave it out")
    _check_fleet(role, config)


def _taken_by(role: Role, config: Config) -> tuple[frozenset[str], str]:
    match role:
        case Role.FRONTEND:
            return _FRONT, "a front, which computes nothing and keeps no cache"
        case Role.WORKER:
            return _WORKER, "a worker, which serves no clients"
        case Role.SERVER:
            if config.fleet.workers is None:
                return _ALONE, "a server of one process"
            return _SUPERVISOR, "a server with --workers"


def _way_out(key: str, role: Role) -> str:
    match role, key:
        case _, "server.admin":
            return "it administers the cache of a server of one process; /metrics/workers shows the caches of workers"
        case Role.SERVER, "fleet.worker_id":
            return "give it to 'worker', which starts one worker"
        case Role.SERVER, _:
            return "add --workers N, or give it to 'frontend', which starts a front alone"
        case Role.WORKER, "fleet.workers":
            return "start 'worker' as often as there shall be workers, or leave 'worker' out"
        case Role.WORKER, _:
            return "give it to the front"
        case _:
            return "give it to the workers"


def _check_fleet(role: Role, config: Config) -> None:
    fleet = config.fleet
    if role is Role.WORKER and fleet.discovery is None:
        raise ConfigError("a worker needs --discovery DIR, the folder in which fronts look for it")
    if role is Role.FRONTEND and fleet.discovery is None and not fleet.external:
        raise ConfigError("a front needs --discovery DIR, the folder in which its workers register, or --external URL")
    if fleet.kv_events and len(fleet.kv_events) != len(fleet.external):
        raise ConfigError(
            f"--kv-events was given {len(fleet.kv_events)} times and --external {len(fleet.external)} times; give one for "
            "each, and off for those that publish none"
        )
    if len(set(fleet.external)) != len(fleet.external):
        raise ConfigError(f"--external names a server twice: {', '.join(fleet.external)}")
    if role is Role.SERVER and fleet.workers is not None and config.server.admin:
        raise ConfigError("admin = true goes with a server of one process only; leave --workers off, or admin")
