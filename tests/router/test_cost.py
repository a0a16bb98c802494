"""Costs: the loop over all workers and the parts of one candidate say the same, and more of anything costs more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.config import RouterConfig
from dynamo.router.cost import CostModel
from dynamo.router.load import Entry, PriorSpeeds, WorkerLoad
from dynamo.router.reach import Reach
from dynamo.router.roster import Member, Roster
from dynamo.router.workers import LoadReport, WorkerCard

PRIORS = PriorSpeeds(prefill_tokens_per_s=1000.0, load_blocks_per_s={})


def member_of(config: RouterConfig, number: int, tokens: list[int], held: int, speeds: dict[str, float]) -> Member:
    card = WorkerCard(
        worker_id=str(number), epoch=1, model="m", fingerprint="00", hash_version=HASH_VERSION, block_size=16
    )
    load = WorkerLoad(card, PRIORS)
    for key, count in enumerate(tokens):
        load.add((key, "r"), Entry(prefill_tokens=count, own_blocks=held, added_s=float(key)))
    load.report(LoadReport(num_running=0, num_waiting=0, prefill_tokens_waiting=0, load_blocks_per_s=speeds), 0.0)
    load.assume(PRIORS)
    load.refresh(0.0)
    member = Member(number, load, 0)
    Roster(config, 0.0).refresh(member, 0.0, CostModel(config).base_s(load))
    return member


REACHES = st.lists(st.integers(0, 40), min_size=4, max_size=4).map(sorted).map(lambda row: Reach(*row))
SPEEDS = st.dictionaries(st.sampled_from(["host", "disk", "remote"]), st.floats(1.0, 1e6))


@settings(deadline=None, max_examples=50)
@given(
    workers=st.lists(
        st.tuples(st.lists(st.integers(0, 5000), max_size=4), st.integers(0, 100), SPEEDS, st.none() | REACHES),
        min_size=1,
        max_size=5,
    ),
    more_tokens=st.integers(1, 100),
    now_s=st.floats(0, 100),
    weights=st.tuples(st.floats(0, 2), st.floats(0, 1), st.floats(0, 2), st.floats(0, 1)),
)
def test_the_loop_and_the_parts_agree(workers, more_tokens, now_s, weights):
    queue, prefix, decode, balance = weights
    config = RouterConfig(queue_weight=queue, prefix_weight=prefix, decode_weight=decode)
    model = CostModel(config)
    num_tokens = more_tokens + 16 * max(reach.remote if reach else 0 for _, _, _, reach in workers)
    members = [member_of(config, n, tokens, held, speeds) for n, (tokens, held, speeds, _) in enumerate(workers)]
    reaches = {n: reach for n, (_, _, _, reach) in enumerate(workers) if reach is not None}
    price = (1.0 - balance, balance, 1.0 + 2 * balance)
    for number, member in enumerate(members):
        member.recent = number / 2
    costs = model.costs(members, reaches, num_tokens, price, now_s)
    for member, cost_s in zip(members, costs, strict=True):
        one = model.candidate(member, reaches.get(member.slot), num_tokens, price, now_s)
        assert cost_s == pytest.approx(one.cost_s, abs=1e-9)
        assert min(one.queue_s, one.load_s, one.compute_s, one.decode_s) >= 0
        assert 0 <= one.cached_tokens < num_tokens
        # A prefix never costs more than to compute it, wherever it lies.
        without = model.candidate(member, None, num_tokens, price, now_s)
        assert one.cost_s <= without.cost_s + 1e-9
        assert one.load_s + one.compute_s <= without.compute_s + 1e-9


def test_the_parts_are_what_they_are_said_to_be():
    config = RouterConfig(queue_weight=1.0, decode_weight=1.0)
    member = member_of(config, 0, [500, 300], 10, {"host": 200.0, "disk": 100.0})
    one = CostModel(config).candidate(member, Reach(2, 6, 7, 7), 160, (1.0, 0.0, 1.0), 0.25)
    assert one.queue_s == pytest.approx(0.8 - 0.25)  # at 1000 tokens a second, of which the oldest is under way since 0
    assert one.load_s == pytest.approx(4 / 200 + 1 / 100)
    assert (one.cached_tokens, one.compute_s) == (112, pytest.approx(0.048))
    assert one.decode_s == pytest.approx(20 * 16 / 1000)
    assert one.cost_s == pytest.approx(one.queue_s + one.load_s + one.compute_s + one.decode_s)
    assert one.balance_s == 0
