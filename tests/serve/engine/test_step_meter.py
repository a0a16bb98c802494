import pytest

from dynamo.serve.engine.request import SamplingParams
from dynamo.serve.engine.scheduler import PrefillChunk, ScheduledStep
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.step_meter import StepMeter


def sequence(num_computed: int = 0) -> SequenceState:
    state = SequenceState(
        request_id="", params=SamplingParams(max_tokens=1), salt="", tokens=[0] * 4096, num_prompt_tokens=4096
    )
    state.num_computed = num_computed
    return state


def step(*chunks: tuple[int, int], num_decodes: int = 0, samples: bool = True) -> ScheduledStep:
    """A step with chunks of (tokens, context)."""
    prefills = [PrefillChunk(sequence(context), tokens, samples) for tokens, context in chunks]
    decodes = [sequence(100) for _ in range(num_decodes)]
    return ScheduledStep(decodes, prefills, [sequence()] if samples else [], [])


@pytest.fixture
def seen() -> list[tuple[int, float, float]]:
    return []


@pytest.fixture
def meter(seen: list[tuple[int, float, float]]) -> StepMeter:
    return StepMeter(lambda *observation: seen.append(observation))


def test_a_chunk_is_told_with_its_context(meter: StepMeter, seen: list[tuple[int, float, float]]) -> None:
    meter.add(step((512, 1024)), 0.25)
    assert seen == [(512, 1024.0, 0.25)]


def test_steps_that_only_or_mostly_decode_are_not_told(meter: StepMeter, seen: list[tuple[int, float, float]]) -> None:
    meter.add(step(num_decodes=4), 0.1)
    meter.add(step((3, 0), num_decodes=5), 0.1)
    assert not seen


def test_decodes_beside_a_chunk_take_their_share_of_the_time(
    meter: StepMeter, seen: list[tuple[int, float, float]]
) -> None:
    meter.add(step((90, 0), num_decodes=10), 1.0)
    assert seen == [(90, 0.0, pytest.approx(0.9))]


def test_several_chunks_are_told_as_one_that_attends_to_as_much(
    meter: StepMeter, seen: list[tuple[int, float, float]]
) -> None:
    meter.add(step((100, 1000), (300, 0)), 1.0)
    ((tokens, context, seconds),) = seen
    assert (tokens, seconds) == (400, 1.0)
    assert tokens * (context + tokens / 2) == pytest.approx(100 * 1050 + 300 * 150)


def test_where_steps_end_before_they_are_computed_those_up_to_a_sample_are_told_together(
    seen: list[tuple[int, float, float]],
) -> None:
    meter = StepMeter(lambda *observation: seen.append(observation), is_async=True)
    meter.add(step((512, 0), samples=False), 0.001)
    meter.add(step((512, 512), samples=False), 0.001)
    assert not seen
    meter.add(step((512, 1024)), 0.298)
    assert seen == [(1536, pytest.approx(0.0), pytest.approx(0.3))]
