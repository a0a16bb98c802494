"""Digests name bytes and block together."""

import numpy as np
import pytest
import xxhash

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.digest import digest_rows


def test_digest_is_seeded_xxh3_of_the_payload() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, 64), dtype=np.uint8)
    seeds = np.array([7, 2**64 - 1], dtype=np.uint64)
    digests = digest_rows(rows, np.array([3, 0]), seeds, 50)
    assert digests.dtype == np.uint64
    assert digests.tolist() == [
        xxhash.xxh3_64_intdigest(rows[3, :50].tobytes(), 7),
        xxhash.xxh3_64_intdigest(rows[0, :50].tobytes(), 2**64 - 1),
    ]


def test_padding_does_not_count_but_every_payload_byte_and_the_seed_do() -> None:
    rows = np.zeros((1, 64), dtype=np.uint8)
    row_ids, seed = np.array([0]), np.array([1], dtype=np.uint64)
    digest = digest_rows(rows, row_ids, seed, 50)
    rows[0, 50:] = 9
    assert digest_rows(rows, row_ids, seed, 50) == digest
    assert digest_rows(rows, row_ids, seed + np.uint64(1), 50) != digest
    for byte in range(50):
        rows[0, byte] ^= 0x10
        assert digest_rows(rows, row_ids, seed, 50) != digest
        rows[0, byte] ^= 0x10


def test_published_vectors_hold() -> None:
    rows = np.arange(64, dtype=np.uint8).reshape(2, 32)
    seeds = np.array([0, 0x0123456789ABCDEF], dtype=np.uint64)
    assert [f"{d:016x}" for d in digest_rows(rows, np.array([0, 1]), seeds, 32).tolist()] == [
        "3523581fe96e4c05",
        "2998ef7e37c652ff",
    ]


def test_no_rows_give_no_digests() -> None:
    rows = np.zeros((1, 64), dtype=np.uint8)
    assert digest_rows(rows, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64), 64).shape == (0,)


def test_wrong_arguments_are_refused() -> None:
    rows = np.zeros((2, 64), dtype=np.uint8)
    seed = np.zeros(1, dtype=np.uint64)
    with pytest.raises(KernelArgumentError, match=r"row_ids holds 2, outside \[0, 2\)"):
        digest_rows(rows, np.array([2]), seed, 64)
    with pytest.raises(KernelArgumentError, match="seeds must be uint64"):
        digest_rows(rows, np.array([0]), seed.astype(np.int64), 64)  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="seeds must be uint64"):
        digest_rows(rows, np.array([0, 1]), seed, 64)
    with pytest.raises(KernelArgumentError, match="num_bytes is 65"):
        digest_rows(rows, np.array([0]), seed, 65)
