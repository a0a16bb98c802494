"""A front alone: light, quick, and honest about having no workers."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo.serve.command_line import parse_command_line
from dynamo.serve.engine.loader import load_model
from dynamo.serve.front_process import read_model
from dynamo.serve.model_place import find_model

logger = logging.getLogger(__name__)


def front_of(*arguments: str) -> Any:
    return read_model(parse_command_line(["frontend", "--discovery", "/x", *arguments]).loaded.config)[1]


def test_a_front_loads_no_torch_and_is_small_and_quick(start_server: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    server = start_server("frontend", "--discovery", str(tmp_path / "d"), environment={"PYTHONPROFILEIMPORTTIME": "1"})
    seconds = time.monotonic() - started
    imported = {line.rpartition("|")[2].strip() for line in server.log.splitlines() if line.startswith("import time:")}
    assert "dynamo.serve.frontend" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "triton", "safetensors")}
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    rss_mib = int(match[1]) / 1024
    logger.info("a front has %.0f MiB and was ready after %.2f s", rss_mib, seconds)
    assert rss_mib < 160
    assert seconds < 10


def test_a_front_without_workers_lives_but_is_not_ready(start_server: Any, tmp_path: Path) -> None:
    server = start_server("frontend", "--discovery", str(tmp_path / "d"))
    assert "none yet" in server.banner
    assert httpx.get(server.url + "/live").status_code == 200
    assert httpx.get(server.url + "/health").status_code == 503
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "demo"
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_a_front_knows_of_its_model_what_an_engine_does() -> None:
    import torch

    text = front_of()
    loaded = load_model(find_model("demo")[0], device=torch.device("cpu"))
    assert text.max_model_len == loaded.max_model_len
    assert text.sampling_defaults == loaded.sampling_defaults
    assert text.tokenizer.vocab_size == loaded.tokenizer.vocab_size
    messages = [{"role": "user", "content": "hello"}]
    assert text.tokenizer.apply_chat_template(messages, max_tokens=99) == loaded.tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(("flag", "length"), [([], 131_072), (["--max-model-len", "99"], 99)])
def test_a_front_of_mocked_workers_needs_only_the_tokenizer(flag: list[str], length: int) -> None:
    assert front_of("--engine", "mocker", *flag).max_model_len == length


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(Exception, match="--max-model-len 100000 is more than the model's 16384"):
        front_of("--max-model-len", "100000")
