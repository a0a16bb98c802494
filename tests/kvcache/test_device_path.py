"""Which path blocks take between disk and device, and where that can be read."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.device_path import prove_device_path
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.kvikio_io import GdsProof


class ProvenDisk(DiskTier):
    """Tells of GPUDirect Storage what it was given."""

    proofs: list[GdsProof]

    def prove_gds(self, device: torch.device, kvikio: object = None) -> list[GdsProof]:
        return self.proofs


@pytest.fixture
def disk(spec: KVSpec, tmp_path: Path) -> ProvenDisk:
    return ProvenDisk.open(tmp_path, spec.layout, 4 * spec.layout.slot_bytes, spec.fingerprint)


def test_without_a_gpu_the_log_and_the_status_say_so(
    make_cache: Callable[..., KVCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = make_cache(disk=f"{tmp_path}:1MiB", host="64KiB")
    paths = {tier.tier: tier.device_path for tier in cache.status().tiers}
    assert paths == {"device": None, "host": None, "disk": "two hops through host memory: no CUDA device"}
    assert [record.message for record in caplog.records if "no CUDA device" in record.message]


@pytest.mark.parametrize(
    ("proofs", "reason"),
    [
        ([GdsProof(True, "compared"), GdsProof(False, "kvikio is not there")], "kvikio is not there"),
        ([GdsProof(True, "compared")], "digests of blocks are made and compared in host memory"),
    ],
)
def test_with_a_gpu_the_reason_for_two_hops_is_told(
    disk: ProvenDisk, proofs: list[GdsProof], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    disk.proofs = proofs
    path = prove_device_path(disk, torch.device("cuda:0"))
    disk.close()
    assert path.startswith("two hops through host memory: ")
    assert reason in path
    assert path in caplog.text
