"""Settings that are right each by itself and do not go together: told at the start, before a model is loaded for nothing."""

from typing import TYPE_CHECKING

from dynamo.kvcache.config import format_size
from dynamo.serve.errors import ConfigError

if TYPE_CHECKING:  # which checks what it has loaded
    from dynamo.serve.config import CacheSettings, Config, EngineSettings

__all__ = ["check_consistency"]


def check_consistency(config: "Config") -> None:
    """Of settings whose sense depends on others. What depends on the model too is checked where that is known.

    Raises:
        ConfigError: two do not go together. The message names both, and the way out.
    """
    _check_cache(config.cache)
    _check_engine(config.engine)


def _check_cache(cache: "CacheSettings") -> None:
    largest = cache.host_cache_max
    if largest is not None and not 0 < cache.host_cache <= largest:
        raise ConfigError(
            f"--host-cache-max {format_size(largest)} is not above --host-cache {format_size(cache.host_cache)}, or there "
            "is no host tier that could grow; give both, or leave --host-cache-max off"
        )
    if cache.disk_write_budget is not None and cache.disk_cache is None:
        raise ConfigError(
            f"--disk-write-budget {format_size(cache.disk_write_budget)} limits nothing, since there is no disk tier; give "
            "--disk-cache PATH:SIZE, or leave --disk-write-budget off"
        )
    if cache.admission == "adaptive" and cache.eviction != "hit_density":
        raise ConfigError(
            f"--admission adaptive goes by the prices of --eviction hit_density, not of {cache.eviction}; choose that, or "
            "another admission"
        )


def _check_engine(engine: "EngineSettings") -> None:
    if engine.max_batch_tokens < engine.max_running:
        raise ConfigError(
            f"--max-batch-tokens {engine.max_batch_tokens} is less than --max-running {engine.max_running}, and every "
            "running sequence computes a token in each step; raise the one or lower the other"
        )
