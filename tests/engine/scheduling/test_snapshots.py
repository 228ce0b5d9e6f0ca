"""Where states are kept, and for how long."""

from __future__ import annotations

from engine.scheduling.snapshots import Snapshots


def filled(count: int, *names: bytes) -> Snapshots:
    snapshots = Snapshots(8, count)
    for name in names:
        place = snapshots.place()
        assert place is not None
        snapshots.put(name, place, wanted=True)
    snapshots.audit([])
    return snapshots


def test_places_follow_those_of_who_runs_and_low_ones_come_first() -> None:
    snapshots = Snapshots(8, 2)
    assert [snapshots.place() for _ in range(3)] == [8, 9, None]
    snapshots.audit([8, 9])


def test_the_longest_unused_state_makes_room() -> None:
    snapshots = filled(3, b"a", b"b", b"c")
    assert snapshots.use(b"a") == 8
    place = snapshots.place()
    assert place == 9
    assert b"b" not in snapshots
    snapshots.put(b"d", place, wanted=True)
    snapshots.audit([])
    assert len(snapshots) == 3


def test_a_state_that_is_there_already_is_not_kept_twice() -> None:
    snapshots = filled(2, b"a")
    place = snapshots.place()
    assert place is not None
    snapshots.put(b"a", place, wanted=False)
    snapshots.audit([])
    assert (len(snapshots), snapshots.use(b"a")) == (1, 8)


def test_what_was_kept_on_the_way_goes_when_its_sequence_has_come_further() -> None:
    snapshots = filled(4)
    for name in (b"used", b"wanted", b"passed"):
        place = snapshots.place()
        assert place is not None
        snapshots.put(name, place, wanted=False)
    snapshots.use(b"used")
    place = snapshots.place()
    assert place is not None
    snapshots.put(b"wanted", place, wanted=True)
    for name in (b"used", b"wanted", b"passed", b"unknown"):
        snapshots.pass_by(name)
    assert [name in snapshots for name in (b"used", b"wanted", b"passed")] == [True, True, False]
    snapshots.audit([])


def test_states_behind_pages_that_are_gone_are_forgotten() -> None:
    snapshots = filled(3, b"a", b"b", b"c")
    snapshots.drop([b"b", b"unknown"])
    assert (len(snapshots), snapshots.place()) == (2, 9)
    snapshots.give_back(9)
    snapshots.clear()
    snapshots.audit([])
    assert not len(snapshots)
