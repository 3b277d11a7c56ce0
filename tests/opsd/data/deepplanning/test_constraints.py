"""Hard constraints both ways, days in one city, and the numbers behind the rules, by hand."""

import pytest

from opsd.data.deepplanning.places import within
from opsd.data.deepplanning.plan import minute, read_plan
from opsd.data.deepplanning.scorer import is_met
from opsd.data.deepplanning.task import read_trip
from opsd.data.deepplanning.times import allowed, cost
from tests.opsd.data.deepplanning.world import META, PLAN, broken


def one_day(*lines, city="Alpha"):
    return "\n".join(["Day 1:", f"Current City: {city}", "Accommodation: -", *lines])


LUNCH, LATE = "11:00-12:00 | meal | Lunch, A, ¥1", "14:00-15:00 | meal | Dinner, B, ¥1"
VISIT, OTHER = "08:00-10:00 | attraction | A, ¥1", "15:00-16:00 | attraction | B, ¥1"
WAY = "10:00-12:00 | travel_city | A - C, 9km, 120min, ¥1"


@pytest.mark.parametrize(
    ("lines", "rule", "kept"),
    [
        ([LUNCH, LATE], "enough_meals", True),
        ([LUNCH], "enough_meals", False),
        ([LUNCH, LATE.replace("14:00", "13:59")], "enough_meals", False),
        ([LUNCH, LATE, "15:00-16:00 | meal | Dinner, C, ¥1"], "enough_meals", True),  # the first two are looked at
        ([VISIT, OTHER], "enough_attractions", True),
        ([VISIT], "enough_attractions", False),
        ([VISIT, WAY], "enough_attractions", True),  # four hours with the way
        ([VISIT, WAY.replace("12:00", "11:59")], "enough_attractions", False),
        ([VISIT, WAY.replace("A - C", "C - A")], "enough_attractions", True),
        ([VISIT, WAY.replace("A - C", "B - C")], "enough_attractions", False),
        ([VISIT.replace("A, ¥1", ""), WAY.replace("A - C", "around")], "enough_attractions", False),
    ],
)
def test_a_day_in_one_city(lines, rule, kept, database):
    assert (rule not in broken(one_day(*lines), database, days=1)) == kept


MEALS = ("11:00-11:30 | meal | Lunch, A, ¥1", "13:30-14:00 | meal | Dinner, B, ¥1")


@pytest.mark.parametrize(
    ("out", "back", "meals", "kept"),
    [
        ("07:00-09:59", "08:00-09:00", (2, 0), True),
        ("07:00-09:59", "08:00-09:00", (1, 0), False),
        ("07:00-10:00", "08:00-09:00", (1, 0), True),
        ("07:00-10:00", "08:00-09:00", (2, 0), True),
        ("07:00-14:59", "08:00-09:00", (0, 0), False),
        ("07:00-15:00", "08:00-09:00", (0, 0), True),
        ("07:00-15:00", "08:00-09:00", (1, 0), True),  # home may be left before 9 with a meal
        ("07:00-15:00", "08:00-09:00", (2, 0), False),
        ("07:00-15:00", "08:59-09:30", (0, 1), False),
        ("07:00-15:00", "09:00-09:30", (0, 1), True),
        ("07:00-15:00", "09:00-09:30", (0, 0), True),
        ("07:00-15:00", "14:59-17:00", (0, 2), False),
        ("07:00-15:00", "15:00-17:00", (0, 2), True),  # nor does it count when home is reached
        ("07:00-15:00", "15:00-17:00", (0, 0), False),
    ],
)
def test_meals_by_the_hours_of_arrival_and_departure(out, back, meals, kept, database):
    lines = [MEALS[:count] for count in meals]
    assert ("enough_meals" not in broken(there_and_back(out, back, *lines), database)) == kept


@pytest.mark.parametrize(
    ("out", "back", "kept"),
    [
        ("07:00-11:59", "15:00-17:00", False),
        ("07:00-12:00", "15:00-17:00", True),
        ("07:00-12:00", "16:00-17:00", True),
        ("07:00-12:00", "16:01-17:00", False),
        ("17:00-20:00", "08:00-10:00", True),  # hours at home count for nothing
    ],
)
def test_attractions_by_the_hours_of_arrival_and_departure(out, back, kept, database):
    assert ("enough_attractions" not in broken(there_and_back(out, back, (), ()), database)) == kept


def there_and_back(out, back, first, second):
    lines = []
    for number, (route, slot, more) in enumerate(
        (("from Alpha to Beta", out, first), ("from Beta to Alpha", back, second)), start=1
    ):
        ride = f"{slot} | travel_intercity_public | train G1, A - B, ¥1"
        lines += [f"Day {number}:", f"Current City: {route}", ride, *more]
    return "\n".join(lines)


def test_the_sum_of_a_plans_prices(database):
    plan = read_plan(PLAN, database.names)
    for people, rooms, expected in ((1, 1, 990), (4, 2, 2820), (5, 3, 3810)):  # 510 each, 300 a room, 180 per taxi
        assert cost(plan, read_trip({**META, "people_number": people, "room_number": rooms})) == expected
    leg = "07:00-09:00 | travel_intercity_public | train G1, Alpha Station - Beta Station, ¥100/person\n"
    assert (
        cost(read_plan(PLAN.replace(leg, 2 * leg), database.names), read_trip(META)) == 1500
    )  # a journey has one price
    trip = read_trip({"org": "Alpha", "days": 2})
    assert (trip.people, trip.rooms, trip.weekday, trip.constraints) == (1, 1, None, {})


@pytest.mark.parametrize(
    ("hours", "opens", "closes", "expected"),
    [
        ("09:00-17:00", "09:00", "17:00", True),
        ("08:59-10:00", "09:00", "17:00", False),
        ("16:00-17:01", "09:00", "17:00", False),
        ("16:00-01:00", "09:00", "17:00", False),
        ("22:00-01:00", "16:30", "02:00", True),
        ("22:00-02:01", "16:30", "02:00", False),
        ("16:30-23:00", "16:30", "02:00", True),
        ("00:30-02:00", "16:30", "02:00", True),
        ("12:00-17:00", "16:30", "02:00", False),
        ("20:00-24:00", "10:00", "24:00", True),
    ],
)
def test_opening_hours_by_hand(hours, opens, closes, expected):
    start, end = map(minute, hours.split("-"))
    assert within(start, end, minute(opens), minute(closes)) is expected


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [(20, (15, 25)), (3, (0, 10)), (18, (10, 23)), (9, (0, 14)), (11, (6, 20)), (90, (85, 95)), (0, (0, 5))],
)
def test_how_long_a_way_may_take(minutes, expected):
    assert allowed(minutes) == expected


def test_a_stay_past_midnight_is_followed_by_the_next_mornings_way(database):
    """As where a night's hotel comes before an early visit in one day's lines: 30 minutes of gap, 20 of way."""
    lines = ["22:00-06:00 | hotel | Rest, Hill Inn", "{} | buffer | x", "06:30-08:00 | attraction | River Park, ¥0"]
    for buffer, kept in (("06:00-06:10", True), ("06:10-06:12", False)):
        plan = one_day(*lines).format(buffer)
        assert ("ways_as_long_as_they_take" not in broken(plan, database, days=1)) == kept


@pytest.mark.parametrize(
    ("name", "fields", "met"),
    [
        ("train_seat_class", {"outbound_train_no": "G1", "inbound_train_no": "G2"}, True),
        ("train_latest_arrival_direct", {"inbound_train_no": "G4"}, False),
        ("train_seat_class", {"outbound_train_no": "G1", "inbound_train_no": "G4"}, False),
        ("flight_cheapest_direct", {"outbound_flight_no": "G1"}, False),  # it is a train
        ("hotel_highest_rated", {"hotel_name": "Lake Hotel - South Gate"}, True),
        ("hotel_highest_rated", {"hotel_name": "Hill Inn"}, False),
        ("restaurant_must_eat_named", {"restaurant_name": "Noodle House, Old Town"}, True),
        ("restaurant_must_eat_named", {"restaurant_name": "Tea Room"}, False),
        ("attraction_all_of_type", {"attraction_names": ["Grand Garden", "River Park"]}, True),
        ("attraction_all_of_type", {"attraction_names": ["Grand Garden", "Night Market"]}, False),
        ("budget_constraint", {"max_budget": 1500}, True),
        ("budget_constraint", {"max_budget": 1499.5}, False),
    ],
)
def test_hard_constraints_both_ways(name, fields, met, database):
    trip = read_trip({**META, "hard_constraints": {name: fields}})
    assert is_met(name, fields, read_plan(PLAN, database.names), trip) is met


def test_a_flight_counts_as_one(database):
    plan = read_plan(PLAN.replace("train G1, Alpha Station - Beta Station", "Flight F10, Alpha Airport - Beta Airport"))
    fields = {"outbound_flight_no": "F10"}
    assert is_met("flight_cheapest_direct", fields, plan, read_trip(META))
    assert not is_met("train_cheapest_direct", {"outbound_train_no": "F10"}, plan, read_trip(META))
