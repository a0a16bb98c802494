"""Media that hold KV blocks in slots (device, host, disk) and the threads that move blocks between them.

Knows slots, bytes and opaque 16-byte block names; never tokens or requests.
"""

if __name__ != "dynamo.tiers":
    raise ImportError(f"this package is dynamo.tiers, imported as {__name__!r}; run python with -P or from elsewhere")
