import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.serve.plane.frames import MAX_FRAME_BYTES, FrameError, FrameParser, frame


@settings(deadline=None)
@given(payloads=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=50))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, payloads))
    parser = FrameParser()
    found: list[bytes] = []
    while stream:
        cut = cuts[len(stream) % len(cuts)]
        found += [bytes(payload) for payload in parser.feed(stream[:cut])]
        stream = stream[cut:]
    assert found == payloads
    assert parser.is_between_frames


def test_a_stream_that_ends_inside_a_frame_is_noticed() -> None:
    parser = FrameParser()
    assert list(parser.feed(frame(b"abc")[:-1])) == []
    assert not parser.is_between_frames


def test_a_frame_that_is_too_long_is_refused_before_it_is_kept() -> None:
    parser = FrameParser(max_frame_bytes=8)
    payloads = parser.feed(frame(b"12345678") + frame(b"123456789"))
    assert bytes(next(payloads)) == b"12345678"
    with pytest.raises(FrameError, match="9 bytes is announced, longer than the 8 allowed"):
        next(payloads)
    with pytest.raises(FrameError, match="longer than"):
        frame(bytes(MAX_FRAME_BYTES + 1))
