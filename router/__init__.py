"""Chooses the worker from which a request's first token is expected soonest. Loads no torch.

    worker A ─ events of its tiers ─► Subscriber ─► Feed ─► its slot of PrefixIndex ─┐ who holds which prefix, and where
    worker B ─ events ──────────────► …                                              │
    vLLM     ─ events, own hashes ──► … ─► ForeignKeys ──────────────────────────────┤
                                                                                     ▼
    request ─► WaitingRoom ─► Router.route: PrefixChain ─► reach ─► CostModel ─► Choice ─► Decision and Booking
               (all are busy)   ▲                                                              │
    workers ─ LoadReport, once a second; load of other fronts' requests ─► WorkerLoad ◄────────┘ freed with the request

A key is the first half of a block key of `dynamo.kvcache.hashing`, so what a worker says of its blocks and what is asked of a
prompt need no translation; only engines of other makes have hashes of their own. Everything but the waiting room, the
subscriber and their tasks is synchronous, belongs to one thread, and knows nothing of HTTP or processes: those are
`dynamo.serve`'s.
"""

if __name__ != "dynamo.router":
    raise ImportError(f"this package is dynamo.router, imported as {__name__!r}; run python with -P or from elsewhere")
