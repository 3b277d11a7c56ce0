"""Lines of a plan as models write them, and what is read of them."""

import pytest

from opsd.data.deepplanning.plan import Activity, minute, part_route, plan_text, price_of, read_plan
from tests.opsd.data.deepplanning.world import PLAN


def activity(line, known=frozenset()):
    [day] = read_plan(f"Day 1:\n{line}", known).days
    [found] = day.activities
    return found


def at(start, end, kind, **fields):
    return Activity(kind=kind, start=start * 60, end=end * 60, **fields)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "07:00-09:00 | travel_intercity_public | flight CA1234, Alpha Airport - Beta Airport, ¥650/person",
            at(7, 9, "travel_intercity_public", mode="flight", number="CA1234", origin="Alpha Airport",
               destination="Beta Airport", cost=650),
        ),
        (
            "07:00-09:00 | travel_intercity_public | 高铁 G12，上海虹桥站 - 北京南站，￥650.5/人",
            at(7, 9, "travel_intercity_public", mode="高铁", number="G12", origin="上海虹桥站", destination="北京南站",
               cost=650.5),
        ),
        (
            "7:00-09:00 | travel_city | A - B, 30km, 1h20min, ¥100",
            at(7, 9, "travel_city", origin="A", destination="B", cost=100),
        ),
        (
            "07:00-09:00 | travel_city | A → B，3公里，10分钟，免费",
            at(7, 9, "travel_city", origin="A", destination="B", cost=0),
        ),
        ("07:00-09:00 | travel_city | somewhere, ¥5", at(7, 9, "travel_city", cost=5)),
        (
            "07:00-09:00 | attraction | The Park, North Gate, ¥60/person",
            at(7, 9, "attraction", name="The Park, North Gate", cost=60),
        ),
        ("07:00-09:00 | attraction | Hall 1912", at(7, 9, "attraction", name="Hall 1912")),
        ("07:00-09:00 | meal | Lunch, 1912, ¥1,050/person", at(7, 9, "meal", name="1912", cost=1050)),
        (
            "07:00-09:00 | meal | 晚餐，全聚德（王府井店），￥100/人",
            at(7, 9, "meal", name="全聚德（王府井店）", cost=100),
        ),
        ("07:00-09:00 | meal | Cafe, Bar & Grill, 80 RMB", at(7, 9, "meal", name="Cafe, Bar & Grill", cost=80)),
        ("07:00-09:00 | hotel | Check-in, Inn, West", at(7, 9, "hotel", name="Inn, West")),
        ("07:00-09:00 | hotel | Rest", at(7, 9, "hotel")),
        ("07:00-09:00 | buffer | Security check, waiting", at(7, 9, "buffer")),
        ("07:00-09:00 | Shopping | Mall, ¥5", at(7, 9, "shopping", name="Mall", cost=5)),
        ("- **07:00 – 09:00** ｜ hotel ｜ Rest, Inn", at(7, 9, "hotel", name="Inn")),
    ],
)  # fmt: skip
def test_a_line_is_read(line, expected):
    assert activity(line) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("00:00", 0), ("9:05", 545), ("23:59", 1439), ("24:00", 1439), ("24:01", None), ("09:60", None), ("9", None)],
)
def test_a_minute_of_the_day(text, expected):
    assert minute(text) == expected


def test_what_passes_midnight_ends_on_the_next_day():
    assert activity("22:00-06:00 | hotel | Rest, A").until == 30 * 60
    assert activity("22:00-25:00 | hotel | Rest, A").until is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("¥60/person", 60), ("￥1000/间/晚", 1000), ("¥300/room/night", 300), ("60 RMB per person", 60), ("0", 0),
        ("¥ 12.5", 12.5), ("120元/人", 120), ("Free", 0), ("ask", None), ("¥60 (two)", None), ("", None),
    ],
)  # fmt: skip
def test_a_price(text, expected):
    assert price_of(text) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ((), ("A", "B - C - D")),
        (("A - B", "C - D"), ("A - B", "C - D")),
        (("A - B - C",), ("A - B - C", "D")),
        (("D",), ("A - B - C", "D")),
    ],
)
def test_a_route_is_parted_where_its_ends_are_known(known, expected):
    assert part_route("A - B - C - D", known) == expected


def test_days_heads_and_the_budget():
    plan = read_plan(PLAN)
    assert [(day.city, day.hotel, day.hotel_price, len(day.activities)) for day in plan.days] == [
        ("from Alpha to Beta", "Lake Hotel - South Gate", 300, 14), ("from Beta to Alpha", "", None, 7),
    ]  # fmt: skip
    assert [day.route for day in plan.days] == [("Alpha", "Beta"), ("Beta", "Alpha")]
    assert plan.total == 1500 and plan.unread == []


@pytest.mark.parametrize(
    "head", ["### Day 12:", "**Day 1:**", "Day 1 (Wednesday):", "第1天：", "Day 1: 2025-11-12", "day 1"]
)
def test_a_day_s_head(head):
    assert len(read_plan(head).days) == 1


def test_a_budget_before_the_days_and_one_by_day_are_no_days():
    budget = "Budget Summary:\nDay 1: 300 RMB\nAccommodation: 300 RMB\nTotal Estimated Budget: ¥1,300\n"
    for text in (budget + PLAN.partition("**Budget")[0], PLAN.partition("**Budget")[0] + budget):
        plan = read_plan(text)
        assert len(plan.days) == 2 and plan.days[1].hotel == "" and plan.total == 1300


def test_what_has_a_time_and_cannot_be_read_is_counted():
    plan = read_plan("08:00-09:00 | buffer | before any day\nDay 1:\n09:00 wake up\n09:00-10:00 breakfast\nat 9:00 go")
    assert [day.activities for day in plan.days] == [[]]
    assert plan.unread == ["08:00-09:00 | buffer | before any day", "09:00 wake up", "09:00-10:00 breakfast"]
    assert len(read_plan("Day 1:\n" + "Z" * 1001).unread) == 1


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Here it is: <plan>\nA\n</plan>", "A"),
        ("<PLAN>A</PLAN> and <plan>B</plan>", "A\n\nB"),
        ("<plan>draft</plan><tool_call>{}</tool_call><tool_response>1</tool_response><plan>A</plan>", "A"),
        ("<plan>draft</plan><tool_call>{}</tool_call><tool_response>1</tool_response>no more", None),
        ("<plan>A</plan><tool_call>{}</tool_call>", None),  # it waits for an answer
        ("<plan>A", None),
        ("<plan>one <plan>A</plan> and</plan>", "one <plan>A"),
        ("<plan> </plan>", None),
        ("", None),
    ],
)
def test_the_plan_of_the_last_turn(response, expected):
    assert plan_text(response) == expected
