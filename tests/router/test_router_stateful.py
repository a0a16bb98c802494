"""Random use of a router: whoever is chosen may be chosen, books balance, and at the end nothing is booked."""

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dynamo.router.config import MODES
from dynamo.router.errors import AllBusyError, NoWorkersError, PinnedWorkerError, RouteError
from dynamo.router.workers import LoadEvent, LoadReport

NAMES = st.sampled_from(["w0", "w1", "w2", "w3", "w4"])
LENGTHS = st.integers(1, 700)


class RouterMachine(RuleBasedStateMachine):
    """Up to five workers that come, go, drain, fail and come back; prompts that share prefixes."""

    make_fleet: type  # set by the test below: fixtures do not reach state machines

    @initialize(
        mode=st.sampled_from([mode for mode in MODES if mode != "direct"]),
        affinity=st.sampled_from(["off", "soft", "hard"]),
        temperature=st.sampled_from([0.0, 0.5]),
        busy=st.sampled_from([0.0, 3.0]),
        ttl_s=st.sampled_from([0.0, 5.0]),
    )
    def start(self, mode, affinity, temperature, busy, ttl_s):
        self.fleet = self.make_fleet(
            0,
            mode=mode,
            affinity=affinity,
            temperature=temperature,
            busy_requests=busy,
            prediction_ttl_s=ttl_s,
            session_ttl_s=20.0,
            max_sessions=3,
            booking_expiry_s=1e6,
            front_id="me",
        )
        self.epochs: dict[str, int] = {}
        self.draining: set[str] = set()
        self.aside_until_s: dict[str, float] = {}
        self.bookings: list = []  # (booking, worker, epoch), still to be freed
        self.foreign: dict[str, set[tuple[str, str]]] = {}
        self.num_joined = 0

    @rule(name=NAMES, has_events=st.booleans())
    def join(self, name, has_events):
        self.num_joined += 1
        self.fleet.slots[name] = self.fleet.join(name, epoch=self.num_joined, has_events=has_events, max_running=2)
        self.epochs[name] = self.num_joined
        self.foreign[name] = set()
        self.draining.discard(name)
        self.aside_until_s.pop(name, None)

    @rule(name=NAMES)
    def leave(self, name):
        assert self.fleet.router.leave(name) == (name in self.epochs)
        self.epochs.pop(name, None)
        self.draining.discard(name)
        self.aside_until_s.pop(name, None)

    @precondition(lambda self: self.epochs)
    @rule(data=st.data())
    def drain(self, data):
        name = data.draw(st.sampled_from(sorted(self.epochs)))
        self.fleet.router.drain(name)
        self.draining.add(name)

    @rule(name=NAMES)
    def set_aside(self, name):
        self.fleet.router.set_aside(name)
        if name in self.epochs:
            self.aside_until_s[name] = self.fleet.clock.now_s + 5.0

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 30.0]))
    def wait(self, seconds):
        self.fleet.clock.now_s += seconds

    @rule(name=NAMES, length=LENGTHS, tier=st.sampled_from(["device", "host", "disk"]))
    def hold(self, name, length, tier):
        if name in self.epochs:
            self.fleet.hold(name, range(length), tier)

    @rule(name=NAMES, running=st.integers(0, 9), waiting=st.integers(0, 9), tokens=st.integers(0, 9999))
    def report(self, name, running, waiting, tokens):
        report = LoadReport(
            num_running=running,
            num_waiting=waiting,
            prefill_tokens_waiting=tokens,
            prefill_tokens_per_s=1000.0 if tokens % 2 else None,
            load_blocks_per_s={"host": 500.0} if tokens % 3 else {},
        )
        self.fleet.router.report(name, report)
        if name in self.epochs and not running + waiting:
            self.foreign[name] &= {key for key in self.foreign[name] if self.fleet.load(name).num_foreign}

    @rule(
        name=NAMES,
        front=st.sampled_from(["me", "other", "third"]),
        request=st.sampled_from("abc"),
        kind=st.sampled_from(["added", "added", "first-token", "freed", "front-gone"]),
    )
    def hear(self, name, front, request, kind):
        event = LoadEvent(kind=kind, front_id=front, request_id=request, prefill_tokens=300, num_blocks=20)
        self.fleet.router.foreign_load(name, event)
        if name not in self.epochs or front == "me":
            return
        known = self.foreign[name]
        if kind == "added":
            known.add((front, request))
        elif kind == "freed":
            known.discard((front, request))
        elif kind == "front-gone":
            known -= {key for key in known if key[0] == front}

    @rule(
        length=LENGTHS,
        own=st.integers(0, 3),
        pin=st.none() | NAMES,
        exclude=st.frozensets(NAMES, max_size=2),
        allowed=st.none() | st.frozensets(NAMES, max_size=4),
        session=st.none() | st.sampled_from(["s1", "s2", "s3", "s4", "s5"]),
        expected=st.none() | st.integers(0, 300),
        explains=st.booleans(),
    )
    def route(self, length, own, pin, exclude, allowed, session, expected, explains):
        fleet = self.fleet
        query = fleet.query(
            [*range(length), *[9000 + own] * own],
            pin=pin,
            exclude=exclude,
            allowed=allowed,
            session=session,
            expected_output_tokens=expected,
        )
        if explains:
            before = fleet.router.stats()
            with contextlib.suppress(RouteError):
                assert fleet.router.explain(query).candidates
            assert fleet.router.stats() == before
        may = {
            name
            for name in self.epochs
            if name not in exclude
            and name not in self.draining
            and (allowed is None or name in allowed)
            and pin in (None, name)
        }
        try:
            decision, booking = fleet.router.route(query)
        except AllBusyError:
            assert may
            return
        except NoWorkersError:
            assert not may
            assert pin is None
            return
        except PinnedWorkerError:
            assert not may
            assert pin is not None
            return
        chosen = decision.worker_id
        assert chosen in may
        now_s = fleet.clock.now_s
        assert self.aside_until_s.get(chosen, 0) <= now_s or all(self.aside_until_s.get(m, 0) > now_s for m in may)
        assert 0 <= decision.cached_tokens < query.num_tokens
        assert decision.cached_tokens <= decision.best_cached_tokens
        self.bookings.append((booking, chosen, self.epochs[chosen]))

    @precondition(lambda self: self.bookings)
    @rule(data=st.data(), step=st.sampled_from(["first", "grow", "free", "free twice"]), number=st.integers(0, 50))
    def go_on(self, data, step, number):
        position = data.draw(st.integers(0, len(self.bookings) - 1))
        booking, _, _ = self.bookings[position]
        if step == "first":
            booking.first_token(number)
        elif step == "grow":
            booking.output_blocks(number)
        else:
            booking.free()
            if step == "free twice":
                booking.free()
            del self.bookings[position]

    @invariant()
    def books_balance(self):
        if not hasattr(self, "fleet"):
            return
        router = self.fleet.router
        router.check_invariants()
        stats = router.stats()
        assert set(router.worker_ids) == set(self.epochs)
        assert stats.num_sessions <= 3
        expected = dict.fromkeys(self.epochs, 0)
        for _, name, epoch in self.bookings:
            if self.epochs.get(name) == epoch:
                expected[name] += 1
        assert stats.num_bookings == sum(expected.values())
        for worker in stats.workers:
            assert worker.num_foreign <= len(self.foreign[worker.worker_id])
            assert worker.num_requests >= expected[worker.worker_id] + worker.num_foreign
            assert min(worker.prefill_tokens, worker.held_blocks, worker.queue_s) >= 0
            if not worker.num_requests:
                assert (worker.prefill_tokens, worker.held_blocks) == (0, 0)

    def teardown(self):
        if not hasattr(self, "fleet"):
            return
        for booking, _, _ in self.bookings:
            booking.free()
        for name in list(self.epochs):
            for front in ("other", "third"):
                self.fleet.router.foreign_load(name, LoadEvent(kind="front-gone", front_id=front))
        self.fleet.clock.now_s += 1000
        self.fleet.router.tick()
        self.fleet.router.check_invariants()
        for worker in self.fleet.router.stats().workers:
            assert (worker.num_requests, worker.prefill_tokens, worker.held_blocks, worker.queue_s) == (0, 0, 0, 0)


@pytest.fixture
def router_machine(make_fleet):
    return type("Machine", (RouterMachine,), {"make_fleet": make_fleet})


def test_random_use(router_machine):
    run_state_machine_as_test(router_machine, settings=settings(deadline=None, max_examples=60, stateful_step_count=40))
