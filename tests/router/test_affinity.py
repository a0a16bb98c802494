"""Sessions: remembered for a time, and no more of them than may be."""

from dynamo.router.affinity import SessionTable


def test_a_session_is_remembered_from_its_last_request():
    table = SessionTable(10.0, 100)
    table.bind("s", "w0", 0.0)
    table.bind("s", "w1", 5.0)
    assert table.find("s", 14.9) == "w1"
    assert table.find("s", 15.0) is None
    assert table.find("other", 0.0) is None


def test_the_session_longest_unused_makes_room():
    table = SessionTable(10.0, 2)
    for name in ("a", "b", "a", "c"):
        table.bind(name, "w", 0.0)
    assert [table.find(name, 1.0) for name in "abc"] == ["w", None, "w"]
    assert len(table) == 2


def test_expired_sessions_are_forgotten():
    table = SessionTable(10.0, 100)
    for second in range(5):
        table.bind(str(second), "w", float(second))
    assert table.expire(12.0) == 3
    assert len(table) == 2
