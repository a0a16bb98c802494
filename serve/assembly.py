"""From the configuration to an engine over a cache, ready to be started."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.config import DiskPlace, check_write_budget, format_size
from dynamo.kvcache.errors import CacheConfigError, CacheMemoryError
from dynamo.serve.config import CacheSettings, Config
from dynamo.serve.engine.engine import InferenceEngine, build_model_engine
from dynamo.serve.engine.loader import DTYPES, load_model
from dynamo.serve.engine.mocker import MockTimings, build_mock_engine, mock_kv_spec
from dynamo.serve.engine.model_config import ModelConfig
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import ConfigError
from dynamo.serve.model_place import find_model
from dynamo.serve.served_model import MOCK_MAX_MODEL_LEN, ModelSummary, ServedModel

__all__ = ["Assembly", "build_engine", "mocker_place"]

logger = logging.getLogger(__name__)

_CPU_DEVICE_CACHE_BYTES = 256 << 20
_SURE_SHARE = 0.9  # of the memory there is, for a size that fits: the rest goes up and down


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine that has not been started, the cache it owns, and what the front says of its model."""

    engine: InferenceEngine
    cache: KVCache
    served: ServedModel
    summary: ModelSummary


def build_engine(config: Config, progress: Callable[[float], None]) -> Assembly:
    """Loads the model, makes the cache and the engine. Takes as long as reading the weights does.

    Args:
        progress: called with the share of the weights that is loaded.

    Raises:
        ConfigError: settings do not fit the model or the machine.
        ModelLoadError: the model folder cannot be loaded.
    """
    _warn_of_threads(config.engine.threads)
    torch.set_num_threads(config.engine.threads)
    folder, default_name = find_model(config.model.path)
    name = config.model.served_model_name or default_name
    if config.engine.engine == "mocker":
        return _build_mocker(config, folder, name)
    return _build_model(config, folder, name, progress)


def _warn_of_threads(num_threads: int) -> None:
    num_cores = len(os.sched_getaffinity(0))
    if num_threads > num_cores:
        logger.warning(
            "--threads %d is more than the %d cores that this process may use: threads that take turns compute more slowly; "
            "give at most that many",
            num_threads,
            num_cores,
        )


def _build_model(config: Config, folder: Path, name: str, progress: Callable[[float], None]) -> Assembly:
    device = _device(config.model.device)
    dtype = None if config.model.dtype is None else DTYPES[config.model.dtype]

    def check(model: ModelConfig, dtype: torch.dtype, longest: int) -> None:
        wanted = config.model.max_model_len
        if wanted is not None and wanted > longest:
            raise ConfigError(
                f"--max-model-len {wanted} is more than the model's {longest}; lower it, or leave it auto"
            )
        _check_sizes(config, _spec(config, "", model, dtype), _device_bytes(config, device, is_loaded=False))

    loaded = load_model(folder, device=device, dtype=dtype, progress=progress, check=check)
    max_model_len = config.model.max_model_len or loaded.max_model_len
    spec = _spec(config, f"{loaded.fingerprint}/{loaded.dtype}", loaded.config, loaded.dtype)
    limits = _limits(config)
    cache = _open_cache(config, config.cache.disk_cache, spec, device)
    engine = build_model_engine(
        loaded,
        cache,
        device=device,
        max_model_len=max_model_len,
        limits=limits,
        max_waiting=config.engine.max_waiting,
    )
    return Assembly(
        engine,
        cache,
        _served(name, loaded.tokenizer, engine, loaded.sampling_defaults),
        ModelSummary(
            description=f"{name} ({folder})",
            num_parameters=sum(weights.numel() for _, weights in loaded.model.checkpoint_views()),
            device=_device_name(device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            max_model_len=max_model_len,
        ),
    )


def mocker_place(place: DiskPlace) -> DiskPlace:
    """Where simulated blocks lie: in a folder of their own, so that a model's are not given up for them."""
    return place.below("mocker")


def _build_mocker(config: Config, folder: Path, name: str) -> Assembly:
    tokenizer = Tokenizer.from_folder(folder)
    settings = config.mocker
    timings = MockTimings(
        prefill_tokens_per_s=settings.prefill_rate,
        step_s=settings.step_time,
        token_s=settings.token_time,
        speedup=settings.speedup,
    )
    limits = _limits(config)
    disk = config.cache.disk_cache and mocker_place(config.cache.disk_cache)
    cache = _open_cache(config, disk, mock_kv_spec(name, config.cache.block_size), torch.device("cpu"))
    max_model_len = config.model.max_model_len or MOCK_MAX_MODEL_LEN
    engine = build_mock_engine(
        tokenizer,
        cache,
        timings=timings,
        max_model_len=max_model_len,
        limits=limits,
        max_waiting=config.engine.max_waiting,
    )
    return Assembly(
        engine,
        cache,
        _served(name, tokenizer, engine, SamplingDefaults()),
        ModelSummary(
            description=f"{name}, mocked: {timings}",
            num_parameters=None,
            device="no device",
            dtype="no arithmetic",
            max_model_len=max_model_len,
        ),
    )


def _spec(config: Config, name: str, model: ModelConfig, dtype: torch.dtype) -> KVSpec:
    return KVSpec(
        model=name,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        block_size=config.cache.block_size,
    )


def _open_cache(config: Config, disk: DiskPlace | None, spec: KVSpec, device: torch.device) -> KVCache:
    settings = config.cache
    device_bytes = _device_bytes(config, device)
    assert device_bytes is not None, "known once the weights are in their place"
    num_blocks = device_bytes // spec.layout.slot_bytes
    _check_sizes(config, spec, device_bytes)
    try:
        return KVCache(
            spec,
            device=device,
            device_blocks=num_blocks,
            host=settings.host_cache or None,
            disk=disk,
            io_threads=settings.io_threads,
            load_patience=settings.load_patience,
            eviction=settings.eviction,
            admission=settings.admission,
            disk_write_budget=settings.disk_write_budget,
            host_max=settings.host_cache_max,
        )
    except CacheMemoryError as error:
        raise ConfigError(_what_does_not_fit(settings, device_bytes, error)) from error
    except MemoryError as error:  # Python's own, for the books of so many blocks
        on_disk = f" and --disk-cache {format_size(disk.capacity_bytes)}" if disk else ""
        raise ConfigError(
            f"there is no memory for the books of --device-cache {format_size(device_bytes)}, --host-cache "
            f"{format_size(settings.host_cache)}{on_disk}: {error}; give less, or a larger --block-size"
        ) from error
    except CacheConfigError as error:
        raise ConfigError(f"the cache cannot be made: {error}") from error


def _what_does_not_fit(settings: CacheSettings, device_bytes: int, error: CacheMemoryError) -> str:
    """Which size that is, what there is, and one that would fit."""
    disk_bytes = settings.disk_cache.capacity_bytes if settings.disk_cache else 0
    asked_bytes = {"device": device_bytes, "host": settings.host_cache, "disk": disk_bytes}[error.tier]
    if not asked_bytes:  # the buffer for transfers, which has no option
        return f"the cache does not fit: {error}"
    wrong = f"--{error.tier}-cache {format_size(asked_bytes)} does not fit: {error}"
    if error.available_bytes is None:
        return wrong
    # Beside what was asked for, a tier has rows for transfers; of a tier on disk, the index alone is in memory.
    share = _SURE_SHARE * error.available_bytes / error.needed_bytes
    fitting_bytes = int(share * asked_bytes)
    unit = 30 if fitting_bytes >= 10 << 30 else 20
    if not fitting_bytes >> unit:
        return wrong
    return f"{wrong}; {fitting_bytes >> unit}{'GiB' if unit == 30 else 'MiB'} would fit"


def _device_bytes(config: Config, device: torch.device, *, is_loaded: bool = True) -> int | None:
    """Size of the device tier; None where that follows from what the weights leave free and they are not loaded."""
    if config.cache.device_cache is not None:
        return config.cache.device_cache
    if device.type != "cuda":
        return _CPU_DEVICE_CACHE_BYTES
    return torch.cuda.mem_get_info(device)[0] // 2 if is_loaded else None


def _check_sizes(config: Config, spec: KVSpec, device_bytes: int | None) -> None:
    """Of the tiers, for blocks of this size.

    Raises:
        ConfigError: a tier holds too few blocks, or a limit allows none.
    """
    settings, slot_bytes = config.cache, spec.layout.slot_bytes
    if device_bytes is not None:
        _check_device_cache(config, spec, device_bytes)
    if 0 < settings.host_cache < slot_bytes:
        raise ConfigError(
            f"--host-cache {format_size(settings.host_cache)} holds less than one block of {format_size(slot_bytes)}; "
            "give it more, or 0 for none"
        )
    disk = settings.disk_cache
    if disk is not None and disk.capacity_bytes // len(disk.directories) < slot_bytes:
        raise ConfigError(
            f"--disk-cache {disk}: {format_size(disk.capacity_bytes)} hold less than one "
            f"block of {format_size(slot_bytes)} in each; give it more, or off for none"
        )
    if settings.disk_write_budget is not None:
        try:
            check_write_budget(settings.disk_write_budget, slot_bytes)
        except CacheConfigError as error:
            raise ConfigError(f"--disk-write-budget: {error}") from error


def _check_device_cache(config: Config, spec: KVSpec, device_bytes: int) -> None:
    slot_bytes, wanted = spec.layout.slot_bytes, config.model.max_model_len
    num_blocks = device_bytes // slot_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"--device-cache {format_size(device_bytes)} holds less than two blocks of {format_size(slot_bytes)}; "
            "give it more"
        )
    if wanted is not None and num_blocks * spec.block_size < wanted:
        raise ConfigError(
            f"--max-model-len {wanted} does not fit into the device cache, which holds {num_blocks * spec.block_size} "
            "tokens; raise --device-cache or lower --max-model-len"
        )


def _limits(config: Config) -> SchedulerLimits:
    try:
        return SchedulerLimits(max_running=config.engine.max_running, max_batch_tokens=config.engine.max_batch_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch {torch.__version__} finds no GPU here; use --device cpu")
        # Checked before torch sees the number: it takes small ones only.
        if int(index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        return torch.device(kind, int(index)) if index else torch.device(kind)
    return torch.device(kind)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _served(name: str, tokenizer: Tokenizer, engine: InferenceEngine, defaults: SamplingDefaults) -> ServedModel:
    return ServedModel(name=name, codec=tokenizer, max_model_len=engine.max_model_len, defaults=defaults)
