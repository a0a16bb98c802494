"""Benchmarks and tuning runs. Each prints a table and writes JSON lines with machine, versions and commit."""

if __name__ != "dynamo.perf":
    raise ImportError(f"this package is dynamo.perf, imported as {__name__!r}; run python with -P or from elsewhere")
