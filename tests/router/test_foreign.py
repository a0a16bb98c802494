import logging
from collections.abc import Sequence

import pytest

from dynamo.kvcache.event_wire import BlockHash, BlockRemoved, BlockStored
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.router.chain import PrefixChain
from dynamo.router.foreign import ForeignKeys
from dynamo.router.index import PrefixIndex

FINGERPRINT = b"model"
SIZE = 4
TOKENS = list(range(100, 100 + 8 * SIZE))


def los(tokens: Sequence[int] = TOKENS, size: int = SIZE, salt: str = "", lora: str = "") -> list[int]:
    root = chain_root(FINGERPRINT, size, salt=salt, lora=lora)
    return [int.from_bytes(key[:8], "little") for key in block_keys(list(tokens), size, root)]


def stored(
    hashes: Sequence[BlockHash], first: int = 0, parent: BlockHash | None = None, size: int = SIZE, **options: object
) -> BlockStored:
    """Blocks of TOKENS, from number `first` on."""
    tokens = TOKENS[first * size : (first + len(hashes)) * size]
    return BlockStored(list(hashes), parent, tokens, size, **options)  # type: ignore[arg-type]


class Worker:
    """An engine's translation and its slot of an index."""

    def __init__(self, index: PrefixIndex, name: str) -> None:
        self.index, self.slot, self.keys = index, index.join(), ForeignKeys(name, FINGERPRINT, SIZE)

    def store(self, event: BlockStored) -> None:
        for run in self.keys.stored(event):
            self.index.stored(self.slot, "device", run.keys, run.parent)

    def remove(self, *hashes: BlockHash) -> None:
        self.index.removed(self.slot, "device", self.keys.removed(BlockRemoved(list(hashes))))

    @property
    def score(self) -> int:
        packed = b"".join(token.to_bytes(4, "little") for token in TOKENS)
        chain = PrefixChain(chain_root(FINGERPRINT, SIZE).lo, packed, SIZE)
        reach = self.index.match(chain).get(self.slot)
        return reach.device if reach else 0


@pytest.fixture
def keys() -> ForeignKeys:
    return ForeignKeys("worker", FINGERPRINT, SIZE)


@pytest.mark.parametrize("hashes", [[11, 12, 13], [b"a" * 32, b"b" * 32, b"c" * 32], [-1, -2, -3]])
def test_opaque_hashes_become_the_keys_that_a_router_computes(keys: ForeignKeys, hashes: list[BlockHash]) -> None:
    (run,) = keys.stored(stored(hashes[:2]))
    assert (run.keys, run.parent) == (los()[:2], None)
    (run,) = keys.stored(stored(hashes[2:], 2, hashes[1]))
    assert (run.keys, run.parent) == (los()[2:3], los()[1])
    assert keys.removed(BlockRemoved(hashes)) == los()[:3]
    assert keys.stats().num_held == 0


def test_a_block_removed_in_the_middle_and_stored_again_counts_with_those_behind_it() -> None:
    """Dynamo 1.6.1's tree scores 2 here, although the third block was never removed."""
    worker = Worker(PrefixIndex(), "w")
    worker.store(stored([100, 101, 102]))
    worker.remove(101)
    assert worker.score == 1
    worker.store(stored([101], 1, 100))
    assert worker.score == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_workers_with_different_hashes_for_the_same_tokens_do_not_disturb_each_other(
    order: tuple[int, int],
) -> None:
    """In Dynamo 1.6.1 whoever stored first owns the hashes: the other one's later events are dropped."""
    index = PrefixIndex()
    workers = [Worker(index, "a"), Worker(index, "b")]
    names: list[list[BlockHash]] = [[1, 2, 3, 4], [b"one", b"two", b"three", b"four"]]
    for number in order:
        workers[number].store(stored(names[number][:2]))
    for number in order:
        workers[number].store(stored(names[number][2:], 2, names[number][1]))  # after its own parent
    assert [worker.score for worker in workers] == [4, 4]
    workers[0].remove(4, 3)
    assert [worker.score for worker in workers] == [2, 4]
    workers[1].remove(b"four")
    assert [worker.score for worker in workers] == [2, 3]


def test_two_workers_with_the_same_hash_for_different_tokens_do_not_disturb_each_other() -> None:
    index = PrefixIndex()
    one, other = Worker(index, "a"), Worker(index, "b")
    one.store(stored([7]))
    other.store(stored([7], 3))  # no prefix of TOKENS
    assert (one.score, other.score) == (1, 0)
    other.remove(7)
    assert one.score == 1


def test_salt_and_adapter_are_in_the_root(keys: ForeignKeys) -> None:
    (run,) = keys.stored(stored([1, 2], extra_keys=[["tenant"], None]))
    assert run.keys == los(salt="tenant")[:2]
    (run,) = keys.stored(stored([3], 2, 2))
    assert run.keys == los(salt="tenant")[2:3]
    (run,) = keys.stored(stored([4, 5], lora_name="x", extra_keys=[["x", "tenant"], ["x"]]))
    assert run.keys == los(salt="tenant", lora="x")[:2]
    (run,) = keys.stored(stored([6], lora_name="x", extra_keys=[["x"]]))
    assert run.keys == los(lora="x")[:1]


def test_an_adapter_known_by_number_alone_is_not_taken_for_the_model_itself(keys: ForeignKeys) -> None:
    (run,) = keys.stored(stored([1], lora_id=3))
    assert run.keys != los()[:1]


def test_blocks_with_images_have_keys_that_text_alone_does_not_have(keys: ForeignKeys) -> None:
    (run,) = keys.stored(stored([1, 2, 3], extra_keys=[None, [["image", 2]], None]))
    assert run.keys[0] == los()[0]
    assert not set(run.keys[1:]) & set(los())
    (other,) = keys.stored(stored([4, 5], extra_keys=[None, [["another", 2]]]))
    assert other.keys[0] == run.keys[0]
    assert other.keys[1] != run.keys[1]


def test_an_unknown_parent_is_counted_and_told_once(keys: ForeignKeys, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert keys.stored(stored([2, 3], 1, 1)) == []
    assert keys.stats().unknown_parents == 6
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "worker" in caplog.text


def test_the_parent_may_have_been_removed_before(keys: ForeignKeys) -> None:
    keys.stored(stored([1]))
    keys.removed(BlockRemoved([1]))
    (run,) = keys.stored(stored([2], 1, 1))
    assert (run.keys, run.parent) == (los()[1:2], los()[0])


def test_another_block_size_than_the_workers_is_refused_loudly(
    keys: ForeignKeys, caplog: pytest.LogCaptureFixture
) -> None:
    assert keys.stored(stored([1], size=8)) == []
    assert keys.stored(BlockStored([1, 2], None, [1] * SIZE, SIZE)) == []
    assert keys.stats().unusable == 3
    assert "should have 4" in caplog.text


@pytest.mark.parametrize("token", [-1, 2**32])
def test_tokens_out_of_range_are_refused(keys: ForeignKeys, token: int) -> None:
    assert keys.stored(BlockStored([1], None, [token] * SIZE, SIZE)) == []
    assert keys.stats().unusable == 1


def test_a_placeholder_without_tokens_is_understood_by_its_hash(keys: ForeignKeys) -> None:
    keys.stored(stored([1, 2]))
    runs = keys.stored(BlockStored([2, 9], None, [], 0, medium="CPU"))
    assert [run.keys for run in runs] == [los()[1:2]]
    assert all(run.parent is not None for run in runs)  # nothing says that it starts a sequence
    assert keys.stats().unusable == 1
    assert keys.removed(BlockRemoved([2], medium="GPU")) == los()[1:2]
    assert keys.removed(BlockRemoved([2], medium="CPU")) == los()[1:2]


def test_the_same_hash_in_two_tiers_is_removed_from_each_alone(keys: ForeignKeys) -> None:
    keys.stored(stored([1], medium="GPU"))
    keys.stored(stored([1], medium="CPU"))
    assert keys.removed(BlockRemoved([1], medium="CPU")) == los()[:1]
    assert keys.removed(BlockRemoved([1], medium="CPU")) == []
    assert keys.stats().unknown_removals == 1
    assert keys.stats().num_held == 1


def test_only_one_group_is_followed(keys: ForeignKeys) -> None:
    assert keys.stored(stored([1], group_idx=0))
    assert keys.stored(stored([1], group_idx=1)) == []
    assert keys.removed(BlockRemoved([1], group_idx=1)) == []
    assert keys.stats().other_groups == 2
    assert keys.stats().num_held == 1


def test_memory_is_bounded_and_what_is_refused_is_never_claimed() -> None:
    keys = ForeignKeys("worker", FINGERPRINT, SIZE, max_hashes=3, max_retired=2)
    assert keys.stored(stored([1, 2, 3]))
    assert keys.stored(stored([4], 3, 3)) == []
    assert keys.stats().refused == 1
    keys.removed(BlockRemoved([1, 2, 3]))
    assert keys.stats().num_retired == 2
    assert keys.stored(stored([9], 1, 1)) == []  # the oldest name is forgotten
    assert keys.stored(stored([9], 3, 3))


def test_names_survive_a_loss_and_not_a_restart(keys: ForeignKeys) -> None:
    keys.stored(stored([1]))
    keys.cleared()
    assert keys.removed(BlockRemoved([1])) == []
    assert keys.stored(stored([2], 1, 1))
    keys.forget()
    assert keys.stored(stored([2], 1, 1)) == []
