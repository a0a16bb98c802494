"""The embedded inference engine: models, scheduler, sampler, tokenizer, and a mocker with simulated timings."""
