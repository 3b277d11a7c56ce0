"""Rules of what is visited: that it is in the database at that price, is open then, and takes as long as it should.

As every rule: (plan, trip, database) -> what is wrong, in words; nothing where the rule is kept. A name that the
database lacks is the concern of the first four alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from opsd.data.deepplanning.database import Database, Row, number
from opsd.data.deepplanning.plan import Activity, Plan, minute
from opsd.data.deepplanning.task import Trip

MEAL_MINUTES = (30, 150)  # shortest and longest
ALL_DAY = ("Open 24 Hours", "全天开放")
WEEKDAYS = {
    name: place
    for names in (
        ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
        ("周一", "周二", "周三", "周四", "周五", "周六", "周日"),
    )
    for place, name in enumerate(names, start=1)
}


def known_hotels(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Each night's hotel is known, at its price; the hotels of activities are, but for the last day's."""
    for day in plan.days:
        if day.hotel:
            yield from _known(day.hotel, day.hotel_price, database.hotels, "price")
    for day in plan.days[:-1]:
        yield from (
            f"{stay.name}: not in the database"
            for stay in day.of("hotel")
            if stay.name not in database.hotels and stay.name
        )


def known_attractions(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    for visit in _all(plan, "attraction"):
        yield from _known(visit.name, visit.cost, database.attractions, "ticket_price")


def known_restaurants(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    for meal in _all(plan, "meal"):
        yield from _known(meal.name, meal.cost, database.restaurants, "price_per_person")


def known_rides(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Each ride between cities says number, both ends and price; the number is known, at one of its prices."""
    for ride in _all(plan, "travel_intercity_public"):
        if not (ride.number and ride.origin and ride.destination) or ride.cost is None:
            yield f"{ride.number or 'a ride'}: expected its number, both stations and its price"
            continue
        prices = database.ride_prices.get(ride.number)
        if prices is None:
            yield f"{ride.number}: not in the database"
        elif prices and round(ride.cost) not in map(round, prices):
            yield f"{ride.number}: {ride.cost:g}, expected {' or '.join(f'{price:g}' for price in prices)}"


def open_attractions(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """A visit lies within the opening hours; where either cannot be read, it does not."""
    for visit, row in _in_database(plan, "attraction", database.attractions):
        hours = row["opening_time"], row["closing_time"]
        if set(hours) <= set(ALL_DAY):
            continue
        opens, closes = map(minute, hours)
        if visit.start is None or visit.end is None or opens is None or closes is None:
            yield f"{visit.name}: no opening hours, or no time"
        elif not within(visit.start, visit.end, opens, closes):
            yield f"{visit.name}: visited outside of {'-'.join(hours)}"


def open_restaurants(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """A meal lies within the opening hours; a restaurant whose hours cannot be read is open."""
    for meal, row in _in_database(plan, "meal", database.restaurants):
        opens, closes = minute(row["opening_time"]), minute(row["closing_time"])
        if meal.start is None or meal.end is None:
            yield f"{meal.name}: no time"
        elif opens is not None and closes is not None and not within(meal.start, meal.end, opens, closes):
            yield f"{meal.name}: a meal outside of {row['opening_time']}-{row['closing_time']}"


def no_closed_days(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """No attraction on a weekday on which it is closed."""
    if trip.weekday is None:
        return
    for place, day in enumerate(plan.days):
        weekday = (trip.weekday - 1 + place) % 7 + 1
        for visit in day.of("attraction"):
            closed = database.attractions.get(visit.name, {}).get("closing_dates", "")
            if weekday in {WEEKDAYS.get(name.strip().lower()) for name in closed.split(",")}:
                yield f"{visit.name}: closed on {closed}"


def visits_as_long_as_advised(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    """Between the shortest and the longest advised visit; where any of the three cannot be read, it is not."""
    for visit, row in _in_database(plan, "attraction", database.attractions):
        shortest, longest = number(row["min_visit_hours"]), number(row["max_visit_hours"])
        if visit.start is None or visit.until is None or shortest is None or longest is None:
            yield f"{visit.name}: no advised hours, or no time"
        elif not shortest <= (visit.until - visit.start) / 60 <= longest:
            yield f"{visit.name}: {(visit.until - visit.start) / 60:g} h, expected {shortest:g} to {longest:g}"


def meals_of_a_sensible_length(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    for meal in _all(plan, "meal"):
        if not meal.name:
            continue
        if meal.start is None or meal.until is None:
            yield f"{meal.name}: no time"
        elif not MEAL_MINUTES[0] <= meal.until - meal.start <= MEAL_MINUTES[1]:
            yield f"{meal.name}: {meal.until - meal.start} minutes"


def no_restaurant_twice(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    yield from _twice(plan, "meal")


def no_attraction_twice(plan: Plan, trip: Trip, database: Database) -> Iterator[str]:
    yield from _twice(plan, "attraction")


def within(start: int, end: int, opens: int, closes: int) -> bool:
    """Does start..end lie within opens..closes, in minutes of the day, where either may pass midnight?

    Where only the opening hours do, both ends must lie on the same side of midnight.
    """
    if opens <= closes:
        return start <= end and opens <= start and end <= closes
    if end < start:
        return start >= opens and end <= closes
    return start >= opens or end <= closes


def _known(name: str, price: float | None, rows: dict[str, Row], column: str) -> Iterator[str]:
    """A price in the database that is none is not compared; prices are compared as whole numbers."""
    if name not in rows:
        yield f"{name or 'no name'}: not in the database"
        return
    expected = number(rows[name][column])
    if expected is not None and (price is None or round(price) != round(expected)):
        yield f"{name}: {'no price' if price is None else f'{price:g}'}, expected {expected:g}"


def _all(plan: Plan, kind: str) -> list[Activity]:
    return [activity for day in plan.days for activity in day.of(kind)]


def _in_database(plan: Plan, kind: str, rows: dict[str, Row]) -> list[tuple[Activity, Row]]:
    return [(activity, rows[activity.name]) for activity in _all(plan, kind) if activity.name in rows]


def _twice(plan: Plan, kind: str) -> Iterator[str]:
    times = Counter(activity.name for activity in _all(plan, kind) if activity.name)
    yield from (f"{name}: {count} times" for name, count in times.items() if count > 1)
