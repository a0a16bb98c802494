"""Counting what a tier does."""

from concurrent.futures import ThreadPoolExecutor

from dynamo.tiers.stats import MovedBlocks, TierRecorder


def test_counts_add_up_and_empty_calls_do_not_count() -> None:
    recorder = TierRecorder(block_bytes=100)
    recorder.add_read(3, 1, 0.5)
    recorder.add_read(0, 0, 9.0)
    recorder.add_write(2, 0, 0.25)
    stats = recorder.snapshot("host", 8, "pinned")
    assert stats.read == MovedBlocks(blocks=3, bytes=300, failed_blocks=1, calls=1, seconds=0.5)
    assert stats.write == MovedBlocks(blocks=2, bytes=200, failed_blocks=0, calls=1, seconds=0.25)
    assert (stats.name, stats.num_slots, stats.path) == ("host", 8, "pinned")


def test_only_the_first_fault_of_a_kind_is_news() -> None:
    recorder = TierRecorder(block_bytes=1)
    assert not recorder.add_fault("io_error", 0)
    assert recorder.add_fault("io_error", 2)
    assert not recorder.add_fault("io_error")
    assert recorder.add_fault("disk_full")
    assert recorder.snapshot("disk", 1, "buffered").faults == {"io_error": 3, "disk_full": 1}


def test_snapshots_do_not_change_afterwards() -> None:
    recorder = TierRecorder(block_bytes=1)
    recorder.add_fault("io_error")
    before = recorder.snapshot("disk", 1, "buffered")
    recorder.add_fault("io_error")
    recorder.add_read(1, 0, 1.0)
    assert before.faults == {"io_error": 1}
    assert before.read.blocks == 0


def test_threads_lose_no_count() -> None:
    recorder = TierRecorder(block_bytes=1)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(800):
            pool.submit(recorder.add_read, 1, 0, 0.0)
            pool.submit(recorder.add_fault, "io_error")
    stats = recorder.snapshot("disk", 1, "buffered")
    assert stats.read.blocks == 800
    assert stats.faults == {"io_error": 800}
