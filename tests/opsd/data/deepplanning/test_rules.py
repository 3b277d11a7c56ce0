"""Every rule both ways, on the made-up world's plan with a line changed: which rules break then, by hand."""

import pytest

from opsd.data.deepplanning.plan import read_plan
from opsd.data.deepplanning.scorer import DIMENSIONS, score_plan
from opsd.data.deepplanning.task import read_trip
from opsd.data.deepplanning.times import cost
from tests.opsd.data.deepplanning.world import META, PLAN, broken

NAMES = [rule.__name__ for rules in DIMENSIONS.values() for rule in rules]


def edited(*edits):
    plan = PLAN
    for old, new in edits:
        assert plan.count(old) == 1, old
        plan = plan.replace(old, new)
    return plan


def test_the_plan_of_task_0_keeps_all_21_rules(database):
    assert len(set(NAMES)) == 21 and broken(PLAN, database) == set()
    assert cost(read_plan(PLAN, database.names), read_trip(META)) == 1500


ACTIVITY = "20:00-20:10 | buffer | x\n"
HOTEL = "18:50-24:00 | hotel | Rest, Lake Hotel - South Gate\n"
GARDEN = "09:20-12:00 | attraction | Grand Garden, ¥30/person\n"
TOWER = "10:20-12:00 | attraction | Old Tower, ¥60/person\n"
PARK = "13:40-16:30 | attraction | River Park, ¥0\n"
NOODLES = "12:20-13:20 | meal | Lunch, Noodle House, Old Town, ¥50/person\n"
FISH = "17:20-18:30 | meal | Dinner, Fish Table, ¥80/person\n"
DUCK = "12:20-13:40 | meal | Lunch, Duck House (Tower Branch), ¥90/person\n"
OUT = "07:00-09:00 | travel_intercity_public | train G1, Alpha Station - Beta Station, ¥100/person\n"
BACK = "17:00-19:00 | travel_intercity_public | train G2, Beta Station - Alpha Station, ¥100/person\n"
WAIT = "14:00-17:00 | buffer | Waiting at the station\n"
CASES = {
    # Route consistency.
    "a day too few": ({"days": 3}, [], {"length"}),
    "leaves another city": (
        {}, [("from Alpha to Beta", "from Gamma to Beta")], {"closed_loop", "rides_between_cities", },
    ),
    "returns elsewhere": (
        {}, [("from Beta to Alpha", "from Beta to Gamma")], {"closed_loop", "rides_between_cities"},
    ),
    "brackets behind a city": (
        {"org": "Alpha (north)"}, [("from Alpha to Beta", "from Alpha (A) to Beta（b）")], set(),
    ),
    "another home": ({"org": "Gamma"}, [], {"closed_loop", "rides_between_cities"}),
    "no ride on the way out": ({}, [(OUT, "")], {"rides_between_cities", "total_adds_up"}),  # its 200 are missing
    "a ride from where one changes": (  # which the last of its lines in the file has as a station of Beta
        {}, [("Alpha Station - Beta Station", "Gamma Station - Beta Station")], {"rides_between_cities"},
    ),
    "a ride to another station of the city": (
        {}, [("Alpha Station - Beta Station", "Alpha Station - Beta Airport")], set(),
    ),
    "a ride from an unknown station": (
        {}, [("Alpha Station - Beta Station", "Delta Station - Beta Station")], {"rides_between_cities"},
    ),
    "a day in a city that was not gone to": (
        {}, [("from Beta to Alpha", "Alpha")],  # and with it a whole day, of one meal
        {"rides_between_cities", "enough_meals", "enough_attractions"},
    ),
    # Sandbox compliance.
    "a hotel's other price": ({}, [("¥300/room/night", "¥280/room/night")], {"known_hotels"}),
    "a hotel's price, rounded": ({}, [("¥300/room/night", "¥300.4/room/night")], set()),
    "a hotel without a price": ({}, [(", ¥300/room/night", "")], {"known_hotels", "total_adds_up"}),
    "an unknown hotel at night": (
        {}, [("Accommodation: Lake Hotel - South Gate", "Accommodation: Lake")],
        {"known_hotels"},
    ),
    "an unknown hotel in a line": (
        {}, [("hotel | Rest, Lake Hotel - South Gate", "hotel | Rest, Lake")],
        {"known_hotels"},
    ),
    "an unknown hotel in a line of the last day": (
        {}, [("Accommodation: -\n", "Accommodation: -\n08:00-09:00 | hotel | Check-out, Lake\n")], set(),
    ),
    "an unknown attraction": ({}, [("attraction | River Park", "attraction | The River Park")], {"known_attractions"}),
    "a ticket's other price": ({}, [("Garden, ¥30/person", "Garden, ¥31/person")], {"known_attractions"}),
    "a ticket without a price": ({}, [("River Park, ¥0", "River Park")], {"known_attractions"}),
    "a free ticket": ({}, [("River Park, ¥0", "River Park, Free")], set()),
    "a meal's other price": ({}, [("Fish Table, ¥80", "Fish Table, ¥88")], {"known_restaurants"}),
    "an unknown restaurant": ({}, [("Lunch, Duck House (Tower Branch)", "Lunch, Duck House")], {"known_restaurants"}),
    "a restaurant without a price in the database": (
        {}, [("Lunch, Duck House (Tower Branch), ¥90", "Lunch, Tea Room, ¥20")], set(),
    ),
    "a train's other price": (
        {}, [("Alpha Station - Beta Station, ¥100", "Alpha Station - Beta Station, ¥90")],
        {"known_rides"},
    ),
    "a train's price in another class": (
        {}, [("Alpha Station - Beta Station, ¥100", "Alpha Station - Beta Station, ¥160")],
        set(),
    ),
    "an unknown train": ({}, [("train G1", "train G3")], {"known_rides"}),
    "a train without a number": ({}, [("train G1,", "train,")], {"known_rides"}),
    "a train without a price": ({}, [("Beta Station, ¥100/person", "Beta Station")], {"known_rides", "total_adds_up"}),
    # Itinerary structure.
    "no accommodation": ({}, [("Lake Hotel - South Gate, ¥300/room/night", "-")], {"bed", "total_adds_up"}),
    "accommodation on the last day": ({}, [("Accommodation: -", "Accommodation: Hill Inn, ¥200/room/night")], {"bed"}),
    "no activity at the hotel": (
        {}, [(HOTEL, ""), ("09:20-10:00 | hotel | Check-in, Lake Hotel - South Gate", "09:20-10:00 | buffer | x")],
        {"bed", "ends_at_the_hotel", "ways_as_long_as_they_take"},  # for the tower is 20 minutes from the station
    ),
    "the day does not end at the hotel": (
        {}, [(HOTEL, HOTEL.replace("24:00", "20:00") + ACTIVITY)],
        {"ends_at_the_hotel"},
    ),
    "one meal after an early arrival": (
        {}, [(FISH, "")],
        {"enough_meals", "total_adds_up", "ways_as_long_as_they_take"},
    ),
    "meals too close": (
        {}, [(FISH, FISH.replace("17:20", "15:10"))],  # and during the park's visit, and before the table opens
        {"enough_meals", "one_at_a_time", "open_restaurants", "meals_of_a_sensible_length"},
    ),
    "no meal before a late departure": (
        {}, [(DUCK, "")],
        {"enough_meals", "total_adds_up", "ways_as_long_as_they_take"},
    ),
    "one meal after an arrival at 10": (
        {}, [(FISH, ""), ("07:00-09:00 | tr", "07:00-10:00 | tr")],
        {"one_at_a_time", "total_adds_up", "ways_as_long_as_they_take"},
    ),
    "a meal before a departure at 8:59": (
        {}, [("17:00-19:00 |", "08:59-11:00 |")], {"enough_meals", "one_at_a_time"},
    ),
    "a meal before a departure at 9:00": ({}, [("17:00-19:00 |", "09:00-11:00 |")], {"one_at_a_time"}),
    "no attraction after an early arrival": (
        {}, [(TOWER, ""), (PARK, "")], {"enough_attractions", "ways_as_long_as_they_take"},
    ),
    "no attraction after an arrival at 12": (
        {}, [(TOWER, ""), (PARK, ""), ("07:00-09:00 | tr", "07:00-12:00 | tr")],
        {"one_at_a_time", "ways_as_long_as_they_take"},
    ),
    "no attraction before a late departure": ({}, [(GARDEN, "")], {"enough_attractions"}),
    "no attraction before a departure at 16": (
        {}, [(GARDEN, ""), (BACK, BACK.replace("17:00", "16:00")), (WAIT, WAIT.replace("17:00", "16:00"))], set(),
    ),
    # Time feasibility.
    "an overlap, with a buffer that so is none of the next way": (
        {}, [(PARK, PARK.replace("16:30", "16:40"))], {"one_at_a_time", "ways_as_long_as_they_take"},
    ),
    "an overlap of a way": (
        {}, [("18:30-18:50 | travel_city", "18:20-18:50 | travel_city")], {"one_at_a_time"},
    ),
    "a gap beside a buffer": ({}, [(PARK, PARK.replace("16:30", "16:25"))], set()),  # 25 minutes of way, 20 to 25
    "a larger gap": ({}, [(PARK, PARK.replace("16:30", "16:24"))], {"ways_as_long_as_they_take"}),
    "a way that is too short": (
        {}, [(TOWER, TOWER.replace("12:00", "12:06"))], {"one_at_a_time", "ways_as_long_as_they_take"},
    ),
    "a gap at one place": (
        {}, [("09:20-10:00 | hotel", "09:20-09:30 | hotel | Rest, Lake Hotel - South Gate\n09:50-10:00 | hotel")],
        set(),
    ),
    "a way whose length is not known": (
        {}, [("train G2, Beta Station", "train G2, Gamma Station"), (WAIT, "")], set(),
    ),
    # Business hours.
    "a visit before the doors open": (
        {}, [(GARDEN, GARDEN.replace("09:20", "07:50"))],
        {"one_at_a_time", "open_attractions"},
    ),
    "a place that is always open": (
        {}, [(PARK, PARK.replace("13:40", "13:20"))],
        {"one_at_a_time", "ways_as_long_as_they_take"},
    ),
    "a closed day": (
        {}, [(GARDEN, GARDEN.replace("Grand Garden, ¥30", "Art Museum, ¥40"))],
        {"no_closed_days"},  # day 2 is a Thursday
    ),
    "no closed day, as it is not known which day it is": (
        {"depart_weekday": None}, [(GARDEN, GARDEN.replace("Grand Garden, ¥30", "Art Museum, ¥40"))], set(),
    ),
    "the week begins again": (
        {"depart_weekday": 7}, [(GARDEN, GARDEN.replace("Grand Garden, ¥30", "Old Tower, ¥60")), (TOWER, "")],
        {"no_closed_days", "ways_as_long_as_they_take"},
    ),
    "a place without opening hours": (
        {}, [(GARDEN, GARDEN.replace("Grand Garden, ¥30", "Hidden Cave, ¥30"))],
        {"open_attractions", "visits_as_long_as_advised"},  # and 13 minutes away, for which 20 are allowed
    ),
    "a meal before the kitchen opens": (
        {}, [(FISH, FISH.replace("17:20-18:30", "15:50-18:20"))],
        {"one_at_a_time", "open_restaurants", "ways_as_long_as_they_take"},
    ),
    "a visit without a time": (
        {}, [(GARDEN, GARDEN.replace("12:00", "12:75"))],
        {"open_attractions", "visits_as_long_as_advised"},
    ),
    # Duration rationality.
    "a visit that is too long": ({}, [(TOWER, TOWER.replace("10:20", "08:59")), ("09:20-10:00 | h", "08:00-08:39 | h")],
        {"one_at_a_time", "open_attractions", "visits_as_long_as_advised"}),
    "a visit as long as can be": ({}, [(GARDEN, GARDEN.replace("09:20", "08:00"))], {"one_at_a_time"}),
    "a visit as short as can be": (
        {}, [(GARDEN, "09:20-11:20 | attraction | Grand Garden, ¥30\n11:20-12:00 | buffer | x\n")], set(),
    ),
    "a visit that is too short": (
        {}, [(GARDEN, "09:20-11:19 | attraction | Grand Garden, ¥30\n11:19-12:00 | buffer | x\n")],
        {"visits_as_long_as_advised"},
    ),
    "a meal of 30 minutes": ({}, [(DUCK, DUCK.replace("13:40", "12:50") + "12:50-13:40 | buffer | x\n")], set()),
    "a meal of 29 minutes": (
        {}, [(DUCK, DUCK.replace("13:40", "12:49") + "12:49-13:40 | buffer | x\n")], {"meals_of_a_sensible_length"},
    ),
    "a meal of 151 minutes": (
        {}, [(DUCK, DUCK.replace("12:20", "11:09"))],
        {"one_at_a_time", "meals_of_a_sensible_length"},
    ),
    # Cost accuracy: 1,500 is at most a tenth of the total from it.
    "a total that is a tenth too small": ({}, [("Budget: 1500 RMB", "Budget: 1364 RMB")], set()),
    "a total that is more than that too small": ({}, [("Budget: 1500 RMB", "Budget: 1363 RMB")], {"total_adds_up"}),
    "a total that is too large": ({}, [("Budget: 1500 RMB", "Budget: 1,667 RMB")], {"total_adds_up"}),
    "no total": ({}, [("Total Estimated", "The")], {"total_adds_up"}),
    "five travellers in three rooms": (  # 5 * 510 + 3 * 300 + 2 * 180 = 3810
        {"people_number": 5, "room_number": 3}, [("Budget: 1500 RMB", "Budget: 3810 RMB")], set(),
    ),
    # Activity diversity.
    "a restaurant twice": (
        {}, [(DUCK, DUCK.replace("Duck House (Tower Branch), ¥90", "Noodle House, Old Town, ¥50"))],
        {"no_restaurant_twice"},
    ),
    "an attraction twice": (
        {}, [(GARDEN, GARDEN.replace("Grand Garden, ¥30", "River Park, ¥0"))], {"no_attraction_twice"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_changed_line_breaks_these_rules_and_no_others(case, database):
    meta, edits, expected = CASES[case]
    assert broken(edited(*edits), database, **meta) == expected


def test_every_rule_is_broken_by_a_case():
    assert {rule for _, _, rules in CASES.values() for rule in rules} == set(NAMES)


def test_what_is_wrong_is_said_in_words(reference):
    found = score_plan(edited(("Budget: 1500", "Budget: 1000"), ("Garden, ¥30", "Garden, ¥31")), reference)
    assert found.wrong["cost accuracy"] == ("the plan's total is 1000, its prices make 1502",)
    assert found.wrong["sandbox compliance"] == ("Grand Garden: 31, expected 30.4",)
