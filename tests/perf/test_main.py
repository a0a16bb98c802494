"""The command line of `python -m dynamo.perf`."""

import json
import re
from pathlib import Path

import pytest

from dynamo.perf.__main__ import main
from dynamo.serve.config import SECTIONS

# A new option needs a measured reason; this list is where it is argued.
OPTIONS = {
    "blocks": {"--tokens", "--blocks", "--repeats", "--vllm-python", "--vllm-hash", "--out"},
    "store": {"--shape", "--size", "--repeats", "--threads", "--path", "--out"},
    "disk": {"--path", "--size", "--quick", "--lmcache-python", "--out"},
    "doctor": {
        "--config",
        "--size",
        "--device",
        "--workers",
        "--engine",
        "--out",
        *(str(entry.flag) for entry in SECTIONS["cache"]),
    },
    "router": {"--workers", "--blocks", "--prompts", "--repeats", "--dynamo-python", "--out"},
    "serve": {
        "--streams",
        "--pace",
        "--tokens",
        "--total-tokens",
        "--seconds",
        "--url",
        "--server-pid",
        "--api-key",
        "--workers",
        "--dynamo-python",
        "--out",
    },
}


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--help"])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_a_folder_for_results_that_cannot_be_made_is_refused_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["trace", str(tmp_path / "nothing"), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"error: --out {tmp_path / 'file'}: this is no folder; give another path\n"


def test_help_lists_the_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    assert text.index("cache:") < text.index("  blocks ") < text.index("  store ") < text.index("server:")
    assert "  serve " in text


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_are_these(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, command)
    assert set(re.findall(r"--[a-z][a-z-]+", text.split("options:")[1])) - {"--help"} >= OPTIONS[command]
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) == OPTIONS[command]
    assert "\noutput:\n" in text


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_what_cannot_be_measured_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocks", "--tokens", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --tokens 1 are 1 blocks")
    assert "Traceback" not in captured.err


def test_results_are_written_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["blocks", "--tokens", "64", "--blocks", "8", "--repeats", "1"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "not written" in captured.err
    assert "dynamo-kv" in captured.out
    assert main([*arguments, "--out", str(tmp_path / "r")]) == 0
    (path,) = (tmp_path / "r").glob("blocks-*.jsonl")
    assert path.name in capsys.readouterr().out.replace("\n", "")
    assert json.loads(path.read_text().splitlines()[0])["benchmark"] == "blocks"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("store --size abc", "--size: 'abc' is no size; write it as 64MiB"),
        ("store --size 900TiB", "--path /tmp has .* free and this run takes up to 1800 TiB"),
        ("store --path /no/such", "--path /no/such is no folder; make it"),
        ("store --threads 0", "--threads must be 1 or more, not 0"),
        ("disk --path . --path ./", "--path names a folder twice: ., .; give each once"),
        ("disk --path . --size 1x", "--size: '1x' is no size"),
        ("doctor --size -1", "--size: '-1' is no size"),
        ("crash --path /no/such", "--path /no/such is no folder; make it"),
        ("crash --blocks 1000000000000", "--path . has .* free and this run takes"),
        ("index --path /no/such", "--path /no/such is no folder; make it"),
        (
            "index --blocks 1000000000000 --repeats 1",
            "there is not enough memory for a run of this size .*; make it smaller",
        ),
        ("ttft --path /no/such", "--path /no/such is no folder; make it"),
        ("ttft --throttle 5 nan", "--throttle must be more than 0, not nan"),
        ("soak trace --workers 5000", "--workers must be from 1 to 4096, not 5000"),
        ("trace trace --plot .", "--plot . is a folder; give the path of a file"),
        ("trace trace --host-gb-per-s inf", "--host-gb-per-s must be more than 0, not inf"),
        ("serve --seconds nan", "--seconds must be more than 0, not nan"),
        ("serve --streams 0", "--streams must be 1 or more, not 0"),
        ("serve --server-pid 1", "--server-pid is of the server that --url names; give --url, or leave it out"),
        ("serve --url http://127.0.0.1:99999", "--url http://127.0.0.1:99999 must be of the form http://HOST:PORT"),
        ("serve --url http://[::1", "must be of the form http://HOST:PORT"),
        (
            "serve --url http://127.0.0.1:1 --server-pid 999999999",
            "--server-pid 999999999 is no process of this machine",
        ),
    ],
)
def test_options_that_cannot_work_are_one_line_before_anything_is_measured(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(arguments.split()) == 1
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert re.match(f"error: .*{says}", line)
    assert captured.out == ""
