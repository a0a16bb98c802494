import errno
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.command_line import parse_command_line
from dynamo.serve.config import SECTIONS, Config, load_config, render_toml
from dynamo.serve.errors import ConfigError
from dynamo.serve.options import EventSource

# A new option needs a measured reason: add it here together with the line in CHANGELOG.md that gives it.
OPTIONS = {
    "model": ["MODEL", "--served-model-name", "--device", "--dtype", "--max-model-len"],
    "cache": [
        "--block-size",
        "--device-cache",
        "--host-cache",
        "--host-cache-max",
        "--disk-cache",
        "--disk-write-budget",
        "--eviction",
        "--admission",
        "--io-threads",
        "--load-patience",
    ],
    "engine": ["--engine", "--max-batch-tokens", "--max-running", "--max-waiting", "--threads"],
    "server": [
        "--host",
        "--port",
        "--api-key",
        "--admin",
        "--key-log",
        "--stream-interval",
        "--drain-timeout",
        "--log-level",
    ],
    "mocker": ["--mocker-prefill-rate", "--mocker-step-time", "--mocker-token-time", "--speedup"],
    "fleet": ["--workers", "--discovery", "--worker-id", "--external", "--kv-events"],
    "router": [
        "--router-mode",
        "--router-temperature",
        "--router-queue-weight",
        "--router-prefix-weight",
        "--router-decode-weight",
        "--router-balance-weight",
        "--router-prediction-ttl",
        "--router-approximate-ttl",
        "--router-affinity",
        "--router-session-ttl",
        "--router-busy-requests",
        "--router-busy-queue",
        "--router-busy-blocks",
        "--router-max-waiting",
        "--router-waiting-timeout",
        "--no-worker-timeout",
        "--migration-limit",
    ],
}


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAMO_API_KEY", raising=False)


def write(folder: Path, text: str) -> Path:
    file = folder / "dynamo.toml"
    file.write_text(text)
    return file


def test_the_list_of_options_is_frozen() -> None:
    assert {
        name: [option.flag or option.metavar for option in options] for name, options in SECTIONS.items()
    } == OPTIONS


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    shown = re.sub(r"\n {20,}", " ", capsys.readouterr().out)  # help of long flags begins on a line of its own
    lines = {words[0]: line for line in shown.splitlines() if (words := line.split())}
    options = [option for entries in SECTIONS.values() for option in entries]
    for option in options:
        assert option.secret or "(default: " in lines[option.flag or option.metavar], option.name
    assert lines["--port"].endswith("(default: 8000)")
    assert lines["--host-cache"].endswith("(default: 1GiB)")
    assert lines["--max-model-len"].endswith("(default: auto)")
    assert lines["--mocker-prefill-rate"].endswith("(default: 20000)")


def test_defaults_that_the_library_has_too_are_its_own() -> None:
    cache = Config().cache
    for name in ("load_patience", "io_threads", "eviction", "admission", "disk_write_budget"):
        assert getattr(cache, name) == signature(KVCache).parameters[name].default
    assert cache.block_size == signature(KVSpec).parameters["block_size"].default


def test_defaults_are_safe() -> None:
    config = load_config(None, {}).config
    assert (config.server.host, config.server.port, config.server.api_key) == ("127.0.0.1", 8000, None)
    assert config.cache.host_cache == 1 << 30
    assert config.engine.threads >= 1


def test_the_default_disk_tier_lies_in_the_users_cache_and_leaves_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not-yet"))
    disk = load_config(None, {}).config.cache.disk_cache
    assert disk is None or (disk.directories == (tmp_path / "not-yet/dynamo/kv",) and disk.capacity_bytes <= 4 << 30)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    disk = load_config(None, {}).config.cache.disk_cache
    assert disk is None or disk.directories == (tmp_path / ".cache/dynamo/kv",)
    usage = (100 << 30, 99 << 30, 1 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": usage[2]}))
    disk = load_config(None, {}).config.cache.disk_cache
    assert disk is not None and disk.capacity_bytes == 102 << 20
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10 << 20}))
    assert load_config(None, {}).config.cache.disk_cache is None


def test_a_home_that_is_not_there_or_closed_costs_the_default_disk_tier_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def have_none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed" / "cache"))
    with monkeypatch.context() as closed:
        closed.setattr(Path, "stat", forbid)
        load_config(None, {})
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", have_none)
    assert load_config(None, {}).config.cache.disk_cache is None


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, '[server]\nport = 9000\nhost = "::1"\n[cache]\nhost_cache = "2GiB"\n')
    loaded = load_config(file, {"server.port": "9001"})
    assert (loaded.config.server.port, loaded.config.server.host) == (9001, "::1")
    assert loaded.config.cache.host_cache == 2 << 30
    assert loaded.sources == {"server.port": "--port", "server.host": str(file), "cache.host_cache": str(file)}


def test_the_environments_key_wins_over_the_file_and_loses_to_the_flag(tmp_path: Path) -> None:
    file = write(tmp_path, '[server]\napi_key = "file"\n')
    environ = {"DYNAMO_API_KEY": "environment"}
    assert load_config(file, {}, environ).config.server.api_key == "environment"
    assert load_config(file, {"server.api_key": "flag"}, environ).config.server.api_key == "flag"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 64 << 20), ("1GiB", 1 << 30), ("512MB", 512_000_000), ("4096", 4096), ("0", 0)],
)
def test_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    assert parse_command_line(["--host-cache", text]).loaded.config.cache.host_cache == size


def test_every_kind_of_option_is_read_from_the_command_line() -> None:
    config = parse_command_line(
        ["/models/x", "--disk-cache", "/a:b:10GiB", "--device-cache", "auto", "--speedup", "2.5", "--engine", "mocker"]
    ).loaded.config
    assert config.model.path == "/models/x"
    assert config.cache.disk_cache is not None
    assert (config.cache.disk_cache.directories, config.cache.disk_cache.capacity_bytes) == ((Path("/a:b"),), 10 << 30)
    assert (config.cache.device_cache, config.mocker.speedup, config.engine.engine) == (None, 2.5, "mocker")
    assert parse_command_line(["--disk-cache", "off"]).loaded.config.cache.disk_cache is None


@pytest.mark.parametrize(
    ("flag", "value", "accepted"),
    [
        ("--port", "http", "an integer from 0 to 65535"),
        ("--port", "65536", "an integer from 0 to 65535"),
        ("--host-cache", "1GB of it", "a size such as 64MiB"),
        ("--disk-cache", "/tmp", "PATH:SIZE"),
        ("--disk-cache", "/a,:1GiB", "PATH,PATH:SIZE"),
        ("--eviction", "fifo", "one of hit_density, lru, s3_fifo"),
        ("--admission", "never", "one of always, second_sighting, adaptive"),
        ("--disk-cache", "/tmp:0", "a size above 0"),
        ("--disk-cache", "/tmp:10%", "PATH:SIZE"),
        ("--disk-cache", "/a,/a/:1GiB", "each path once"),
        ("--disk-cache", "~nobody-of-that-name/kv:1GiB", "PATH:SIZE"),
        ("--key-log", "~nobody-of-that-name/keys", "~NAME is the folder of a user"),
        ("--disk-write-budget", "much", "a size above 0 such as"),
        ("--disk-write-budget", "0", "a size above 0"),
        (
            "--device-cache",
            "0",
            'a size above 0 such as 64MiB, 1.5GiB, 512MB or a number of bytes, less than 8EiB, or "auto"',
        ),
        ("--host-cache-max", "0B", "a size above 0"),
        ("--host-cache", "0.1B", "a size such as"),
        ("--host-cache", "10%", "a size such as"),
        ("--host-cache", "9EiB", "less than 8EiB"),
        ("--served-model-name", " ", "text that is not empty"),
        ("--device", "tpu", 'cpu, cuda, cuda:N, or "auto"'),
        ("--device", "cuda:" + "9" * 5000, "cuda:N"),
        ("--device", "cuda:x", "cuda:N"),
        ("--dtype", "int8", 'one of float32, bfloat16, float16, or "auto"'),
        ("--block-size", "24", "a power of two"),
        ("--max-model-len", "1", 'an integer from 2 to 16777216, or "auto"'),
        ("--drain-timeout", "nan", "a number from 0"),
        ("--engine", "vllm", "one of model, mocker"),
        ("--workers", "0", 'an integer from 1 to 64, or "off"'),
        ("--worker-id", "../other", "letters, digits"),
        ("--external", "localhost:8001", "http://127.0.0.1:8001"),
        ("--external", "http://127.0.0.1:80010", "http://127.0.0.1:8001"),
        ("--external", "http://[::1", "http://127.0.0.1:8001"),
        ("--external", "http://127.0.0.1:8001/v1?key=x", "http://127.0.0.1:8001"),
        ("--kv-events", "tcp://127.0.0.1:99999", "tcp://HOST:PORT"),
        ("--kv-events", "tcp://nowhere", "tcp://HOST:PORT"),
        ("--router-mode", "best", "one of kv, round-robin"),
        ("--migration-limit", "-1", "an integer from 0"),
        ("--speedup", "1e-300", "a number from 0.001 to 1e+09, or 0"),
        ("--speedup", "-1", "a number from 0.001 to 1e+09, or 0"),
    ],
)
def test_wrong_values_name_the_flag_the_value_and_what_is_accepted(flag: str, value: str, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line([flag, value])
    message = str(caught.value)
    assert flag in message and repr(value) in message and accepted in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--host-cache", "2MiB", "--host-cache-max", "1MiB"],
            "--host-cache-max 1 MiB is not above --host-cache 2 MiB",
        ),
        (["--host-cache", "0", "--host-cache-max", "1MiB"], "no host tier that could grow"),
        (["--disk-cache", "off", "--disk-write-budget", "1GB"], "--disk-write-budget 953.7 MiB limits nothing"),
        (
            ["--admission", "adaptive", "--eviction", "lru"],
            "--admission adaptive .* --eviction hit_density, not of lru",
        ),
        (["--max-running", "64", "--max-batch-tokens", "63"], "--max-batch-tokens 63 is less than --max-running 64"),
        (["--speedup", "2"], "--speedup means nothing to a model; add --engine mocker"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_loaded(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_command_line(flags)


def test_a_file_may_describe_a_mocker_that_is_not_asked_for(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "[mocker]\nspeedup = 2\n"), {}).config.mocker.speedup == 2


@pytest.mark.parametrize("key", [" key", "key\n", "a\tb"])
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(
        ConfigError, match="--api-key: the value is not accepted; accepted is text without blanks"
    ) as caught:
        load_config(None, {"server.api_key": key}, {})
    assert key not in str(caught.value)


def test_paths_that_no_system_takes_are_refused(tmp_path: Path) -> None:
    for line in ('[server]\nkey_log = "a\\u0000b"\n', '[cache]\ndisk_cache = "a\\u0000b:1GiB"\n'):
        with pytest.raises(ConfigError, match="is not accepted"):
            load_config(write(tmp_path, line), {})


def test_a_switch_takes_no_value_and_is_a_bool_in_toml(tmp_path: Path) -> None:
    assert not parse_command_line([]).loaded.config.server.admin
    config = parse_command_line(["--admin", "/models/x"]).loaded.config
    assert (config.server.admin, config.model.path) == (True, "/models/x")
    assert load_config(write(tmp_path, "[server]\nadmin = true\n"), {}).config.server.admin
    with pytest.raises(ConfigError, match=r"server\.admin: 'yes' is not accepted; accepted is true or false"):
        load_config(write(tmp_path, '[server]\nadmin = "yes"\n'), {})


def test_a_flag_may_be_given_several_times_and_is_a_list_in_toml(tmp_path: Path) -> None:
    arguments = ["frontend", "--external", "http://a:1/", "--external", "http://b:2"]
    arguments += ["--kv-events", "tcp://a:5557,tcp://a:5558", "--kv-events", "off"]
    fleet = parse_command_line(arguments).loaded.config.fleet
    assert fleet.external == ("http://a:1", "http://b:2")
    assert fleet.kv_events == (EventSource("tcp://a:5557", "tcp://a:5558"), None)
    file = write(tmp_path, '[fleet]\nexternal = ["http://a:1"]\n')
    assert load_config(file, {}).config.fleet.external == ("http://a:1",)
    with pytest.raises(ConfigError, match=r"fleet\.external: 'http://a:1' is not accepted; accepted is a list"):
        load_config(write(tmp_path, '[fleet]\nexternal = "http://a:1"\n'), {})


@pytest.mark.parametrize("word", ["config", "frontend", "worker"])
def test_a_part_that_is_named_behind_flags_is_no_model(word: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"^'{word}' comes first, before all flags: python -m dynamo.serve {word}; see"
    ):
        parse_command_line(["--port", "0", word, "--discovery", str(tmp_path)])


def test_unknown_flags_get_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"--hots-cache.*did you mean --host-cache\?"):
        parse_command_line(["--hots-cache", "1GiB"])
    with pytest.raises(ConfigError, match="--por"):
        parse_command_line(["--por", "1"])  # no abbreviations


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[servr]\nport = 1\n", r"unknown section \[servr\]; did you mean server\?"),
        ("[server]\nprot = 1\n", r"unknown key server.prot; did you mean port\?"),
        ("[server]\nhost_cache = 1\n", r"unknown key server.host_cache; did you mean cache.host_cache\?"),
        ("port = 1\n", r"key port belongs to no section; put it below \[server\]"),
        ("prot = 1\n", "key prot belongs to no section; `python -m dynamo.serve config` prints all there are$"),
        ("[server]\ncors = 1\n", "unknown key server.cors; `python -m dynamo.serve config` prints all there are"),
        ("server = 1\n", "must be a table"),
        ("[server]\nport = true\n", "server.port: true is not accepted; accepted is an integer"),
        ("[model]\ndevice = ['cpu']\n", r"model.device: \['cpu'\] is not accepted; accepted is cpu"),
        ("[cache]\nhost_cache = []\n", r"cache.host_cache: \[\] is not accepted; accepted is a size"),
        pytest.param(f"a = {5000 * '['}", "not valid TOML: maximum recursion", id="nested"),
        ("[server\n", "not valid TOML"),
        ('[server]\napi_key = ""\n', "the value is not accepted"),
    ],
)
def test_mistakes_in_the_file_are_told_with_the_way_out(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(file, {})
    assert str(file) in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff[server]\nport = 1\n"), {}).config.server.port == 1


def test_a_file_that_cannot_be_read_is_one_sentence_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "large.toml").write_bytes(bytes(2 << 20))
    for file, says in (
        ("none.toml", "there is no such file; check the path"),
        (".", "this is a folder; give the path of a file"),
        ("large.toml", "it has more than 1 MiB, so it is no file of settings"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_command_line(["--config", str(tmp_path / file)])
        assert str(caught.value) == f"--config {tmp_path / file}: {says}"
    with pytest.raises(ConfigError, match=r"^--config: '' is not accepted; accepted is the path of a file$"):
        parse_command_line(["--config", ""])


def test_the_printed_configuration_can_be_loaded_again(tmp_path: Path) -> None:
    arguments: list[Any] = [
        *(
            "config",
            'a "model"\\',
            "--disk-cache",
            f"{tmp_path}/käse,{tmp_path}/brot:100MiB",
            "--device-cache",
            "64MiB",
            "--threads",
            "3",
        ),
        *(
            "--max-model-len",
            "512",
            "--api-key",
            "the secret",
            "--engine",
            "mocker",
            "--mocker-token-time",
            "0.00001",
            "--served-model-name",
            "m\n",
        ),
        *("--eviction", "lru", "--admission", "second_sighting", "--disk-write-budget", "500GB"),
        *("--admin", "--key-log", f"{tmp_path}/keys.jsonl"),
    ]
    command = parse_command_line(arguments)
    assert command.show_config
    printed = render_toml(command.loaded)
    assert "the secret" not in printed
    again = load_config(write(tmp_path, printed), {"server.api_key": "the secret"})
    assert again.config == command.loaded.config
    assert 'device_cache = "64MiB"  # --device-cache' in printed
    assert "port = 8000  # default" in printed


def test_an_item_of_a_list_that_is_not_accepted_is_shown_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"^--external: 'nonsense' is not accepted; accepted is an address"):
        load_config(None, {"fleet.external": ["nonsense"]})
