"""Moving and reshaping bytes: row copies between arenas and block digests. Knows nothing of tokens, hashes or tiers."""

if __name__ != "dynamo.kernels":
    raise ImportError(f"this package is dynamo.kernels, imported as {__name__!r}; run python with -P or from elsewhere")
