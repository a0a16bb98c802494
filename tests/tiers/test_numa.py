"""Which memory node an arena prefers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo.tiers.arena import map_rows, prefault
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.numa import choose_node, pci_address, prefer_node

GPU = "0000:17:00.0"


def lay_out(sys: Path, cpus: dict[int, str], gpu_node: int | None = None) -> Path:
    """A sysfs with memory nodes, their CPUs, and a GPU."""
    nodes = sys / "devices/system/node"
    nodes.mkdir(parents=True)
    (nodes / "has_memory").write_text(",".join(map(str, cpus)) + "\n")
    for node, text in cpus.items():
        (nodes / f"node{node}").mkdir()
        (nodes / f"node{node}" / "cpulist").write_text(f"{text}\n")
    if gpu_node is not None:
        gpu = sys / "bus/pci/devices" / GPU
        gpu.mkdir(parents=True)
        (gpu / "numa_node").write_text(f"{gpu_node}\n")
    return sys


@pytest.mark.parametrize(
    ("cpus", "gpu_node", "gpu", "own", "node", "reason"),
    [
        pytest.param({0: "0-3"}, 0, GPU, {0}, None, "one memory node", id="one-node"),
        pytest.param({0: "0-3", 1: "4-7"}, 1, GPU, {0}, 1, "attached to node 1", id="the-gpu-goes-first"),
        pytest.param({0: "0-3", 1: "4-7"}, 1, GPU.upper(), {0}, 1, "attached", id="capital-address"),
        pytest.param({0: "0-3", 1: "4-7"}, -1, GPU, {4, 5}, 1, "CPUs of node 1", id="firmware-does-not-say"),
        pytest.param({0: "0-3", 1: "4-7"}, None, GPU, {4, 5}, 1, "CPUs of node 1", id="unknown-gpu"),
        pytest.param({0: "0-1,4-5", 1: "2-3,6-7"}, 1, None, {0, 4}, 0, "CPUs of node 0", id="no-gpu"),
        pytest.param({0: "0-3", 1: "4-7"}, None, None, {3, 4}, None, "CPUs of 2 nodes", id="both-nodes"),
        pytest.param({0: "0-3", 1: "", 2: "4-7"}, None, None, {5}, 2, "node 2", id="a-node-without-cpus"),
    ],
)
def test_the_gpus_node_goes_before_the_cpus(
    tmp_path: Path, cpus: dict[int, str], gpu_node: int | None, gpu: str | None, own: set[int], node: int, reason: str
) -> None:
    choice = choose_node(gpu, own, lay_out(tmp_path, cpus, gpu_node))
    assert choice.node == node
    assert reason in choice.reason


def test_no_sysfs_means_any_node(tmp_path: Path) -> None:
    assert choose_node(GPU, {0}, tmp_path).node is None


def test_the_kernel_takes_a_node_that_is_there_and_refuses_one_that_is_not(layout: BlockLayout) -> None:
    rows = map_rows(layout, 4)
    refusal = prefer_node(rows, 0)
    if refusal is not None and "Operation not permitted" in refusal:
        pytest.skip("this container may not set memory policies")
    assert refusal is None
    prefault(rows)
    rows[:] = np.uint8(5)
    assert prefer_node(rows, 1000) == "Invalid argument"


def test_a_cpu_has_no_pci_address() -> None:
    assert pci_address(torch.device("cpu")) is None
