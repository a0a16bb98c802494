"""Each part takes the settings that mean something to it, and says where the others belong."""

from pathlib import Path

import pytest

from dynamo.router.config import RouterConfig
from dynamo.serve.command_line import parse_command_line
from dynamo.serve.config import Config, RouterSettings
from dynamo.serve.errors import ConfigError
from dynamo.serve.fleet_settings import router_config
from dynamo.serve.roles import Role


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAMO_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("arguments", "role"),
    [
        ([], Role.SERVER),
        (["/models/x", "--workers", "2", "--host-cache", "1GiB", "--router-mode", "random"], Role.SERVER),
        (["--workers", "2", "--discovery", "/run/x", "--external", "http://a:1", "--key-log", "/keys"], Role.SERVER),
        (["frontend", "/models/x", "--discovery", "/run/x", "--port", "1", "--api-key", "k"], Role.FRONTEND),
        (["frontend", "--external", "http://a:1", "--engine", "mocker", "--max-model-len", "99"], Role.FRONTEND),
        (["worker", "/models/x", "--discovery", "/run/x", "--worker-id", "w", "--threads", "2"], Role.WORKER),
        (["config", "worker", "--discovery", "/run/x", "--key-log", "/keys"], Role.WORKER),
    ],
)
def test_each_part_takes_what_means_something_to_it(arguments: list[str], role: Role) -> None:
    assert parse_command_line(arguments).role is role


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["frontend", "--discovery", "/x", "--host-cache", "1GiB"],
            "--host-cache means nothing to a front, .* workers",
        ),
        (["frontend", "--discovery", "/x", "--key-log", "/keys"], "--key-log means nothing to a front"),
        (["frontend", "--discovery", "/x", "--workers", "2"], "--workers means nothing to a front"),
        (["frontend", "--discovery", "/x", "--admin"], "--admin means nothing to a front, .* server of one process"),
        (["frontend"], "needs --discovery DIR.* or --external URL"),
        (["worker"], "a worker needs --discovery DIR"),
        (["worker", "--discovery", "/x", "--port", "1"], "--port means nothing to a worker, .*; give it to the front"),
        (["worker", "--discovery", "/x", "--router-mode", "kv"], "--router-mode means nothing to a worker"),
        (["worker", "--discovery", "/x", "--workers", "2"], "--workers means nothing .* as often as"),
        (["--discovery", "/x"], "--discovery means nothing to a server of one process; add --workers N"),
        (["--external", "http://a:1"], "--external means nothing to a server of one process; add --workers N"),
        (["--migration-limit", "0"], "--migration-limit means nothing to a server of one process"),
        (["--workers", "2", "--worker-id", "x"], "--worker-id means nothing .* give it to 'worker'"),
        (["--workers", "2", "--admin"], "--admin means nothing to a server with --workers"),
        (["frontend", "--external", "http://a:1", "--kv-events", "off", "--kv-events", "off"], "2 times .* 1 times"),
        (["frontend", "--external", "http://a:1", "--external", "http://a:1/"], "names a server twice"),
    ],
)
def test_flags_that_would_do_nothing_are_refused_with_where_they_belong(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_command_line(arguments)


def test_each_part_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            parse_command_line([*arguments, "--help"])
        return capsys.readouterr().out

    front, worker, whole = shown("frontend"), shown("worker"), shown()
    assert "--router-mode" in front and "--router-mode" not in worker and "Router:" not in worker
    assert "--host-cache" in worker and "--host-cache" not in front and "Cache:" in front
    assert all(flag in whole for flag in ("--router-mode", "--host-cache", "--worker-id", "--workers", "--admin"))


def test_one_file_serves_all_parts(tmp_path: Path) -> None:
    file = tmp_path / "dynamo.toml"
    file.write_text('[cache]\nhost_cache = "2GiB"\n[server]\nport = 9000\n[router]\nmode = "random"\n')
    for arguments in ([], ["--workers", "2"], ["frontend", "--discovery", "/x"], ["worker", "--discovery", "/x"]):
        loaded = parse_command_line([*arguments, "--config", str(file)]).loaded
        assert loaded.config.cache.host_cache == 2 << 30


def test_a_file_does_not_bring_administration_to_a_server_of_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "dynamo.toml"
    file.write_text("[server]\nadmin = true\n[fleet]\nworkers = 2\n")
    with pytest.raises(ConfigError, match="admin = true goes with a server of one process"):
        parse_command_line(["--config", str(file)])


def test_the_routers_defaults_are_the_routers_own() -> None:
    assert router_config(Config().router, "") == RouterConfig()


def test_every_router_setting_reaches_the_router() -> None:
    changed = RouterSettings(
        mode="random",
        temperature=1.5,
        queue_weight=2.0,
        prefix_weight=0.5,
        decode_weight=3.0,
        balance_weight=0.25,
        prediction_ttl=1.0,
        approximate_ttl=2.0,
        affinity="hard",
        session_ttl=3.0,
        busy_requests=5.0,
        busy_queue=6.0,
        busy_blocks=0.5,
        max_waiting=7,
        waiting_timeout=8.0,
    )
    config = router_config(changed, "front")
    default = RouterConfig()
    same = {name for name in RouterConfig.__dataclass_fields__ if getattr(config, name) == getattr(default, name)}
    assert same == {"session_slack_s", "max_sessions", "set_aside_s", "booking_expiry_s"}
