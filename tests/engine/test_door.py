"""Whether requests are taken."""

from __future__ import annotations

import pytest

from engine.door import Door
from engine.errors import EngineClosed


def test_it_is_open_until_it_is_closed() -> None:
    door = Door()
    door.check("")
    door.close()
    with pytest.raises(EngineClosed, match="shutting down"):
        door.check("")


def test_who_holds_it_may_still_go_on() -> None:
    door, moving = Door(), [True]
    door.hold("a", lambda: moving[0])
    door.close()
    door.check("a")
    assert door.is_held
    for other in ("", "b"):
        with pytest.raises(EngineClosed):
            door.check(other)
    moving[0] = False
    assert not door.is_held, "what is set aside is not waited for"
    door.check("a")
    door.release("a")
    door.release("never held")
    with pytest.raises(EngineClosed):
        door.check("a")


def test_once_shut_nobody_holds_it() -> None:
    door = Door()
    door.hold("a", lambda: True)
    door.close(shut=True)
    assert not door.is_held
    with pytest.raises(EngineClosed):
        door.check("a")
