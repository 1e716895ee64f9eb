"""Laws of kept sessions: which use is near, and how many a role may keep."""

from __future__ import annotations

from cacheservice.sources.postgres.keeping import IDLE_LIMIT_S, NEAR_S, Window, has_room, is_next_use_near, planned


def test_what_is_near() -> None:
    every_5_s, every_hour, at_any_moment = planned(100.0, 5.0), planned(100.0, 3600.0), planned(100.0, 0.0)
    assert is_next_use_near(101.0, [every_5_s])
    assert is_next_use_near(101.0, [every_hour, at_any_moment])
    assert not is_next_use_near(101.0, [every_hour])
    assert is_next_use_near(3700.0 - NEAR_S, [every_hour])
    assert not is_next_use_near(101.0 + IDLE_LIMIT_S, [at_any_moment]), "that dataset may be gone"
    assert not is_next_use_near(0.0, [])
    assert Window(1.0, 2.0) == (1.0, 2.0)


def test_a_limited_role_keeps_connections_free() -> None:
    assert has_room(-1, 1000)
    assert has_room(20, 18)
    assert not has_room(20, 19)
    assert not has_room(1, 1)
