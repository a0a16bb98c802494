"""Blocks that move layer by layer beside the forward pass."""

import threading

import pytest
import torch

from dynamo.kvcache.errors import LayerLoadError, SequenceStateError
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier

TOKENS = list(range(33))  # eight full blocks and one token to compute
NUM_LAYERS = 2  # of the tests' spec
TIMEOUT_S = 10.0


def check_layer(content, cache, sequence, tokens, layer, num_blocks):
    table = sequence.block_table
    for i, block in enumerate(content.of_blocks(tokens)[:num_blocks]):
        k, v = cache.layer(layer)
        assert torch.equal(k[int(table[i])], block[layer, 0]), f"K of block {i}, layer {layer} is wrong"
        assert torch.equal(v[int(table[i])], block[layer, 1]), f"V of block {i}, layer {layer} is wrong"


def write_layer(content, cache, sequence, tokens, layer, first_block):
    table = sequence.block_table
    for i, block in enumerate(content.of_blocks(tokens)):
        if i >= first_block:
            k, v = cache.layer(layer)
            k[int(table[i])], v[int(table[i])] = block[layer, 0], block[layer, 1]


class Steps:
    """Lets `DeviceTier` copy whole blocks, or one layer, only as often as it was allowed to; writes down what it did."""

    def __init__(self, monkeypatch, method: str, num_allowed: int = 0) -> None:
        self.done: list = []
        self._allowed = threading.Semaphore(num_allowed)
        self.fault: Exception | None = None
        original = getattr(DeviceTier, method)

        def step(tier, slots, rows, row_ids, *arguments, **options):
            assert self._allowed.acquire(timeout=TIMEOUT_S), "nobody let the device go on"
            if self.fault is not None:
                raise self.fault
            outcome = original(tier, slots, rows, row_ids, *arguments, **options)
            self.done.append(*arguments or [None])
            return outcome

        monkeypatch.setattr(DeviceTier, method, step)

    def allow(self, count: int) -> None:
        self._allowed.release(count)


@pytest.fixture
def warm(make_cache, content):
    """A cache that has TOKENS in host memory only."""

    def make(**options):
        cache = make_cache(host="1MiB", **options)
        content.run(cache, TOKENS)
        assert cache.flush()
        cache.clear("device")
        return cache

    return make


def test_layers_arrive_in_order_and_only_as_far_as_they_are_there(warm, content, monkeypatch):
    cache = warm()
    layers = Steps(monkeypatch, "write_layers")
    sequence, promised = open_by_layers(cache, monkeypatch)
    with sequence:
        assert promised == 8
        layers.allow(1)
        sequence.wait_layer(0, TIMEOUT_S)
        check_layer(content, cache, sequence, TOKENS, 0, 8)
        with pytest.raises(TimeoutError, match="layer 1 of 8"):
            sequence.wait_layer(1, 0.05)
        assert layers.done == [range(1)]
        layers.allow(1)
        sequence.wait_layer(1, TIMEOUT_S)
        check_layer(content, cache, sequence, TOKENS, 1, 8)
        assert layers.done == [range(1), range(1, 2)]
        content.write(cache, sequence, TOKENS, 8)
        sequence.commit()
    assert content.run(cache, TOKENS) == 32
    assert cache.stats().tier("host").hit_blocks == 8


def open_by_layers(cache, monkeypatch):
    """Opens TOKENS and goes on by layers before a whole block was copied."""
    begun, go_on = threading.Event(), threading.Event()
    original = DeviceTier.write

    def barred(tier, slots, rows, row_ids, after=()):
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        raise ValueError("whole blocks are barred in this test")

    monkeypatch.setattr(DeviceTier, "write", barred)
    sequence = cache.open(TOKENS)
    assert begun.wait(TIMEOUT_S)
    go_on.set()
    promised = sequence.begin_layerwise()
    monkeypatch.setattr(DeviceTier, "write", original)
    return sequence, promised


def test_blocks_loaded_by_layers_count_as_hits_of_their_tier(warm):
    cache = warm()
    with cache.open(TOKENS) as sequence:
        sequence.begin_layerwise()
        num_cached = sequence.num_cached_tokens
        sequence.commit()
    [host] = [tier for tier in cache.stats().window.tiers if tier.tier == "host"]
    assert host.hit_tokens == num_cached > 0


def test_committing_waits_for_the_layers(warm, content, monkeypatch):
    cache = warm()
    sequence, _ = open_by_layers(cache, monkeypatch)
    with sequence:
        content.write(cache, sequence, TOKENS, 8)
        sequence.commit()
        content.check(cache, sequence, TOKENS, 32)
    assert cache.lookup(TOKENS).device_tokens == 32


def test_closing_during_the_layers_gives_everything_back(warm, content, monkeypatch):
    cache = warm()
    layers = Steps(monkeypatch, "write_layers")
    sequence, _ = open_by_layers(cache, monkeypatch)
    layers.allow(1)
    sequence.wait_layer(0, TIMEOUT_S)
    layers.allow(1)
    sequence.close()
    assert cache.lookup(TOKENS).device_tokens == 0
    layers.allow(10)
    assert content.run(cache, TOKENS) == 32


def test_a_failing_device_raises_and_leaves_the_cache_sound(warm, content, monkeypatch):
    cache = warm()
    layers = Steps(monkeypatch, "write_layers")
    layers.fault = ValueError("the device fell off the bus")
    sequence, promised = open_by_layers(cache, monkeypatch)
    with sequence:
        layers.allow(1)
        with pytest.raises(LayerLoadError, match="layer 0 of 8") as caught:
            sequence.wait_layer(0, TIMEOUT_S)
        assert (caught.value.layer, caught.value.num_blocks) == (0, promised)
        assert caught.value.__cause__ is layers.fault
    assert cache.lookup(TOKENS).device_tokens == 0
    assert content.run(cache, TOKENS) == 32


def test_what_is_on_disk_only_is_not_promised(make_cache, content, tmp_path, monkeypatch):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:4MiB")
    content.run(cache, TOKENS)
    assert cache.flush()
    cache.clear("host")
    cache.clear("device")
    content.run(cache, TOKENS[:13])  # three blocks come back to host
    cache.clear("device")
    gate = threading.Event()
    read = DiskTier.read

    def held(tier, slots, rows, row_ids):
        assert gate.wait(TIMEOUT_S)
        return read(tier, slots, rows, row_ids)

    monkeypatch.setattr(DiskTier, "read", held)
    with cache.open(TOKENS) as sequence:
        assert sequence.begin_layerwise() == 3
        for layer in range(NUM_LAYERS):
            sequence.wait_layer(layer, TIMEOUT_S)
            check_layer(content, cache, sequence, TOKENS, layer, 3)
        gate.set()
        content.write(cache, sequence, TOKENS, 3)
        sequence.commit()
    assert cache.stats().load_faults["late"] == 5
    assert content.run(cache, TOKENS) == 32


def test_blocks_that_came_from_disk_in_time_are_promised(make_cache, content, tmp_path, eventually):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:4MiB")
    content.run(cache, TOKENS)
    assert cache.flush()
    cache.clear("host")
    cache.clear("device")
    with cache.open(TOKENS) as sequence:
        eventually(lambda: sequence.is_ready)
        assert sequence.begin_layerwise() == 8
        sequence.wait_layer(NUM_LAYERS - 1, TIMEOUT_S)
        content.check(cache, sequence, TOKENS, 32)


def test_without_anything_to_load_every_layer_is_there(make_cache, content):
    cache = make_cache()
    content.run(cache, TOKENS)
    with cache.open(TOKENS) as sequence:
        assert sequence.begin_layerwise() == 8
        sequence.wait_layer(NUM_LAYERS - 1)
        content.check(cache, sequence, TOKENS, 32)


def test_waiting_for_a_layer_before_a_promise_is_refused(warm):
    cache = warm()
    with cache.open(TOKENS) as sequence, pytest.raises(SequenceStateError, match="begin_layerwise"):
        sequence.wait_layer(0)


def compute_by_layers(content, cache, sequence, tokens, num_layers=NUM_LAYERS):
    for layer in range(num_layers):
        write_layer(content, cache, sequence, tokens, layer, 0)
        sequence.commit_layer(layer)


def test_a_layer_goes_down_while_the_next_one_is_computed(make_cache, content, monkeypatch, eventually):
    cache = make_cache(host="1MiB")
    layers = Steps(monkeypatch, "read_layers", num_allowed=10)
    whole = Steps(monkeypatch, "read", num_allowed=10)
    with cache.open(TOKENS) as sequence:
        write_layer(content, cache, sequence, TOKENS, 0, 0)
        sequence.commit_layer(0)
        eventually(lambda: layers.done == [range(1)])  # although layer 1 is not there yet
        assert cache.lookup(TOKENS).cached_tokens == 0
        write_layer(content, cache, sequence, TOKENS, 1, 0)
        sequence.commit_layer(1)
        sequence.commit()
        assert cache.flush()
        assert cache.lookup(TOKENS).host_tokens == 32
    assert layers.done == [range(1), range(1, 2)]
    assert not whole.done
    cache.clear("device")
    assert content.run(cache, TOKENS) == 32


def test_blocks_saved_by_layers_go_on_to_disk(make_cache, content, tmp_path):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:4MiB")
    with cache.open(TOKENS) as sequence:
        sequence.wait()
        compute_by_layers(content, cache, sequence, TOKENS)
        sequence.commit()
    assert cache.flush()
    cache.clear("device")
    cache.clear("host")
    assert content.run(cache, TOKENS) == 32


def test_a_sequence_closed_before_its_commit_leaves_nothing(make_cache, content, eventually):
    cache = make_cache(host="1MiB")
    with cache.open(TOKENS) as sequence:
        compute_by_layers(content, cache, sequence, TOKENS)
    eventually(lambda: not any(tier.num_pinned_blocks for tier in cache.stats().tiers))
    assert cache.lookup(TOKENS).cached_tokens == 0
    assert content.run(cache, TOKENS) == 0


@pytest.mark.parametrize("layers", [[0], [0, 0, 1], [1, 0], [0, 1, 1]], ids=str)
def test_a_commit_that_the_layers_do_not_add_up_to_copies_whole_blocks(make_cache, content, layers):
    cache = make_cache(host="1MiB")
    with cache.open(TOKENS) as sequence:
        content.write(cache, sequence, TOKENS, 0)
        for layer in layers:
            sequence.commit_layer(layer)
        sequence.commit()
    assert cache.flush()
    cache.clear("device")
    assert content.run(cache, TOKENS) == 32


def test_a_commit_of_less_than_the_layers_publishes_no_more(make_cache, content):
    cache = make_cache(host="1MiB")
    with cache.open(TOKENS) as sequence:
        content.write(cache, sequence, TOKENS, 0)
        for layer in range(NUM_LAYERS):
            sequence.commit_layer(layer)
        sequence.commit(12)
        assert cache.flush()
        assert cache.lookup(TOKENS).cached_tokens == 12
        sequence.commit()
    assert cache.flush()
    cache.clear("device")
    assert content.run(cache, TOKENS) == 32


def test_a_fault_in_the_middle_of_the_layers_costs_nothing(make_cache, content, monkeypatch, eventually):
    cache = make_cache(host="1MiB")
    layers = Steps(monkeypatch, "read_layers", num_allowed=1)
    with cache.open(TOKENS) as sequence:
        write_layer(content, cache, sequence, TOKENS, 0, 0)
        sequence.commit_layer(0)
        eventually(lambda: layers.done == [range(1)])
        layers.fault = ValueError("a copy failed")
        layers.allow(1)
        write_layer(content, cache, sequence, TOKENS, 1, 0)
        sequence.commit_layer(1)
        sequence.commit()
    assert cache.flush()
    cache.clear("device")
    assert content.run(cache, TOKENS) == 32


def test_two_sequences_that_save_equal_blocks_by_layers_keep_one_of_each(make_cache, content):
    cache = make_cache(device_blocks=24, host="1MiB")
    with cache.open(TOKENS) as first, cache.open(TOKENS) as second:
        for sequence in (first, second):
            compute_by_layers(content, cache, sequence, TOKENS)
        first.commit()
        second.commit()
    assert cache.flush()
    assert cache.stats().tier("host").num_cached_blocks == 8
    cache.clear("device")
    assert content.run(cache, TOKENS) == 32


def test_a_host_tier_with_too_little_room_takes_the_rest_whole(make_cache, content):
    cache = make_cache(host="16KiB")
    with cache.open(TOKENS) as sequence:
        compute_by_layers(content, cache, sequence, TOKENS)
        sequence.commit()
    assert cache.flush()
    assert cache.lookup(TOKENS).host_tokens == 16
    cache.clear("device")
    assert content.run(cache, TOKENS) == 16


def test_layers_beyond_the_tokens_or_before_the_loads_have_ended_are_refused(warm):
    cache = warm()
    with cache.open(TOKENS) as sequence:
        with pytest.raises(SequenceStateError, match="commit_layer"):
            sequence.commit_layer(0)
        sequence.wait()
        with pytest.raises(SequenceStateError, match="34 tokens"):
            sequence.commit_layer(0, 34)
