from pathlib import Path

import pytest

from dynamo.serve.conflicts import describe_conflict


def test_nothing_is_said_where_ai_dynamo_is_not_installed() -> None:
    assert describe_conflict() is None


@pytest.mark.parametrize("name", ["ai-dynamo", "ai-dynamo-runtime"])
def test_ai_dynamo_beside_us_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs = tmp_path / f"{name.replace('-', '_')}-1.6.1.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.6.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = describe_conflict()
    assert message is not None
    assert f"{name} 1.6.1" in message and "virtual environment of its own" in message
