"""How blocks get between the disk tier and device memory: two hops through host memory, and why not one.

One hop, GPUDirect Storage, is proven when a cache with a GPU is opened, and `DiskTier.read_device` and `write_device` move
blocks that way. The cache does not use them yet, since it promises never to give out a wrong byte: the digest that the index
keeps of each block is XXH3-64 of the slot's bytes, which only a CPU computes. What one hop needs:

    - a kind of digest in each record of the index, and one that GPUs compute as well: `dynamo.kernels.digest_blocks` gives
      the same value on both, but by logical rows, so blocks that are there already keep the digest they have
    - slots of device memory to read into that no sequence sees before their digest is compared; what comes from disk then
      is promoted to the host tier, where there is one, by a copy from there
"""

import logging

import torch

from dynamo.tiers.disk import DiskTier
from dynamo.tiers.transfer import Capabilities

__all__ = ["CAPABILITIES", "prove_device_path"]

logger = logging.getLogger(__name__)

CAPABILITIES = Capabilities()
"""What the cache makes use of, whatever was proven."""

_UNUSED = "GPUDirect Storage works here, but digests of blocks are made and compared in host memory, so blocks have to go there"


def prove_device_path(disk: DiskTier, device: torch.device) -> str:
    """Finds out which path blocks of `disk` take to and from `device`, and says it and the reason in the log.

    With a GPU this writes and reads a file of a mebibyte in each of the tier's directories.
    """
    if device.type == "cuda":
        proofs = disk.prove_gds(device)
        reason = next((proof.reason for proof in proofs if not proof.ok), _UNUSED)
    else:
        reason = "no CUDA device"
    path = f"two hops through host memory: {reason}"
    logger.info("disk tier %s to %s: %s", disk.folder, device, path)
    return path
