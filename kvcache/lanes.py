"""The mover of a cache: its lanes, and what may be in flight.

    lane      link    what its threads do
    host      memory  host rows to the device, for somebody who wants blocks
    offload   memory  device to host rows
    disk      disk    disk to rows in host or device memory, and from there to the device
    write     disk    such rows to disk

Offload and writing are one thread each, which keeps the order in which blocks were offered: parents before children.
"""

from dynamo.tiers.mover import Lane, Mover

__all__ = ["start_mover"]

_LANES = {
    "host": Lane("memory", 2),
    "offload": Lane("memory", 1),
    "disk": Lane("disk", 4),
    "write": Lane("disk", 1),
}
_MAX_LINK_BYTES = 64 << 20


def start_mover() -> Mover:
    """A mover with this package's lanes; `close` it."""
    return Mover(_LANES, _MAX_LINK_BYTES)
