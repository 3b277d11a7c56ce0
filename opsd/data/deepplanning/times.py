"""Rules of the clock and the purse: no two activities at one time, ways as long as they take, a sum that adds up.

As every rule: (plan, trip, database) -> what is wrong, in words; nothing where the rule is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from opsd.data.deepplanning.database import Database
from opsd.data.deepplanning.plan import DAY_MINUTES, Activity, Day, Plan
from opsd.data.deepplanning.task import Trip

ANCHORS = ("hotel", "attraction", "meal", "travel_intercity_public")  # between which the traveller is on the way
PER_TAXI = 4
BUDGET_ERROR = 0.10  # of the plan's own total


def one_at_a_time(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    for number, day in enumerate(plan.days, start=1):
        timed = sorted((a for a in day.activities if a.start is not None and a.until is not None), key=_start)
        for before, after in pairwise(timed):
            if _start(after) < _until(before):
                yield f"day {number}: {before.kind} and {after.kind} overlap"


def ways_as_long_as_they_take(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Between two anchors, less buffers, as many minutes as the road takes, give or take what `allowed` allows.

    A pair that overlaps, is at one place, or of which the database knows no road is passed over.
    """
    for number, day in enumerate(plan.days, start=1):
        anchors = [a for a in day.activities if a.kind in ANCHORS and a.start is not None and a.until is not None]
        for before, after in pairwise(anchors):
            leaves, arrives = _until(before), _start(after)
            if leaves - arrives > DAY_MINUTES / 2:  # the first ends past midnight, and so the next day's hours follow
                arrives += DAY_MINUTES
            if arrives < leaves:
                continue
            origin = before.destination if before.kind == ANCHORS[-1] else before.name
            destination = after.origin if after.kind == ANCHORS[-1] else after.name
            road = database.minutes.get((database.places.get(origin, ""), database.places.get(destination, "")))
            if origin == destination or road is None:
                continue
            taken = arrives - leaves - _buffered(day, leaves, arrives)
            low, high = allowed(road)
            if not low <= taken <= high:
                yield f"day {number}: {taken} minutes from {origin} to {destination}, expected {low:g} to {high:g}"


def allowed(minutes: float) -> tuple[float, float]:
    """Five minutes less or more, or down and up to the next ten, whichever is wider."""
    return min(max(0.0, minutes - 5), minutes // 10 * 10), max(minutes + 5, math.ceil(minutes / 10) * 10)


def total_adds_up(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """The plan's total is at most BUDGET_ERROR of itself from the sum of its prices."""
    if plan.total is None:
        yield "no total"
    elif abs(cost(plan, trip) - plan.total) > BUDGET_ERROR * plan.total:
        yield f"the plan's total is {plan.total:g}, its prices make {cost(plan, trip):g}"


def cost(plan: Plan, trip: Trip) -> float:
    """What the plan's own prices make, for all travellers.

    Tickets per person, of rides between cities the first of each day, which is that of the whole journey; rooms for
    every night; a taxi per four people.
    """
    per_person = per_taxi = 0.0
    for day in plan.days:
        rides = [ride.cost for ride in day.of("travel_intercity_public") if ride.cost is not None]
        per_person += rides[0] if rides else 0.0
        per_person += sum(a.cost or 0.0 for a in (*day.of("meal"), *day.of("attraction")))
        per_taxi += sum(a.cost or 0.0 for a in day.of("travel_city"))
    nights = sum(day.hotel_price or 0.0 for day in plan.days[:-1])
    return per_person * trip.people + nights * trip.rooms + per_taxi * math.ceil(trip.people / PER_TAXI)


def _buffered(day: Day, leaves: int, arrives: int) -> int:
    """Minutes of the day's buffers that lie between the two."""
    minutes = 0
    for buffer in day.of("buffer"):
        if buffer.start is None or buffer.until is None:
            continue
        later = DAY_MINUTES if buffer.start < leaves else 0
        if leaves <= buffer.start + later and buffer.until + later <= arrives:
            minutes += buffer.until - buffer.start
    return minutes


def _start(activity: Activity) -> int:
    assert activity.start is not None
    return activity.start


def _until(activity: Activity) -> int:
    assert activity.until is not None
    return activity.until
