import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from dynamo.router.workers import LoadEvent, LoadReport
from dynamo.serve.engine.delivery import OutputStream
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    RequestFailedError,
    WorkerDrainingError,
    WorkerLostError,
)
from dynamo.serve.plane.frames import FrameParser, frame
from dynamo.serve.plane.front_session import SessionTimes
from dynamo.serve.plane.messages import PROTOCOL_VERSION, Hello, Report, Step, Submit, Welcome, decode_down, encode
from dynamo.serve.plane.questions import worker_client


class StepEngine:
    """Hands a delta to every live request each time the test says so, in one turn of the loop, as the real engine does."""

    max_model_len = 10_000

    def __init__(self) -> None:
        self.streams: dict[str, OutputStream] = {}

    def check_healthy(self) -> None: ...

    def step(self, text: str = "x", *, finish: bool = False) -> None:
        for stream in self.streams.values():
            stream.feed(OutputDelta(text, [1], finish_reason="stop" if finish else None))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        stream = self.streams[request.request_id] = OutputStream()
        try:
            is_over = False
            while not is_over:
                deltas = await stream.next()
                is_over = deltas[-1].finish_reason is not None
                yield deltas
        finally:
            del self.streams[request.request_id]


def test_what_an_engine_says_arrives_unchanged(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted(reply="größer, naïve ✅", num_cached_tokens=2, stop_reason="✅")
    sampling = SamplingParams(
        max_tokens=100, temperature=0.5, seed=3, stop=("a", "b"), stop_token_ids=frozenset({4, 5}), num_logprobs=2
    )
    request = plane.request(
        sampling=sampling, prompt_token_ids=[0, 2**32 - 1], output_token_ids=[7, 8], cache_salt="sält"
    )

    async def test() -> None:
        expected = await plane.collect(engine, request)
        async with plane.worker(engine) as (_, address), plane.session(address) as session:
            assert session.worker_id == "worker-0"
            assert await plane.collect(session, request) == expected
            assert session.num_requests == 0
        _, arrived = engine.requests
        assert arrived.request_id.startswith("r/")
        assert arrived.prompt_token_ids == [0, 2**32 - 1]
        assert (arrived.output_token_ids, arrived.cache_salt, arrived.sampling) == ([7, 8], "sält", sampling)

    run(test())


def test_many_requests_run_side_by_side(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        async with plane.worker(scripted(reply="some words")) as (_, address), plane.session(address) as session:
            requests = [plane.request(f"r{i}", max_tokens=1 + i % 12) for i in range(50)]
            for i, deltas in enumerate(await asyncio.gather(*(plane.collect(session, r) for r in requests))):
                assert "".join(delta.text for delta in deltas) == "some words"[: 1 + i % 12]

    run(test())


def test_what_all_requests_gain_in_a_step_is_one_frame(plane: Any, run: Any) -> None:
    engine = StepEngine()

    async def test() -> None:
        async with plane.worker(engine) as (_, address), RawFront(address) as front:
            for number in range(16):
                front.say(Submit(number, f"r{number}", bytes(4), b"", SamplingParams(max_tokens=9), ""))
            await plane.until(lambda: len(engine.streams) == 16)
            for _ in range(5):
                engine.step()
                step = await front.next_step()
                assert [gain.number for gain in step.gains] == list(range(16))

    run(test())


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (EngineOverloadedError("full"), EngineOverloadedError),
        (EngineDeadError("gone"), EngineDeadError),
        (RequestFailedError("bad luck"), RequestFailedError),
        (KeyError("a bug"), RequestFailedError),
    ],
)
def test_a_failure_arrives_as_what_it_is_behind_what_was_gained(
    plane: Any, scripted: Any, run: Any, failure: Exception, expected: type[Exception]
) -> None:
    engine = scripted(fail_after=2, failure=failure)

    async def test() -> None:
        async with plane.worker(engine) as (_, address), plane.session(address) as session:
            said = ""
            with pytest.raises(expected, match=str(failure.args[0])):
                async for deltas in session.generate(plane.request()):
                    said += "".join(delta.text for delta in deltas)
            assert said == "He"
            engine.fail_after = None
            assert len(await plane.collect(session, plane.request())) == len(engine.reply)

    run(test())


def test_a_request_that_fits_no_frame_fails_alone(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        async with plane.worker(scripted()) as (_, address), plane.session(address) as session:
            for prompt in ([-1], [2**32], [0] * (9 << 20)):
                with pytest.raises(RequestFailedError, match="cannot be sent to a worker"):
                    await plane.collect(session, plane.request(prompt_token_ids=prompt))
            assert await plane.collect(session, plane.request())

    run(test())


def test_closing_a_generator_aborts_its_request_and_no_other(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted(hold_after=1)

    async def test() -> None:
        async with plane.worker(engine) as (app, address), plane.session(address) as session:
            other = asyncio.create_task(plane.collect(session, plane.request("other")))
            async with aclosing(session.generate(plane.request("left"))) as steps:
                await anext(steps)
                await plane.until(lambda: len(engine.live) == 2)
            closed_s = time.perf_counter()
            await plane.until(lambda: len(engine.live) == 1)
            (ended_s,) = engine.ended.values()
            assert ended_s - closed_s < 0.1
            engine.proceed.set()
            assert len(await other) == len(engine.reply)
            await plane.until(lambda: app.num_requests == 0)

    run(test())


def test_a_request_given_up_before_its_first_token_leaves_nothing(plane: Any, run: Any) -> None:
    engine = StepEngine()

    async def test() -> None:
        async with plane.worker(engine) as (app, address), plane.session(address) as session:
            for i in range(20):
                task = asyncio.create_task(plane.collect(session, plane.request(f"r{i}")))
                await asyncio.sleep(0)
                if i % 2:
                    await plane.until(lambda: bool(engine.streams))
                task.cancel()
                await asyncio.wait([task])
            await plane.until(lambda: app.num_requests == 0 and not engine.streams)
            assert session.num_requests == 0

    run(test())


def test_closing_the_session_aborts_all_of_it_at_once(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted(hold_after=1)

    async def test() -> None:
        async with plane.worker(engine) as (app, address), plane.session(address) as session:
            tasks = [asyncio.create_task(plane.collect(session, plane.request(f"r{i}"))) for i in range(8)]
            await plane.until(lambda: len(engine.live) == 8)
            closed_s = time.perf_counter()
            await session.close()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, WorkerLostError)
            await plane.until(lambda: app.num_requests == 0)
            assert max(engine.ended.values()) - closed_s < 0.1
            with pytest.raises(WorkerLostError, match="the session was closed"):
                await plane.collect(session, plane.request())

    run(test())


def test_a_worker_that_goes_away_is_lost_for_every_request(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted(hold_after=1)

    async def test() -> None:
        async with plane.worker(engine) as (app, address), plane.session(address) as session:
            tasks = [asyncio.create_task(plane.collect(session, plane.request(f"r{i}"))) for i in range(8)]
            await plane.until(lambda: len(engine.live) == 8)
            await app.close()
            assert "closed the session" in await session.wait_lost()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, WorkerLostError)
                assert error.worker_id == "worker-0"
            assert session.is_lost
            with pytest.raises(WorkerLostError, match="going away"):
                async with plane.session(address):
                    pass

    run(test())


def test_a_draining_worker_ends_what_runs_and_sends_the_rest_elsewhere(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted(hold_after=1)
    reports: list[tuple[LoadReport, bool]] = []

    async def test() -> None:
        async with (
            plane.worker(engine) as (app, address),
            plane.session(address, on_report=lambda *report: reports.append(report)) as session,
        ):
            running = asyncio.create_task(plane.collect(session, plane.request("running")))
            await plane.until(lambda: bool(engine.live and reports))
            assert reports[-1] == (plane.report, False)
            app.begin_drain()
            with pytest.raises(WorkerDrainingError, match="about to leave"):
                await plane.collect(session, plane.request("late"))
            await plane.until(lambda: reports[-1] == (plane.report, True))
            assert not await app.wait_idle(0.01)
            engine.proceed.set()
            assert await app.wait_idle(5)
            assert len(await running) == len(engine.reply)

    run(test())


def test_a_slow_consumer_holds_up_nobody(plane: Any, run: Any) -> None:
    engine = StepEngine()

    async def test() -> None:
        async with plane.worker(engine) as (_, address), plane.session(address) as session:
            slow = session.generate(plane.request("slow"))
            first = asyncio.create_task(anext(slow))
            fast = asyncio.create_task(plane.collect(session, plane.request("fast")))
            await plane.until(lambda: len(engine.streams) == 2)
            for _ in range(999):
                engine.step()
                await asyncio.sleep(0)
            engine.step(finish=True)
            assert "".join(delta.text for delta in await fast) == 1000 * "x"
            await first
            rest = [delta async for deltas in slow for delta in deltas]
            assert len(rest) <= 256
            assert sum(len(delta.token_ids) for delta in [*first.result(), *rest]) == 1000

    run(test())


def test_requests_live_is_told_to_whoever_listens(plane: Any, scripted: Any, run: Any) -> None:
    events: list[LoadEvent] = []

    def listen(payload: bytes) -> None:
        events.append(msgspec.msgpack.decode(payload, type=LoadEvent))

    async def test() -> None:
        async with plane.worker(scripted(), publish_load=listen) as (_, address):
            async with plane.session(address) as session:
                request = plane.request(prompt_token_ids=[1] * 30, output_token_ids=[2] * 3)
                await plane.collect(session, request)
            await plane.until(lambda: events[-1].kind == "front-gone")
        assert {event.front_id for event in events} == {"front-a"}
        assert [(event.kind, event.request_id) for event in events] == [
            ("added", "r"),
            ("first-token", "r"),
            ("freed", "r"),
            ("front-gone", ""),
        ]
        assert (events[0].prefill_tokens, events[0].num_blocks) == (33, 3)

    run(test())


# --- peers that break their promises


class RawFront:
    """Speaks the protocol by hand. Reads only when asked to."""

    def __init__(self, address: str, hello: Any = None) -> None:
        self._client = worker_client(address)
        self._unsent: asyncio.Queue[bytes] = asyncio.Queue()
        self._steps: list[Step] = []
        self._parser = FrameParser()
        self.say(hello or Hello(PROTOCOL_VERSION, "raw", "worker-0", 7))

    def say(self, message: Any) -> None:
        self._unsent.put_nowait(frame(encode(message)))

    def say_bytes(self, data: bytes) -> None:
        self._unsent.put_nowait(data)

    async def _body(self) -> AsyncGenerator[bytes, None]:
        while True:
            yield await self._unsent.get()

    async def __aenter__(self) -> "RawFront":
        self.response = await self._client.post("/session", data=self._body())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.response.close()
        await self._client.close()

    async def next_step(self) -> Step:
        while not self._steps:
            for payload in self._parser.feed(await self.response.content.readany()):
                message = decode_down(payload)
                if isinstance(message, Step):
                    self._steps.append(message)
        return self._steps.pop(0)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"worker_id": "worker-1"}, "looks for worker worker-1 of epoch 7, and this is worker-0 of epoch 7"),
        ({"epoch": 8}, "looks for worker worker-0 of epoch 8, and this is worker-0 of epoch 7"),
    ],
)
def test_a_session_with_the_wrong_worker_is_refused_aloud(
    plane: Any, scripted: Any, run: Any, caplog: pytest.LogCaptureFixture, wanted: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        async with plane.worker(scripted()) as (_, address):
            with pytest.raises(WorkerLostError, match=reason):
                async with plane.session(address, **wanted):
                    pass

    run(test())
    assert any(record.levelno == logging.ERROR and reason in record.message for record in caplog.records)


def test_another_protocol_is_refused_by_both_ends(
    plane: Any, scripted: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        hello = Hello(PROTOCOL_VERSION + 1, "newer", "worker-0", 7)
        async with plane.worker(scripted()) as (_, address), RawFront(address, hello) as front:
            assert front.response.status == 409
            assert f"speaks protocol {PROTOCOL_VERSION + 1}" in await front.response.text()
        newer = Talker(encode(Welcome(PROTOCOL_VERSION + 1, "worker-0", 7)))
        async with plane.asgi(newer) as address:
            with pytest.raises(WorkerLostError, match=f"speaks protocol {PROTOCOL_VERSION + 1}"):
                async with plane.session(address):
                    pass

    run(test())
    assert [record.levelno for record in caplog.records if "protocol" in record.message] == [logging.ERROR] * 2


@pytest.mark.parametrize("on_port", [False, True])
def test_a_wrong_key_opens_no_session(plane: Any, scripted: Any, run: Any, on_port: bool) -> None:
    async def test() -> None:
        async with plane.worker(scripted(), key="secret", on_port=on_port) as (_, address):
            for key in ("", "wrong", "sécret"):
                with pytest.raises(WorkerLostError, match="status 401"):
                    async with plane.session(address, key=key):
                        pass
            async with plane.session(address, key="secret") as session:
                assert await plane.collect(session, plane.request())

    run(test())


def test_nobody_there_is_a_lost_worker(plane: Any, run: Any) -> None:
    async def test() -> None:
        for address in (f"unix:{plane.folder}/nothing.sock", "http://127.0.0.1:9"):
            with pytest.raises(WorkerLostError, match="no session can be opened"):
                async with plane.session(address):
                    pass

    run(test())


class Talker:
    """An ASGI application that says what it is given, and then stays silent until the front has enough."""

    def __init__(self, *payloads: bytes) -> None:
        self._data = b"".join(map(frame, payloads))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": self._data, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass


WELCOME = encode(Welcome(PROTOCOL_VERSION, "worker-0", 7))


def test_a_silent_worker_is_lost(plane: Any, run: Any) -> None:
    async def test() -> None:
        async with plane.asgi(Talker(WELCOME)) as address, plane.session(address, silence_s=0.2) as session:
            with pytest.raises(WorkerLostError, match=r"nothing was heard of it for 0\.\d s"):
                await plane.collect(session, plane.request())

    run(test())


class Deaf:
    """A worker that says every now and then how well it is, and reads nothing."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        said = WELCOME
        with contextlib.suppress(OSError):
            while True:
                await send({"type": "http.response.body", "body": frame(said), "more_body": True})
                said = encode(Report(LoadReport(num_running=0, num_waiting=0, prefill_tokens_waiting=0), False))
                await asyncio.sleep(0.05)


def test_a_worker_that_speaks_and_does_not_read_is_lost(plane: Any, run: Any) -> None:
    async def test() -> None:
        async with plane.asgi(Deaf()) as address, plane.session(address, silence_s=0.4) as session:
            with pytest.raises(WorkerLostError, match=r"it has read nothing for 0\.\d s"):
                await plane.collect(session, plane.request(prompt_token_ids=[1] * 2_000_000))

    run(test())


def test_however_much_comes_at_once_a_worker_that_reads_is_not_lost(plane: Any, scripted: Any, run: Any) -> None:
    """As when another worker is lost, and all its requests come to this one."""

    async def test() -> None:
        engine = scripted(reply="yes")
        async with plane.worker(engine) as (_, address), plane.session(address) as session:
            prompt = [1] * 1_000_000
            requests = [plane.request(f"r{number}", prompt_token_ids=prompt) for number in range(20)]
            answers = await asyncio.gather(*(plane.collect(session, request) for request in requests))
            assert {"".join(delta.text for delta in deltas) for deltas in answers} == {"yes"}

    run(test())


@pytest.mark.parametrize(
    "said",
    [
        b"\xc1",
        encode(Hello(1, "", "", 1)),
        WELCOME,
        b"\x94\x02\x00\xa6failed\xa1\xff",
        b"\x93\x01\x90" + 50_000 * b"\x91",
    ],
    ids=["noise", "a Hello", "twice", "no text", "too deep"],
)
def test_a_worker_that_says_what_it_must_not_is_lost_aloud(
    plane: Any, run: Any, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    async def test() -> None:
        async with plane.asgi(Talker(WELCOME, said)) as address:
            with pytest.raises(WorkerLostError, match="what cannot be read"):
                async with plane.session(address) as session:
                    await plane.collect(session, plane.request())

    run(test())
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(b"\xc1"), "cannot be read"),
        (frame(b"\x92\x03" + 50_000 * b"\x91" + b"\xc0"), "cannot be read"),
        (b"\xff\xff\xff\xff", "longer than"),
        (2 * frame(encode(Submit(0, "r", bytes(4), b"", SamplingParams(max_tokens=9), ""))), "used twice"),
        (frame(encode(Submit(0, "r", bytes(5), b"", SamplingParams(max_tokens=9), ""))), "cannot be read"),
        (frame(encode(Hello(PROTOCOL_VERSION, "raw", "worker-0", 7))), "second Hello"),
    ],
)
def test_a_front_that_says_what_it_must_not_is_cut_off(
    plane: Any, run: Any, caplog: pytest.LogCaptureFixture, data: bytes, reason: str
) -> None:
    engine = StepEngine()

    async def test() -> None:
        async with plane.worker(engine) as (app, address), RawFront(address) as front:
            front.say_bytes(data)
            while await front.response.content.readany():
                pass
            assert app.num_requests == 0
            assert not engine.streams

    run(test())
    assert any("front raw is cut off" in record.message and reason in record.message for record in caplog.records)


def test_a_front_that_is_silent_is_cut_off(plane: Any, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = StepEngine()

    async def test() -> None:
        times = SessionTimes(silence_s=0.2)
        async with plane.worker(engine, times=times) as (_, address), RawFront(address) as front:
            front.say(Submit(0, "r", bytes(4), b"", SamplingParams(max_tokens=9), ""))
            await plane.until(lambda: bool(engine.streams))
            await plane.until(lambda: not engine.streams)

    run(test())
    assert any("nothing was heard of it for 0.2 s" in record.message for record in caplog.records)


def test_a_front_that_does_not_read_is_cut_off_alone(plane: Any, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = StepEngine()

    async def test() -> None:
        times = SessionTimes(stall_s=0.3)
        async with (
            plane.worker(engine, times=times) as (app, address),
            plane.session(address) as session,
            RawFront(address) as front,
        ):
            front.say(Submit(0, "unread", bytes(4), b"", SamplingParams(max_tokens=9), ""))
            good = asyncio.create_task(plane.collect(session, plane.request("good")))
            await plane.until(lambda: len(engine.streams) == 2)
            num_steps = 0
            while app.num_requests == 2:
                engine.step("x" * 10_000)
                num_steps += 1
                await asyncio.sleep(0.001)
            engine.step("", finish=True)
            assert sum(len(delta.text) for delta in await good) == 10_000 * num_steps

    run(test())
    assert any("it has read nothing for 0.3 s" in record.message for record in caplog.records)
