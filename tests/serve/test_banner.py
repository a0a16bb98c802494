from pathlib import Path

import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.workers import WorkerCard
from dynamo.serve.banner import render_banner, render_fleet_banner
from dynamo.serve.config import ServerSettings
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.served_model import ModelSummary, ServedModel


def card(worker_id: str, **facts: object) -> WorkerCard:
    return WorkerCard(
        worker_id=worker_id,
        epoch=1,
        model="m",
        fingerprint="00",
        hash_version=HASH_VERSION,
        block_size=16,
        **facts,  # type: ignore[arg-type]
    )


def banner(*cards: WorkerCard) -> list[str]:
    served = ServedModel(name="m", codec=None, max_model_len=99, defaults=SamplingDefaults())  # type: ignore[arg-type]
    text = render_fleet_banner("m", served, cards, ServerSettings(), "http://127.0.0.1:8000")
    return [line.strip() for line in text.splitlines()]


def test_a_front_lists_its_workers_by_number_and_what_each_has() -> None:
    blocks = {"device": 4, "disk": 0}
    lines = banner(
        card("worker-10", block_bytes=1024, num_blocks=blocks),
        card("worker-2", block_bytes=1024, num_blocks={"device": 4, "disk": 8}),
        card("external-0"),
    )
    assert lines[5:8] == [
        "worker-2     device 4 KiB, disk 8 KiB",
        "worker-10    device 4 KiB, no disk tier, see the log",
        "external-0   an engine of another make",
    ]


def test_a_tier_that_is_not_there_although_it_was_asked_for_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spec = KVSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=4)
    summary = ModelSummary(description="m", num_parameters=None, device="cpu", dtype="float32", max_model_len=99)
    with KVCache(spec, device="cpu", device_blocks=4, disk=f"{tmp_path / 'file'}:1MiB") as cache:
        text = render_banner(summary, "m", 99, cache.stats(), ServerSettings(), "http://127.0.0.1:8000")
    assert "  device tier  16 KiB, 4 blocks, memory\n" in text
    assert "  disk tier    none, see the log\n" in text


def test_a_front_without_workers_says_what_requests_do() -> None:
    assert "workers      none yet; requests wait for one" in banner()
