import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamo.serve.assembly import build_engine
from dynamo.serve.config import Config, load_config
from dynamo.serve.errors import ConfigError, ModelLoadError


def config_of(**flags: Any) -> Config:
    small = {"cache.disk_cache": "off", "cache.host_cache": "0", "cache.device_cache": "8MiB", "engine.threads": "1"}
    return load_config(None, small | {key.replace("__", "."): value for key, value in flags.items()}, {}).config


def build(run: Any, config: Config) -> Any:
    assembly = build_engine(config, lambda share: None)
    run(assembly.engine.stop())
    return assembly


def test_the_demo_model_is_served_with_its_own_defaults(run: Any) -> None:
    shares: list[float] = []
    assembly = build_engine(config_of(), shares.append)
    run(assembly.engine.stop())
    assert assembly.served.name == "demo"
    assert 1_900_000 < assembly.summary.num_parameters < 2_000_000
    assert assembly.served.defaults.temperature != 1.0
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_the_context_is_what_the_device_cache_can_hold(run: Any) -> None:
    assembly = build(run, config_of(cache__device_cache="4MiB"))
    assert assembly.served.max_model_len == assembly.cache.num_device_blocks * 16 < assembly.summary.max_model_len
    assert build(run, config_of(model__max_model_len="512")).served.max_model_len == 512


def test_the_mocker_needs_no_weights_and_keeps_its_blocks_apart(run: Any, tmp_path: Path) -> None:
    assembly = build(run, config_of(engine__engine="mocker", cache__disk_cache=f"{tmp_path}/kv:16MiB"))
    assert assembly.summary.num_parameters is None
    assert [entry.name for entry in (tmp_path / "kv").iterdir()] == ["mocker"]


def test_several_folders_share_the_disk_tier_under_a_write_budget(run: Any, tmp_path: Path) -> None:
    places = f"{tmp_path}/one,{tmp_path}/two:32MiB"
    flags = {"cache__disk_cache": places, "cache__disk_write_budget": "1GB", "cache__admission": "adaptive"}
    assembly = build(run, config_of(engine__engine="mocker", **flags))
    assert assembly.cache.stats().tier("disk").num_slots * 4096 == 32 << 20
    for name in ("one", "two"):
        assert [entry.name for entry in (tmp_path / name).iterdir()] == ["mocker"]


@pytest.mark.parametrize(
    ("flags", "error", "says"),
    [
        ({"model__path": "/nowhere"}, ConfigError, "'/nowhere' is no folder"),
        ({"model__path": str(Path(__file__).parent)}, ModelLoadError, "config.json"),
        ({"model__max_model_len": "100000"}, ConfigError, "more than the model's 16384"),
        ({"model__max_model_len": "16384"}, ConfigError, "does not fit into the device cache"),
        ({"cache__device_cache": "4KiB"}, ConfigError, "less than two blocks"),
        ({"cache__host_cache_max": "1GiB"}, ConfigError, "no host tier that could grow"),
        ({"cache__host_cache": "2MiB", "cache__host_cache_max": "1MiB"}, ConfigError, "1 MiB is not above"),
        (
            {"cache__disk_cache": "/proc/kv:900TiB"},
            ConfigError,
            "--disk-cache 900 TiB does not fit: the index of .* smaller",
        ),
        (
            {"cache__host_cache": "1000TiB"},
            ConfigError,
            r"^--host-cache 1000 TiB does not fit: the host tier needs .* GiB, .* GiB are available; .*; \d+[GM]iB would fit$",
        ),
        (
            {"cache__device_cache": "999TiB"},
            ConfigError,
            r"^--device-cache 999 TiB does not fit: the .* available; .*; \d+[GM]iB would fit$",
        ),
        ({"cache__host_cache": "1KiB"}, ConfigError, "--host-cache 1 KiB holds less than one block of"),
        (
            {"cache__disk_cache": "/nowhere:10KiB"},
            ConfigError,
            "--disk-cache /nowhere: 10 KiB hold less than one block of",
        ),
        ({"cache__eviction": "lru", "cache__admission": "adaptive"}, ConfigError, "hit_density"),
        ({"model__path": "conf"}, ConfigError, "'conf' is no folder; did you mean 'config'"),
        ({"model__path": "dmeo"}, ConfigError, "'dmeo' is no folder; did you mean 'demo'"),
        ({"engine__max_batch_tokens": "8"}, ConfigError, "--max-batch-tokens 8 is less than --max-running 64"),
        (
            {"cache__disk_cache": "/nowhere:1GiB", "cache__disk_write_budget": "64KiB"},
            ConfigError,
            "--disk-write-budget: 64 KiB a day.* let no block of 32 KiB .* at least 768 KiB",
        ),
        (
            {"cache__disk_cache": "/nowhere,/else:20KiB"},
            ConfigError,
            "--disk-cache /nowhere, /else: 20 KiB hold less than one block of .* in each",
        ),
        ({"model__device": "cuda:99"}, ConfigError, "--device cuda:99"),
        ({"model__device": "cuda:99999999999"}, ConfigError, "--device cuda:99999999999"),
    ],
)
def test_settings_that_do_not_fit_say_why(flags: dict[str, str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_engine(config_of(**flags), lambda share: None)


def test_a_host_tier_that_nobody_asked_for_is_not_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.tiers.memory.available_memory_bytes", lambda: 16 << 20)
    config = config_of(engine__engine="mocker", cache__disk_cache=f"{tmp_path}/kv:64MiB")
    with pytest.raises(ConfigError, match=r"^the cache does not fit: the buffer for transfers needs .* available"):
        build_engine(config, lambda share: None)


def test_more_threads_than_cores_are_warned_of(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    num_cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    try:
        build(run, config_of(engine__engine="mocker", engine__threads=str(num_cores)))
        assert "--threads" not in caplog.text
        build(run, config_of(engine__engine="mocker", engine__threads=str(num_cores + 1)))
    finally:
        torch.set_num_threads(before)
    assert f"--threads {num_cores + 1} is more than the {num_cores} cores" in caplog.text


def test_sizes_that_do_not_fit_are_refused_before_any_weight_is_read() -> None:
    shares: list[float] = []
    for flags in ({"cache__device_cache": "4KiB"}, {"model__max_model_len": "16384"}, {"cache__host_cache": "1KiB"}):
        with pytest.raises(ConfigError):
            build_engine(config_of(**flags), shares.append)
    assert shares == []
