"""Rules of where the traveller is: the route between cities, and what a day must have by when one comes and goes.

As every rule: (plan, trip, database) -> what is wrong, in words; nothing where the rule is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from opsd.data.deepplanning.database import Database
from opsd.data.deepplanning.plan import Activity, Day, Plan, city_name
from opsd.data.deepplanning.task import Trip

MEAL_GAP = 120  # minutes from the first meal's end to the second's start, at least
FULL_DAY_MINUTES = 240  # of attractions and the ways to and from them; or two attractions


def length(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """As many days as the trip has."""
    if len(plan.days) != trip.days:
        yield f"{len(plan.days)} days, expected {trip.days}"


def closed_loop(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """A first day that leaves a city leaves home; a last day that goes to one goes home. Days in one city pass."""
    home, first, last = city_name(trip.org), plan.days[0].route, plan.days[-1].route
    if first and first[0] != home:
        yield f"day 1 leaves {first[0]}, expected {home}"
    if last and last[1] != home:
        yield f"day {len(plan.days)} goes to {last[1]}, expected {home}"


def rides_between_cities(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Every day begins where the last one ended, and a day "from A to B" has a ride from a station of A to one of B."""
    here = city_name(trip.org)
    for number, day in enumerate(plan.days, start=1):
        if day.route is None:
            if city_name(day.city) != here:
                yield f"day {number} is in {day.city or 'no city'}, expected {here}"
            continue
        if day.route[0] != here:
            yield f"day {number} leaves {day.route[0]}, expected {here}"
        rides = [(city_of(ride.origin, database), city_of(ride.destination, database)) for ride in _rides(day)]
        if day.route not in rides:
            yield f"day {number} has no ride from {day.route[0]} to {day.route[1]}, but {rides}"
        here = day.route[1]


def bed(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Every day but the last names its hotel and has an activity there; the last names none."""
    for number, day in enumerate(plan.days[:-1], start=1):
        if not day.hotel or not day.of("hotel"):
            yield f"day {number} lacks its accommodation or an activity at the hotel"
    if plan.days[-1].hotel:
        yield f"the last day stays at {plan.days[-1].hotel}"


def ends_at_the_hotel(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """The last activity of every day but the last."""
    for number, day in enumerate(plan.days[:-1], start=1):
        if not day.activities or day.activities[-1].kind != "hotel":
            yield f"day {number} does not end at the hotel"


def enough_meals(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Two meals on a day in one city; on another as many as the hours of arrival and departure leave time for."""
    here = home = city_name(trip.org)
    for number, day in enumerate(plan.days, start=1):
        meals = sorted(
            (meal.start, meal.end) for meal in day.of("meal") if meal.start is not None and meal.end is not None
        )
        bounds = _meal_bounds(day, here, home)
        for low, high in bounds:
            if len(meals) < low or (high is not None and len(meals) > high):
                yield f"day {number}: {len(meals)} meals, expected {low} to {'any' if high is None else high}"
        if len(meals) > 1 and any(high is None for _, high in bounds):
            gap = meals[1][0] - meals[0][1]
            if gap < MEAL_GAP:
                yield f"day {number}: {gap} minutes between two meals, expected {MEAL_GAP} or more"
        here = day.route[1] if day.route else here


def _meal_bounds(day: Day, here: str, home: str) -> list[tuple[int, int | None]]:
    """(fewest, most meals; None: any number) by each of departure and arrival that counts."""
    if day.route is None:
        return [(2, None)]
    origin, destination = day.route
    leaves, arrives = _minute_of_ride(day, "start"), _minute_of_ride(day, "end")
    bounds: list[tuple[int, int | None]] = []
    if origin == here != home and leaves is not None:
        bounds.append((0, 0) if leaves < 9 * 60 else (0, 1) if leaves < 15 * 60 else (1, None))
    if destination != home and arrives is not None:
        bounds.append((2, None) if arrives < 10 * 60 else (1, None) if arrives < 15 * 60 else (0, 1))
    return bounds


def enough_attractions(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Two, or four hours of them, on a day in one city; one on a day that arrives before 12 or leaves after 16."""
    here = home = city_name(trip.org)
    for number, day in enumerate(plan.days, start=1):
        count = len(day.of("attraction"))
        if day.route is None:
            if count < 2 and (minutes := _attraction_minutes(day)) < FULL_DAY_MINUTES:
                yield f"day {number}: {count} attractions and {minutes} minutes of them"
            continue
        origin, destination = day.route
        leaves, arrives = _minute_of_ride(day, "start"), _minute_of_ride(day, "end")
        late = origin == here != home and leaves is not None and leaves > 16 * 60
        early = destination != home and arrives is not None and arrives < 12 * 60
        if count < 1 and (late or early):
            yield f"day {number}: no attraction, though it {'leaves after 16:00' if late else 'arrives before 12:00'}"
        here = destination


def city_of(station: str, database: Database) -> str | None:
    """The city of a station or airport: that of its journeys, else its first two Chinese characters; None: unknown."""
    if station in database.cities:
        return city_name(database.cities[station])
    found = re.match(r"[\u4e00-\u9fa5]{2}", station)
    return found[0] if found else None


def _rides(day: Day) -> list[Activity]:
    return day.of("travel_intercity_public")


def _minute_of_ride(day: Day, end: str) -> int | None:
    """The day's first ride that has one: its "start" or "end"."""
    return next((at for ride in _rides(day) if (at := getattr(ride, end)) is not None), None)


def _attraction_minutes(day: Day) -> int:
    """Of the visits, and of the ways that begin or end at one."""
    places = {visit.name for visit in day.of("attraction")} - {""}
    ways = [way for way in day.of("travel_city") if {way.origin, way.destination} & places]
    return sum(a.until - a.start for a in (*day.of("attraction"), *ways) if a.start is not None and a.until is not None)
