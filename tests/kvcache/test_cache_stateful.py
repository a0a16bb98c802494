"""Random use of a whole cache, tiers and injected faults included: every byte it gives back is the right one."""

import contextlib
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from dynamo.kvcache import KVCache, KVSpec, OutOfBlocksError

PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 33))


def prompt_tokens(prompt: tuple[int, int, int]) -> list[int]:
    """Prompts of equal family share a prefix; those of equal variant, everything."""
    family, variant, length = prompt
    return [family] * min(length, 10) + [10 + variant] * max(0, length - 10)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come and go in a cache of 24 device blocks, 12 host blocks and 40 disk blocks."""

    sequences = Bundle("sequences")
    make_content: type  # set by the test below: fixtures do not reach state machines
    spec: KVSpec

    @initialize(host=st.sampled_from([None, "48KiB"]), disk=st.booleans())
    def start(self, host, disk):
        self.folder = Path(tempfile.mkdtemp(prefix="kv-stateful-"))
        self.host = host
        self.disk = f"{self.folder}:160KiB" if disk else None
        self.content = self.make_content()
        self.open_tokens: list = []
        self.cache = self.new_cache()

    def new_cache(self) -> KVCache:
        return KVCache(self.spec, device="cpu", device_blocks=24, host=self.host, disk=self.disk)

    def teardown(self):
        if hasattr(self, "cache"):
            for sequence, _ in self.open_tokens:
                sequence.close()
            assert self.cache.flush()
            self.cache.check_invariants()
            self.cache.close()
            shutil.rmtree(self.folder)

    @rule(target=sequences, prompt=PROMPTS, wait=st.sampled_from([None, 0.0, 0.002]))
    def open(self, prompt, wait):
        tokens = prompt_tokens(prompt)
        try:
            sequence = self.cache.open(tokens)
        except OutOfBlocksError:
            return multiple()
        sequence.wait(wait)
        cached = sequence.num_cached_tokens
        assert cached < len(tokens)
        assert cached % 4 == 0
        self.content.check(self.cache, sequence, tokens, cached)
        self.content.write(self.cache, sequence, tokens, cached // 4)
        sequence.commit()
        self.open_tokens.append((sequence, tokens))
        return (sequence, tokens)

    @rule(
        target=sequences,
        prompt=PROMPTS,
        wait=st.sampled_from([None, 0.0, 0.002]),
        piece=st.integers(1, 12),
        stop=st.integers(0, 33),
    )
    def open_and_compute_meanwhile(self, prompt, wait, piece, stop):
        tokens = prompt_tokens(prompt)
        try:
            sequence = self.cache.open(tokens, overlap=True)
        except OutOfBlocksError:
            return multiple()
        sequence.wait(wait)
        if stop < len(tokens):  # a request that is given up in the middle
            start, end = sequence.next_span(0, stop + 1)
            self.content.check(self.cache, sequence, tokens, start)
            self.content.write(self.cache, sequence, tokens[:end], start // 4)
            sequence.close()
            return multiple()
        self.content.run_in_pieces(self.cache, sequence, tokens, piece)
        assert sequence.num_cached_tokens < len(tokens)
        self.open_tokens.append((sequence, tokens))
        return (sequence, tokens)

    @rule(prompt=PROMPTS)
    def open_and_cancel(self, prompt):
        with contextlib.suppress(OutOfBlocksError):
            self.cache.open(prompt_tokens(prompt)).close()

    @rule(prompt=PROMPTS)
    def prefetch(self, prompt):
        with contextlib.suppress(OutOfBlocksError):
            self.cache.prefetch(prompt_tokens(prompt)).result(timeout=30)

    @rule(entry=sequences, token=st.integers(50, 51), count=st.integers(1, 6))
    def append(self, entry, token, count):
        sequence, tokens = entry
        try:
            sequence.append([token] * count)
        except OutOfBlocksError:
            return
        first = len(tokens) // 4
        tokens += [token] * count
        self.content.write(self.cache, sequence, tokens, first)
        sequence.commit()

    @rule(entry=sequences)
    def check(self, entry):
        sequence, tokens = entry
        self.content.check(self.cache, sequence, tokens, len(tokens))

    @rule(entry=consumes(sequences))
    def close(self, entry):
        sequence, tokens = entry
        self.content.check(self.cache, sequence, tokens, len(tokens))
        sequence.close()
        self.open_tokens = [other for other in self.open_tokens if other[0] is not sequence]

    @rule(tier=st.sampled_from([None, "device", "host", "disk"]))
    def clear(self, tier):
        self.cache.clear(tier)

    @rule()
    def flush(self):
        assert self.cache.flush()

    @precondition(lambda self: self.disk)
    @rule(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "truncate", "delete", "zero"]))
    def damage(self, seed, kind):
        for path in self.folder.rglob("blocks.dat"):
            rng = random.Random(seed)
            size = path.stat().st_size
            if kind == "delete":
                path.unlink()
            elif kind == "truncate":
                with path.open("r+b") as file:
                    file.truncate(rng.randrange(size + 1))
            elif size:
                with path.open("r+b") as file:
                    for _ in range(8):
                        file.seek(rng.randrange(size))
                        file.write(bytes(512) if kind == "zero" else bytes([rng.randrange(256)]))

    @precondition(lambda self: not self.open_tokens)
    @rule(damage_journal=st.booleans(), seed=st.integers(0, 2**32))
    def restart(self, damage_journal, seed):
        self.cache.close()
        if damage_journal:
            rng = random.Random(seed)
            for path in self.folder.rglob("journal.log"):
                data = bytearray(path.read_bytes())
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                    path.write_bytes(data[: rng.randrange(len(data) // 2, len(data) + 1)])
        self.cache = self.new_cache()

    @invariant()
    def books_balance(self):
        if hasattr(self, "cache"):
            self.cache.check_invariants()


@pytest.mark.slow
def test_random_use_with_faults_never_gives_a_wrong_byte(spec, make_content):
    class Machine(CacheMachine):
        pass

    Machine.spec, Machine.make_content = spec, make_content
    case = Machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    case("runTest").runTest()
