"""An OpenAI-compatible server over `dynamo.kvcache`: HTTP front, engine, configuration, metrics, life cycle.

One process:

    client ─HTTP─► Frontend ─► Engine ─► KVCache

Many, with `--workers`, or the parts alone:

    client ─HTTP─► Frontend ─► RoutedEngine ─► WorkerLink: a WorkerSession ════► WorkerApp ─► Engine ─► KVCache
                                │    ▲    └──► WorkerLink: an ExternalWorker ─► an OpenAI server of another make
                                ▼    │
                           router.Router ◄── Fleet ◄── Discovery ◄── registrations of workers that come and go
                                                └─◄── events and load of each worker, over ZMQ

`RoutedEngine` is an `Engine` as well, so the front is the same in both. It keeps each request's whole state (`LiveRequest`),
and carries it on at another worker when its own is lost (`migration`). `fleet`, `members` and `stay` keep the router's picture
of each worker; `plane` is what a front and a worker say to each other; `supervisor` keeps the workers of `--workers` running;
`roles` says which setting belongs to which part. A front loads no torch.
"""

if __name__ != "dynamo.serve":
    raise ImportError(f"this package is dynamo.serve, imported as {__name__!r}; run python with -P or from elsewhere")
