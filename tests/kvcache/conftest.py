"""A small spec, and KV content that names the block it belongs to, so that any mix-up is seen."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec, Sequence
from dynamo.kvcache.hashing import block_keys, chain_root

SPEC = KVSpec(model="test", num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=4)


class Content:
    """Writes and checks the KV that a model would have computed: random numbers seeded by a block's whole prefix."""

    def __init__(self, spec: KVSpec = SPEC, salt: str = "") -> None:
        self.spec = spec
        self._root = chain_root(spec.fingerprint, spec.block_size, salt=salt)

    def of_blocks(self, tokens: list[int]) -> list[torch.Tensor]:
        """Per full block: [layers, 2, block_size, heads, dim]."""
        spec = self.spec
        shape = (spec.num_layers, 2, spec.block_size, spec.num_kv_heads, spec.head_dim)
        blocks = []
        for key in block_keys(tokens, spec.block_size, self._root):
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
            blocks.append(torch.rand(shape, generator=generator))
        return blocks

    def write(self, cache: KVCache, sequence: Sequence, tokens: list[int], first_block: int) -> None:
        table = sequence.block_table
        for i, block in enumerate(self.of_blocks(tokens)):
            if i >= first_block:
                for layer in range(self.spec.num_layers):
                    k, v = cache.layer(layer)
                    k[int(table[i])], v[int(table[i])] = block[layer, 0], block[layer, 1]

    def check(self, cache: KVCache, sequence: Sequence, tokens: list[int], num_tokens: int) -> None:
        table = sequence.block_table
        for i, block in enumerate(self.of_blocks(tokens[:num_tokens])):
            for layer in range(self.spec.num_layers):
                k, v = cache.layer(layer)
                assert torch.equal(k[int(table[i])], block[layer, 0]), f"K of block {i}, layer {layer} is wrong"
                assert torch.equal(v[int(table[i])], block[layer, 1]), f"V of block {i}, layer {layer} is wrong"

    def run(self, cache: KVCache, tokens: list[int], salt: str = "") -> int:
        """What an engine does with a prompt: open, check what is cached, compute the rest, commit, close."""
        with cache.open(tokens, salt=salt) as sequence:
            sequence.wait()
            cached = sequence.num_cached_tokens
            self.check(cache, sequence, tokens, cached)
            self.write(cache, sequence, tokens, cached // self.spec.block_size)
            sequence.commit()
        return cached

    def run_in_pieces(self, cache: KVCache, sequence: Sequence, tokens: list[int], piece: int) -> None:
        """What an engine does with a sequence opened with `overlap`: computes pieces of it, checks what lies between."""
        computed = 0
        while computed < len(tokens):
            start, computed = sequence.next_span(computed, piece)
            self.check(cache, sequence, tokens, start)
            self.write(cache, sequence, tokens[:computed], start // self.spec.block_size)
            sequence.commit(computed)
        self.check(cache, sequence, tokens, len(tokens))


@pytest.fixture
def content() -> Content:
    return Content()


@pytest.fixture
def make_content() -> type[Content]:
    return Content


@pytest.fixture
def spec() -> KVSpec:
    return SPEC


@pytest.fixture
def make_cache() -> Iterator[Callable[..., KVCache]]:
    """Makes caches that are closed, with their invariants checked, at the end of the test."""
    with ExitStack() as stack:

        def make(device_blocks: int = 16, **options: object) -> KVCache:
            options.setdefault("device", "cpu")
            options.setdefault("scrub_bytes_per_s", 0)  # a test that damages a block says who is to find it
            cache = stack.enter_context(KVCache(options.pop("spec", SPEC), device_blocks=device_blocks, **options))
            stack.callback(cache.check_invariants)
            return cache

        yield make


@pytest.fixture
def num_stateful_steps() -> int:
    """Steps of a random test, about: few in ordinary runs, as many as DYNAMO_STATEFUL_STEPS says in long ones."""
    return int(os.environ.get("DYNAMO_STATEFUL_STEPS", "2000"))
