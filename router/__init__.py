"""Chooses the worker that already holds a request's prefix. Loads no torch."""

if __name__ != "dynamo.router":
    raise ImportError(f"this package is dynamo.router, imported as {__name__!r}; run python with -P or from elsewhere")
