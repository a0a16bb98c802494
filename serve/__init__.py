"""An OpenAI-compatible server over `dynamo.kvcache`: HTTP front, engine, configuration, metrics, life cycle."""

if __name__ != "dynamo.serve":
    raise ImportError(f"this package is dynamo.serve, imported as {__name__!r}; run python with -P or from elsewhere")
