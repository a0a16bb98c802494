import logging

from dynamo.serve.repetition import RepetitionFilter


def record(level: int, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("name", level, "file", 1, message, arguments, None)


def test_a_warning_passes_once_a_minute_whatever_its_arguments() -> None:
    now_s = 0.0
    repetition = RepetitionFilter(lambda: now_s)
    assert repetition.filter(record(logging.WARNING, "junk from %s", 1))
    now_s = 59
    assert not repetition.filter(record(logging.WARNING, "junk from %s", 2))
    assert repetition.filter(record(logging.WARNING, "something else"))
    now_s = 60
    assert repetition.filter(record(logging.WARNING, "junk from %s", 3))


def test_errors_and_information_always_pass() -> None:
    repetition = RepetitionFilter()
    for level in (logging.ERROR, logging.INFO):
        assert all(repetition.filter(record(level, "again")) for _ in range(3))
