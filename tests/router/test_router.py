"""The router: who gets a request, what is booked for it, and that everything booked is released."""

from collections import Counter

import pytest

from dynamo.router.config import RouterConfig
from dynamo.router.errors import (
    AllBusyError,
    IncompatibleWorkerError,
    NoWorkersError,
    PinnedWorkerBusyError,
    PinnedWorkerError,
    RouterConfigError,
    UnknownWorkerError,
)
from dynamo.router.workers import LoadEvent, LoadReport

PROMPT = range(160)


def report(**facts) -> LoadReport:
    return LoadReport(**({"num_running": 0, "num_waiting": 0, "prefill_tokens_waiting": 0} | facts))


# --- where the prefix lies


def test_the_worker_that_holds_the_prefix_gets_the_request(make_fleet):
    fleet = make_fleet(8)
    fleet.hold("w5", PROMPT)
    decision, _ = fleet.route([*PROMPT, 7, 8, 9])
    assert (decision.worker_id, decision.reason, decision.cached_tokens) == ("w5", "cost", 160)
    assert decision.best_cached_tokens == 160


def test_of_two_prefixes_the_longer_one_wins(make_fleet):
    fleet = make_fleet(4)
    fleet.hold("w1", range(64))
    fleet.hold("w2", range(128))
    assert fleet.route(PROMPT)[0].worker_id == "w2"


def test_the_last_token_and_its_block_are_computed_even_if_all_are_held(make_fleet):
    fleet = make_fleet(2)
    fleet.hold("w0", PROMPT)
    decision, _ = fleet.route(PROMPT)
    assert decision.cached_tokens == 144
    assert fleet.load("w0").prefill_tokens == 16


def test_a_prefix_of_another_salt_or_adapter_is_none(make_fleet):
    fleet = make_fleet(4)
    fleet.hold("w3", PROMPT, salt="tenant")
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 0
    assert fleet.router.explain(fleet.query(PROMPT, lora="tenant")).best_cached_tokens == 0
    assert fleet.route(PROMPT, salt="tenant")[0].worker_id == "w3"


def test_a_faster_tier_wins_over_a_slower_one(make_fleet):
    fleet = make_fleet(3)
    fleet.hold("w0", PROMPT, "disk")
    fleet.hold("w1", PROMPT, "host")
    decision, _ = fleet.route(PROMPT)
    assert decision.worker_id == "w1"
    assert (decision.reach.device, decision.reach.host) == (0, 10)
    assert decision.chosen.load_s > 0


def test_measured_speeds_of_tiers_decide(make_fleet):
    fleet = make_fleet(3)
    fleet.hold("w0", PROMPT, "disk")
    fleet.hold("w1", PROMPT, "host")
    fleet.router.report("w0", report(load_blocks_per_s={"disk": 1e6}))
    fleet.router.report("w1", report(load_blocks_per_s={"host": 1e3}))
    assert fleet.route(PROMPT)[0].worker_id == "w0"


def test_what_loads_slower_than_it_computes_is_not_counted(make_fleet):
    fleet = make_fleet(1)
    fleet.hold("w0", PROMPT, "remote")
    fleet.router.report("w0", report(prefill_tokens_per_s=1e5, load_blocks_per_s={"remote": 10.0}))
    decision, _ = fleet.route(PROMPT)
    assert (decision.cached_tokens, decision.chosen.load_s) == (0, 0.0)
    assert decision.reach.remote == 10


def test_prefix_weight_zero_ignores_prefixes(make_fleet):
    fleet = make_fleet(4, prefix_weight=0.0, prediction_ttl_s=0.0)
    fleet.hold("w0", PROMPT)
    chosen = set()
    for _ in range(40):
        decision, booking = fleet.route(PROMPT)
        booking.free()
        chosen.add(decision.worker_id)
    assert len(chosen) == 4


def test_workers_of_other_fingerprints_and_block_sizes_are_asked_with_their_own_keys(make_fleet):
    fleet = make_fleet(1)
    fleet.join("other", fingerprint="ff")
    fleet.join("coarse", block_size=64)
    first, booking = fleet.route(PROMPT, pin="coarse")
    booking.free()
    again, booking = fleet.route(PROMPT)
    booking.free()
    assert (first.cached_tokens, again.worker_id, again.cached_tokens) == (0, "coarse", 128)


# --- before the first event


def test_siblings_that_arrive_together_land_together(make_fleet):
    fleet = make_fleet(8)
    first, _ = fleet.route(range(1600))
    workers = {fleet.route([*range(1600), sibling])[0].worker_id for sibling in range(3)}
    assert workers == {first.worker_id}


def test_a_burst_of_siblings_overflows_to_others(make_fleet):
    fleet = make_fleet(4)
    counts = Counter(fleet.route([*range(64), *range(n * 1000, n * 1000 + 600)])[0].worker_id for n in range(80))
    assert len(counts) == 4
    assert max(counts.values()) <= 1.2 * 20


def test_predictions_expire(make_fleet):
    fleet = make_fleet(2, prediction_ttl_s=5.0)
    fleet.route(PROMPT)
    fleet.clock.now_s += 4.9
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 144
    fleet.clock.now_s += 0.2
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 0


def test_no_prediction_without_a_time_to_live(make_fleet):
    fleet = make_fleet(2, prediction_ttl_s=0.0)
    fleet.route(PROMPT)
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 0


def test_a_worker_without_events_is_believed_to_hold_what_it_was_sent_for_longer(make_fleet):
    fleet = make_fleet(1, prediction_ttl_s=5.0, approximate_ttl_s=100.0)
    fleet.join("mute", has_events=False)
    fleet.route(PROMPT, pin="mute")[1].free()
    fleet.clock.now_s += 99
    assert fleet.route(PROMPT)[0].worker_id == "mute"
    fleet.clock.now_s += 99
    decision = fleet.router.explain(fleet.query(PROMPT))  # the request before renewed it
    assert decision.worker_id == "mute"
    fleet.clock.now_s += 2
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 0


# --- load


def test_load_spreads_what_shares_nothing(make_fleet):
    fleet = make_fleet(4)
    counts = Counter(fleet.route(range(n * 1000, n * 1000 + 200))[0].worker_id for n in range(40))
    assert set(counts.values()) == {10}


def test_an_idle_fleet_shares_the_work_of_a_common_prefix(make_fleet):
    def chosen(**settings) -> Counter:
        fleet = make_fleet(4, **settings)
        counts = Counter()
        for n in range(100):
            decision, booking = fleet.route([*range(160), *range(1000 * n, 1000 * n + 400)])
            booking.first_token()
            booking.free()
            counts[decision.worker_id] += 1
        return counts

    assert max(chosen().values()) <= 1.2 * 25
    assert max(chosen(balance_weight=0.0).values()) == 100


def test_a_conversation_stays_although_its_worker_did_more_than_its_share(make_fleet):
    fleet = make_fleet(4)
    workers = set()
    for turn in range(1, 30):
        decision, booking = fleet.route(range(64 * turn))
        booking.first_token()
        booking.free()
        fleet.clock.now_s += 15
        fleet.hold(decision.worker_id, range(64 * turn))
        workers.add(decision.worker_id)
    assert len(workers) == 1


def test_what_was_done_long_ago_is_forgotten(make_fleet):
    fleet = make_fleet(2)
    for hour in range(50):
        fleet.route([hour] * 5000, pin="w0")[1].free()
        fleet.clock.now_s += 3600
        fleet.route([hour], pin="w1")[1].free()
        costs = fleet.router.explain(fleet.query([hour, hour] * 100)).candidates
        assert costs[0].worker_id == "w0"
        fleet.router.check_invariants()
    fleet.clock.now_s += 1e9
    assert fleet.router.explain(fleet.query([1])).worker_id in {"w0", "w1"}
    assert fleet.route([1])[0].worker_id in {"w0", "w1"}


def test_short_prompts_count_as_load_too(make_fleet):
    fleet = make_fleet(4)
    counts = Counter(fleet.route([n])[0].worker_id for n in range(40))
    assert set(counts.values()) == {10}


def test_ties_are_spread(make_fleet):
    fleet = make_fleet(8, balance_weight=0.0)
    counts = Counter()
    for n in range(400):
        decision, booking = fleet.route([n])
        booking.free()
        counts[decision.worker_id, decision.reason] += 1
    assert {reason for _, reason in counts} == {"tie"}
    assert len(counts) == 8
    assert max(counts.values()) < 100


def test_a_busy_worker_loses_its_advantage(make_fleet):
    fleet = make_fleet(2)
    fleet.hold("w0", range(320))
    for n in range(20):
        fleet.route([*range(100_000 * n, 100_000 * n + 2000)], pin="w0")
    assert fleet.route(range(320))[0].worker_id == "w1"


def test_prompts_shared_by_running_requests_count_once(make_fleet):
    fleet = make_fleet(1)
    fleet.route(range(1600))
    alone = fleet.load("w0").held_blocks
    bookings = [fleet.route([*range(1600), n])[1] for n in range(5)]
    # 100 blocks, of which marks of 16 blocks cover 96; each request holds the rest for itself
    assert alone == 100
    assert fleet.load("w0").held_blocks == 96 + 4 + 5 * 5
    for booking in bookings:
        booking.free()
    assert fleet.load("w0").held_blocks == 100


def test_the_first_token_ends_the_prefill_and_free_everything(make_fleet):
    fleet = make_fleet(1)
    _, booking = fleet.route(PROMPT)
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").held_blocks) == (160, 10)
    booking.first_token()
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").held_blocks) == (0, 10)
    booking.output_blocks(3)
    booking.output_blocks(2)
    assert fleet.load("w0").held_blocks == 13
    booking.free()
    booking.free()
    booking.first_token()
    booking.output_blocks(9)
    assert (fleet.load("w0").num_requests, fleet.load("w0").held_blocks) == (0, 0)
    assert fleet.router.stats().num_bookings == 0


def test_a_booking_is_freed_by_its_context_even_on_an_error(make_fleet):
    fleet = make_fleet(1)
    with pytest.raises(ZeroDivisionError), fleet.route(PROMPT)[1]:
        raise ZeroDivisionError
    assert fleet.router.stats().num_bookings == 0


def test_expected_output_counts_from_the_start(make_fleet):
    fleet = make_fleet(1)
    _, booking = fleet.route(PROMPT, expected_output_tokens=64)
    assert fleet.load("w0").held_blocks == 14
    booking.output_blocks(2)
    assert fleet.load("w0").held_blocks == 14
    booking.output_blocks(5)
    assert fleet.load("w0").held_blocks == 15


def test_prefill_is_assumed_to_progress(make_fleet):
    fleet = make_fleet(2)
    fleet.router.report("w0", report(prefill_tokens_per_s=1000.0))
    fleet.route(range(4000), pin="w0")
    assert fleet.load("w0").queue_s == pytest.approx(4.0)
    fleet.clock.now_s += 3
    assert fleet.load("w0").queue_s == pytest.approx(1.0)
    fleet.clock.now_s += 30
    assert fleet.load("w0").queue_s == 0


def test_a_booking_of_which_nothing_is_heard_is_released_loudly(make_fleet, caplog):
    fleet = make_fleet(1, booking_expiry_s=60.0)
    _, forgotten = fleet.route(PROMPT, request_id="lost")
    fleet.clock.now_s += 50
    _, kept = fleet.route(PROMPT)
    fleet.clock.now_s += 20
    fleet.router.tick()
    assert fleet.router.stats().num_bookings == 1
    assert fleet.router.stats().num_expired == 1
    assert "lost" in caplog.text
    forgotten.free()
    kept.free()
    fleet.router.check_invariants()
    assert fleet.load("w0").held_blocks == 0


def test_load_that_only_the_worker_knows_of_counts_and_fades(make_fleet):
    fleet = make_fleet(2)
    fleet.router.report("w0", report(num_running=2, num_waiting=2, prefill_tokens_waiting=20_000))
    assert fleet.load("w0").num_requests == 4
    assert {fleet.route([n])[0].worker_id for n in range(10)} == {"w1"}
    fleet.clock.now_s += 60
    fleet.router.tick()
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").num_requests) == (0, 0)
    assert fleet.load("w0").report_age_s == 60


def test_what_is_booked_is_not_counted_a_second_time_from_the_report(make_fleet):
    fleet = make_fleet(1)
    fleet.hold("w0", range(144))
    fleet.route(PROMPT)
    fleet.router.report("w0", report(num_waiting=1, prefill_tokens_waiting=160, used_blocks={"device": 10}))
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").held_blocks) == (16, 10)


def test_a_worker_that_measured_nothing_is_taken_to_be_like_its_peers(make_fleet):
    fleet = make_fleet(2)
    fleet.router.report("w0", report(prefill_tokens_per_s=200.0))
    fleet.join("new")
    fleet.clock.now_s += 1
    costs = fleet.router.explain(fleet.query(PROMPT))
    fleet.router.tick()
    costs = {one.worker_id: one.compute_s for one in fleet.router.explain(fleet.query(PROMPT)).candidates}
    assert costs == {"w0": pytest.approx(0.8), "w1": pytest.approx(0.8), "new": pytest.approx(0.8)}


def test_a_full_batch_counts_as_a_wait_once_service_is_known(make_fleet):
    fleet = make_fleet(0)
    fleet.join("small", max_running=2)
    _, booking = fleet.route(PROMPT)
    booking.first_token()
    fleet.clock.now_s += 10
    booking.free()
    bookings = [fleet.route([n])[1] for n in range(3)]
    for booking in bookings:
        booking.first_token()
    assert fleet.load("small").queue_s == pytest.approx(10.0)


# --- other fronts


def test_requests_of_other_fronts_count_until_they_end(make_fleet):
    fleet = make_fleet(2, front_id="me")
    load = fleet.router.foreign_load
    load("w0", LoadEvent(kind="added", front_id="other", request_id="1", prefill_tokens=9000, num_blocks=50))
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").held_blocks) == (9000, 50)
    assert fleet.route(PROMPT)[0].worker_id == "w1"
    load("w0", LoadEvent(kind="first-token", front_id="other", request_id="1"))
    assert (fleet.load("w0").prefill_tokens, fleet.load("w0").held_blocks) == (0, 50)
    load("w0", LoadEvent(kind="freed", front_id="other", request_id="1"))
    load("w0", LoadEvent(kind="freed", front_id="other", request_id="1"))
    assert (fleet.load("w0").num_foreign, fleet.load("w0").held_blocks) == (0, 0)
    fleet.router.check_invariants()


def test_own_requests_and_unknown_workers_are_ignored_in_load_events(make_fleet):
    fleet = make_fleet(1, front_id="me")
    for worker_id, front_id in (("w0", "me"), ("gone", "other")):
        event = LoadEvent(kind="added", front_id=front_id, request_id="1", prefill_tokens=9000, num_blocks=50)
        fleet.router.foreign_load(worker_id, event)
    assert fleet.load("w0").num_requests == 0


def test_a_front_that_is_gone_leaves_no_load(make_fleet):
    fleet = make_fleet(1)
    for front in ("a", "b"):
        for number in range(5):
            event = LoadEvent(kind="added", front_id=front, request_id=str(number), prefill_tokens=10, num_blocks=1)
            fleet.router.foreign_load("w0", event)
    fleet.router.foreign_load("w0", LoadEvent(kind="front-gone", front_id="a"))
    assert (fleet.load("w0").num_foreign, fleet.load("w0").prefill_tokens) == (5, 50)
    fleet.router.check_invariants()


def test_foreign_requests_whose_end_was_lost_go_when_the_worker_says_it_is_idle(make_fleet):
    fleet = make_fleet(1)
    event = LoadEvent(kind="added", front_id="a", request_id="1", prefill_tokens=10, num_blocks=1)
    fleet.router.foreign_load("w0", event)
    fleet.router.report("w0", report())
    assert fleet.load("w0").num_foreign == 1  # the report may be older than the request
    fleet.clock.now_s += 5
    fleet.router.report("w0", report())
    assert fleet.load("w0").num_foreign == 0


# --- wishes


def test_pins_exclusions_and_allowed_workers_are_obeyed(make_fleet):
    fleet = make_fleet(4)
    fleet.hold("w0", PROMPT)
    assert fleet.route(PROMPT, pin="w2")[0].worker_id == "w2"
    assert fleet.route(PROMPT, pin="w2")[0].reason == "pin"
    for _ in range(20):
        assert fleet.route(PROMPT, exclude=frozenset({"w0", "w1"}))[0].worker_id in {"w2", "w3"}
        assert fleet.route(PROMPT, allowed=frozenset({"w1", "w3"}))[0].worker_id in {"w1", "w3"}


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"pin": "w9"}, "there is no such worker"),
        ({"pin": "w1", "exclude": frozenset({"w1"})}, "excluded"),
        ({"pin": "w1", "allowed": frozenset({"w0"})}, "not among those"),
        ({"pin": "w3"}, "draining"),
    ],
)
def test_a_pin_that_cannot_be_kept_says_why(make_fleet, wishes, says):
    fleet = make_fleet(4)
    fleet.router.drain("w3")
    with pytest.raises(PinnedWorkerError, match=says) as caught:
        fleet.route(PROMPT, **wishes)
    assert caught.value.worker_id == wishes["pin"]
    assert fleet.router.stats().failures == {"PinnedWorkerError": 1}


def test_no_worker_left_says_why(make_fleet):
    with pytest.raises(NoWorkersError, match="no worker is there"):
        make_fleet(0).route(PROMPT)
    fleet = make_fleet(2)
    fleet.router.drain("w0")
    with pytest.raises(NoWorkersError, match=r"w0 \(draining\), w1 \(excluded by the request\)"):
        fleet.route(PROMPT, exclude=frozenset({"w1"}))


def test_a_worker_whose_context_is_too_short_is_left_out(make_fleet):
    fleet = make_fleet(0)
    fleet.join("short", max_model_len=160)
    with pytest.raises(NoWorkersError, match="longest context is 160"):
        fleet.route(PROMPT)
    fleet.join("long", max_model_len=1000)
    assert {fleet.route(PROMPT)[0].worker_id for _ in range(10)} == {"long"}


# --- membership


def test_a_drained_worker_gets_nothing_until_it_joins_again(make_fleet):
    fleet = make_fleet(2)
    fleet.router.drain("w0")
    assert {fleet.route([n])[0].worker_id for n in range(10)} == {"w1"}
    fleet.join("w0")
    assert "w0" in {fleet.route([n])[0].worker_id for n in range(10)}
    with pytest.raises(UnknownWorkerError, match="'w7'"):
        fleet.router.drain("w7")


def test_a_worker_that_failed_is_set_aside_for_a_time(make_fleet):
    fleet = make_fleet(2, set_aside_s=5.0)
    fleet.hold("w0", PROMPT)
    fleet.router.set_aside("w0")
    assert fleet.route(PROMPT)[0].worker_id == "w1"
    assert fleet.load("w0").is_set_aside
    fleet.clock.now_s += 5.1
    fleet.hold("w0", range(160, 320))
    assert fleet.route(range(160, 320))[0].worker_id == "w0"
    assert fleet.router.stats().num_set_aside == 1


def test_workers_set_aside_are_better_than_none(make_fleet):
    fleet = make_fleet(2)
    fleet.router.set_aside("w0")
    fleet.router.set_aside("w1")
    fleet.router.set_aside("gone")
    assert fleet.route(PROMPT)[0].worker_id in {"w0", "w1"}
    assert fleet.route(PROMPT, exclude=frozenset({"w1"}))[0].worker_id == "w0"


def test_leaving_takes_blocks_and_load_and_late_frees_do_no_harm(make_fleet):
    fleet = make_fleet(2)
    fleet.hold("w0", PROMPT)
    _, booking = fleet.route(PROMPT)
    assert fleet.router.leave("w0")
    assert not fleet.router.leave("w0")
    assert fleet.route(PROMPT)[0].worker_id == "w1"
    booking.first_token()
    booking.output_blocks(4)
    booking.free()
    fleet.router.check_invariants()
    assert fleet.router.stats().num_bookings == 1


def test_a_new_epoch_starts_empty(make_fleet):
    fleet = make_fleet(2)
    fleet.hold("w0", PROMPT)
    _, old = fleet.route(PROMPT)
    fleet.join("w0", epoch=2)
    old.free()
    assert fleet.load("w0").num_requests == 0
    assert fleet.router.explain(fleet.query(PROMPT)).best_cached_tokens == 0


def test_the_same_card_again_keeps_everything(make_fleet):
    fleet = make_fleet(2)
    fleet.hold("w0", PROMPT)
    slot = fleet.join("w0")
    assert slot == fleet.slots["w0"]
    assert fleet.route(PROMPT)[0].worker_id == "w0"


@pytest.mark.parametrize(
    ("facts", "says"),
    [({"hash_version": 99}, "version 99"), ({"fingerprint": "xyz"}, "xyz"), ({"block_size": 0}, "blocks of 0")],
)
def test_a_card_that_cannot_be_routed_to_is_refused(make_fleet, facts, says):
    fleet = make_fleet(1)
    with pytest.raises(IncompatibleWorkerError, match=says):
        fleet.join("w0", **facts)
    assert fleet.router.worker_ids == ("w0",)


# --- modes


def test_round_robin_takes_turns(make_fleet):
    fleet = make_fleet(3, mode="round-robin")
    fleet.hold("w1", PROMPT)
    assert [fleet.route(PROMPT)[0].worker_id for _ in range(6)] == ["w0", "w1", "w2"] * 2
    fleet.join("w3")
    assert Counter(fleet.route(PROMPT)[0].worker_id for _ in range(8)) == {"w0": 2, "w1": 2, "w2": 2, "w3": 2}


def test_random_uses_all(make_fleet):
    fleet = make_fleet(3, mode="random")
    counts = Counter(fleet.route(PROMPT)[0].worker_id for _ in range(300))
    assert min(counts.values()) > 60


def test_least_loaded_ignores_prefixes(make_fleet):
    fleet = make_fleet(2, mode="least-loaded")
    fleet.hold("w0", PROMPT)
    fleet.route(PROMPT, pin="w0")
    decision, _ = fleet.route(PROMPT)
    assert (decision.worker_id, decision.cached_tokens) == ("w1", 0)


def test_direct_needs_a_pin(make_fleet):
    fleet = make_fleet(2, mode="direct")
    with pytest.raises(PinnedWorkerError, match="direct mode"):
        fleet.route(PROMPT)
    assert fleet.route(PROMPT, pin="w1")[0].worker_id == "w1"


def test_temperature_draws_more_of_the_cheaper(make_fleet):
    fleet = make_fleet(3, temperature=0.5, prediction_ttl_s=0.0)
    fleet.hold("w0", PROMPT)
    counts = Counter()
    for _ in range(400):
        decision, booking = fleet.route(PROMPT)
        booking.free()
        counts[decision.worker_id] += 1
    assert decision.reason == "sampled"
    # w0 costs 1/160 of the others: weights are 1 and twice exp(-2)
    assert 270 <= counts["w0"] <= 350
    assert min(counts.values()) > 10


# --- busy thresholds


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"busy_requests": 2.0}, {"max_running": 1}),
        ({"busy_queue_s": 0.02}, {}),
        ({"busy_blocks": 0.5}, {"num_blocks": {"device": 30}}),
    ],
)
def test_above_a_threshold_nobody_is_chosen(make_fleet, settings, facts):
    fleet = make_fleet(0, **settings)
    fleet.join("a", **facts)
    fleet.join("b", **facts)
    bookings = [fleet.route(range(n * 1000, n * 1000 + 160))[1] for n in range(4)]
    with pytest.raises(AllBusyError, match="all 2 workers"):
        fleet.route(PROMPT)
    with pytest.raises(PinnedWorkerBusyError, match="'a'"):
        fleet.route(PROMPT, pin="a")
    assert not fleet.router.has_room(fleet.query(PROMPT))
    for booking in bookings:
        booking.free()
    fleet.route(PROMPT)


def test_a_worker_said_to_be_busy_by_a_report_that_grew_old_is_not(make_fleet):
    fleet = make_fleet(0, busy_requests=1.0)
    fleet.join("a", max_running=4)
    fleet.router.report("a", report(num_running=4))
    with pytest.raises(AllBusyError):
        fleet.route(PROMPT)
    fleet.clock.now_s += 30
    fleet.route(PROMPT)


def test_small_fleets_are_never_busy_by_default(make_fleet):
    fleet = make_fleet(0)
    fleet.join("a", max_running=64, num_blocks={"device": 100})
    for n in range(255):
        fleet.route([n] * 300)


# --- sessions


def test_a_session_stays_with_its_worker_and_is_forgotten_in_time(make_fleet):
    fleet = make_fleet(8, session_ttl_s=60.0, prediction_ttl_s=0.0)
    first, booking = fleet.route([1], session="s")
    booking.free()
    for n in range(20):
        fleet.clock.now_s += 50
        decision, booking = fleet.route([n], session="s")
        booking.free()
        assert (decision.worker_id, decision.reason) == (first.worker_id, "session")
    fleet.clock.now_s += 61
    assert fleet.router.explain(fleet.query([1], session="s")).reason == "tie"


def test_a_soft_session_moves_when_its_worker_is_far_busier(make_fleet):
    fleet = make_fleet(2, session_slack_s=1.0)
    first, _ = fleet.route([1], session="s")
    fleet.route(range(8_000), pin=first.worker_id)
    assert fleet.route([2], session="s")[0].worker_id == first.worker_id
    fleet.route(range(10_000, 30_000), pin=first.worker_id)
    moved, _ = fleet.route([3], session="s")
    assert moved.worker_id != first.worker_id
    assert fleet.route([4], session="s")[0].reason == "session"


def test_a_hard_session_stays_until_its_worker_takes_no_more(make_fleet):
    fleet = make_fleet(3, affinity="hard")
    first, _ = fleet.route([1], session="s")
    fleet.route(range(30_000), pin=first.worker_id)
    assert fleet.route([2], session="s")[0].worker_id == first.worker_id
    fleet.router.set_aside(first.worker_id)
    assert fleet.route([3], session="s")[0].worker_id != first.worker_id


def test_sessions_can_be_switched_off(make_fleet):
    fleet = make_fleet(8, affinity="off")
    assert fleet.route([1], session="s")[0].reason == "tie"
    assert fleet.router.stats().num_sessions == 0


# --- explanations and numbers


def test_explain_changes_nothing(make_fleet):
    def history(explains: bool) -> list[str]:
        fleet = make_fleet(5, seed=3)
        fleet.hold("w1", range(64))
        chosen = []
        for n in range(50):
            query = fleet.query([*range(n % 80), n], session=str(n % 3))
            if explains:
                before = fleet.router.stats()
                fleet.router.explain(query)
                assert fleet.router.stats() == before
            decision, booking = fleet.router.route(query)
            chosen.append(decision.worker_id)
            if n % 3:
                booking.free()
        return chosen

    assert history(True) == history(False)


def test_explain_names_all_workers_the_cheapest_first_and_why_others_may_not(make_fleet):
    fleet = make_fleet(5)
    fleet.hold("w2", PROMPT)
    fleet.router.drain("w0")
    fleet.router.set_aside("w1")
    decision = fleet.router.explain(fleet.query(PROMPT, exclude=frozenset({"w3"})))
    assert decision.worker_id == decision.candidates[0].worker_id == "w2"
    assert {one.worker_id: one.refused for one in decision.candidates} == {
        "w2": None,
        "w4": None,
        "w0": "draining",
        "w1": "set aside after a failure",
        "w3": "excluded by the request",
    }
    cheap, dear = decision.candidates[:2]
    assert cheap.cost_s < dear.cost_s
    assert dear.cost_s == pytest.approx(
        dear.queue_s / 2 + dear.load_s + dear.compute_s + dear.balance_s + dear.decode_s
    )


def test_where_all_are_busy_it_is_explained_which_of_them_it_would_get(make_fleet):
    fleet = make_fleet(0, busy_requests=1.0)
    fleet.slots = {name: fleet.join(name, max_running=1) for name in ("w0", "w1")}
    fleet.hold("w1", range(64))
    bookings = [fleet.route([number])[1] for number in range(2)]
    decision = fleet.router.explain(fleet.query(PROMPT))
    assert (decision.worker_id, decision.reason, decision.cached_tokens) == ("w1", "busy", 64)
    assert {one.worker_id: one.refused for one in decision.candidates} == {"w0": "busy", "w1": "busy"}
    with pytest.raises(NoWorkersError):
        fleet.router.explain(fleet.query(PROMPT, exclude=frozenset({"w0", "w1"})))
    for booking in bookings:
        booking.free()
    assert fleet.router.explain(fleet.query(PROMPT)).reason == "cost"


def test_predicted_and_actual_cached_tokens_are_compared(make_fleet):
    fleet = make_fleet(1)
    fleet.hold("w0", range(64))
    _, booking = fleet.route(PROMPT)
    booking.first_token()
    booking.first_token(48)
    booking.first_token(64)
    fleet.route(PROMPT)[1].free()
    stats = fleet.router.stats()
    assert (stats.reported_tokens, stats.reported_predicted_tokens, stats.actual_cached_tokens) == (160, 64, 48)
    assert (stats.prompt_tokens, stats.predicted_cached_tokens) == (320, 64 + 144)
    assert stats.decisions == {("kv", "only"): 2}
    assert stats.total_s.count == stats.hash_s.count == 2
    assert stats.total_s.total_s > 0


def test_listeners_hear_of_room(make_fleet):
    fleet = make_fleet(1)
    heard = []
    fleet.router.when_room(lambda: heard.append(1))
    _, booking = fleet.route(PROMPT)
    heard.clear()
    booking.first_token()
    booking.free()
    booking.free()
    fleet.router.report("w0", report())
    fleet.join("w1")
    assert len(heard) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "best"},
        {"affinity": "firm"},
        {"temperature": -1.0},
        {"prefix_weight": 1.5},
        {"approximate_ttl_s": 0.0},
        {"busy_queue_s": float("nan")},
        {"booking_expiry_s": float("inf")},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(RouterConfigError, match=next(iter(settings))):
        RouterConfig(**settings)
