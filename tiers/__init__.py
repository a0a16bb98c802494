"""Media that hold KV blocks in slots (device, host, disk) and the threads that move blocks between them.

Knows slots, bytes and opaque 16-byte block names; never tokens or requests.

What moves between device and disk passes through rows of the host arena. `Mover` runs loads: each has a deadline, an
outcome per block and an end after which nothing arrives, and none waits for the whole of another. It keeps no byte budget;
the staging rows bound what is under way. Copies downwards are queued by the store above.
"""

if __name__ != "dynamo.tiers":
    raise ImportError(f"this package is dynamo.tiers, imported as {__name__!r}; run python with -P or from elsewhere")
