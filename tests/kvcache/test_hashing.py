import subprocess
import sys

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dynamo.kvcache.hashing import ChainRoot, KeyChain, block_keys, chain_root, pack_tokens

# Published vectors: another implementation must give the same keys. Root of fingerprint 00..0f, block size 4, no salt or LoRA.
ROOT = ChainRoot(lo=0x14434D1593613D36, hi=0xAF76560F7B175AFF)
VECTORS = {
    (1, 2, 3, 4): ["d21637a3fc8fe5337de35a7e5d8d74fe"],
    (1, 2, 3, 4, 5, 6, 7, 8): ["d21637a3fc8fe5337de35a7e5d8d74fe", "06bd074e2abf670ca30ff1897f06f83b"],
    (0, 0, 0, 4294967295): ["65cba221f8d1cb47122614b58b9ce333"],
}
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def test_root_of_the_published_vectors():
    assert chain_root(bytes(range(16)), 4) == ROOT


@pytest.mark.parametrize("tokens", VECTORS)
def test_published_vectors(tokens):
    assert [key.hex() for key in block_keys(list(tokens), 4, ROOT)] == VECTORS[tokens]


@given(TOKENS, st.sampled_from([1, 4, 16]))
def test_a_key_is_two_seeded_digest_chains_over_little_endian_tokens(tokens, block_size):
    lo, hi = ROOT.lo, ROOT.hi
    expected = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        data = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + block_size])
        lo, hi = xxhash.xxh3_64(data, seed=lo).intdigest(), xxhash.xxh3_64(data, seed=hi).intdigest()
        expected.append(lo.to_bytes(8, "little") + hi.to_bytes(8, "little"))
    assert block_keys(tokens, block_size, ROOT) == expected


@given(TOKENS, st.integers(0, 17))
def test_a_chain_extended_in_pieces_has_the_same_keys(tokens, num_blocks):
    whole = block_keys(tokens, 4, ROOT)
    chain = KeyChain(ROOT, 4)
    chain.extend(pack_tokens(tokens[: 4 * num_blocks]))
    chain.extend(pack_tokens(tokens[4 * num_blocks :]))
    assert chain.keys == whole


@given(TOKENS)
def test_lists_arrays_and_numpy_give_the_same_keys(tokens):
    assert block_keys(np.array(tokens, dtype=np.uint32), 4, ROOT) == block_keys(tokens, 4, ROOT)


def test_every_part_of_the_root_changes_every_key():
    fingerprint = bytes(16)
    roots = [
        chain_root(fingerprint, 16),
        chain_root(b"\x01" + fingerprint[1:], 16),
        chain_root(fingerprint, 32),
        chain_root(fingerprint, 16, salt="a"),
        chain_root(fingerprint, 16, lora="a"),
        chain_root(fingerprint, 16, salt="a", lora="a"),
        chain_root(fingerprint, 16, salt="aa"),
    ]
    keys = [block_keys(list(range(16)), 16, root)[0] for root in roots]
    assert len({key[:8] for key in keys}) == len({key[8:] for key in keys}) == len(roots)


def test_keys_are_the_same_in_another_process():
    script = (
        "from dynamo.kvcache.hashing import block_keys, chain_root\n"
        "print(block_keys(list(range(64)), 16, chain_root(b'm' * 16, 16, salt='s'))[-1].hex())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == block_keys(list(range(64)), 16, chain_root(b"m" * 16, 16, salt="s"))[-1].hex()


@pytest.mark.parametrize(
    "tokens", [[-1], [2**32], ["a"], [1.5], np.zeros(4, dtype=np.int64), np.zeros((2, 2), dtype=np.uint32)]
)
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValueError, match=r"token"):
        pack_tokens(tokens)
