"""Tests of the time that is left of a plan."""

from __future__ import annotations

import pytest

from kvexport.progress import PlannedTime


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_seconds_of_a_unit_are_measured(clock: Clock) -> None:
    planned = PlannedTime({"text": 1.0, "analysis": 2.0, "write": 1.0}, clock)
    assert planned.done == 0 and planned.seconds_left() is None
    planned.begin("text")
    planned.begin_stage()
    assert planned.seconds_left() is None
    clock.seconds += 5
    planned.step(0.5)
    assert planned.done == 0.125 and planned.seconds_left() == pytest.approx(35)
    clock.seconds += 3  # nothing is done meanwhile
    assert planned.seconds_left() == pytest.approx(32)
    clock.seconds += 2
    planned.end()
    assert planned.done == 0.25 and planned.seconds_left() == pytest.approx(30)
    planned.begin("analysis")
    clock.seconds += 50  # longer than expected: the rest is expected to be slow, too
    planned.end()
    assert planned.done == 0.75 and planned.seconds_left() == pytest.approx(20)
    planned.begin("write")
    planned.end()
    assert planned.done == 1 and planned.seconds_left() == 0


def test_the_time_left_is_not_negative(clock: Clock) -> None:
    planned = PlannedTime({"a": 1.0, "b": 1.0}, clock)
    planned.begin("a")
    clock.seconds += 1
    planned.end()
    clock.seconds += 10
    assert planned.seconds_left() == 0


def test_a_part_may_have_several_stages(clock: Clock) -> None:
    planned = PlannedTime({"trials": 1.0}, clock)
    planned.begin("trials")
    planned.begin_stage()
    planned.step(1.0)
    assert planned.done == 1
    planned.begin_stage()  # only now it is known
    assert planned.done == 0.5
    planned.step(0.5)
    assert planned.done == 0.75


def test_what_is_not_planned_counts_nothing(clock: Clock) -> None:
    planned = PlannedTime({"a": 1.0}, clock)
    planned.begin("b")
    planned.begin_stage()
    planned.step(0.5)
    planned.end()
    assert planned.done == 0
    assert PlannedTime({}, clock).done == 1
