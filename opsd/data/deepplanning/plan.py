"""A travel plan as a student writes it, read line by line: no model interprets it, so a line is read or it is not.

    Day 1:
    Current City: from A to B
    Accommodation: HOTEL, ¥300/room/night
    07:00-09:00 | travel_intercity_public | train G1, STATION - STATION, ¥100/person
    09:00-09:30 | travel_city | STATION - PLACE, 5km, 30min, ¥20
    ...
    Total Estimated Budget: 1234 RMB

Full-width commas and bars, other dashes, list marks and bold are read as what they stand for; names are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field

DAY_MINUTES = 24 * 60
LONGEST_LINE = 1000  # characters; a longer one is none of a plan, and would keep the expressions below busy
_LINE = re.compile(
    r"(?P<start>\d{1,2}:\d{2})\s*[-–—~]\s*(?P<end>\d{1,2}:\d{2})\s*[|｜]\s*(?P<kind>\w+)\s*[|｜]\s*(?P<details>.*)"
)
_TIMED = re.compile(r"\d{1,2}:\d{2}")
_MARKS = re.compile(r"^[\s#>*•-]+|\*\*|\s+$")  # of Markdown; a line of a plan begins with none of them
# Alone in its line, or with a date or brackets: "Day 1: 300 RMB" is of the budget.
_DAY = re.compile(
    r"(?:day\s*\d+|第\s*\d+\s*天)\s*(?:[:：]\s*)?(?:[(（].*[)）]|\d{4}-\d{2}-\d{2})?\s*[:：]?", re.IGNORECASE
)
_CITY = re.compile(r"current city\s*[:：]\s*(.*)", re.IGNORECASE)
_HOTEL = re.compile(r"accommodation\s*[:：]\s*(.*)", re.IGNORECASE)
_TOTAL = re.compile(r"total estimated budget\s*[:：]\s*(.*)", re.IGNORECASE)
_ROUTE = re.compile(r"from\s+(.+?)\s+to\s+([^,，]+)", re.IGNORECASE)
_BRACKETS = re.compile(r"[（(].*?[)）]")
_COMMA = re.compile(r"\s*[,，]\s*")
_LAST_FIELD = re.compile(r"\s*[,，]\s*([^,，]*)$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MONEY = re.compile(r"[¥￥]\s*\d[\d,]*|\d[\d,]*(?=(?:\.\d+)?\s*(?:元|RMB|CNY|yuan))", re.IGNORECASE)
_PRICE = re.compile(
    r"(?:[¥￥]|RMB|CNY)?\s*(?P<amount>\d+(?:\.\d+)?)\s*(?:元|RMB|CNY|yuan)?(?:\s*(?:/|per\s)\s*[^\s/]+)*", re.IGNORECASE
)
_FREE = re.compile(r"free|免费", re.IGNORECASE)
_MEASURE = re.compile(
    r"[~约]?(?:\s*\d+(?:\.\d+)?\s*(?:km|m|met(?:er|re)s?|公里|千米|米|min(?:ute)?s?|分钟|h|hrs?|hours?|小时))+",
    re.IGNORECASE,
)
_DASH = re.compile(r"\s+[-–—]\s+|\s*→\s*")
_TAG = re.compile(r"</?plan>", re.IGNORECASE)
_NONE = ("", "-", "–", "—")
_MEALS = ("breakfast", "lunch", "dinner", "早餐", "午餐", "晚餐")
_FINAL = "</tool_response>"  # what a template for tools puts after their last answer: what follows is the last turn
_CALL = "<tool_call>"


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One line with a time. What its kind does not have is empty."""

    kind: str  # travel_intercity_public | travel_city | attraction | meal | hotel | buffer, or what the line says
    start: int | None = None  # minute of the day, 24:00 being 23:59; None: it is no time
    end: int | None = None
    name: str = ""  # of an attraction, a restaurant or a hotel
    cost: float | None = None  # as written: per person, or per car; None: no price is there
    mode: str = ""  # "flight" or "train", in small letters
    number: str = ""  # of the flight or train
    origin: str = ""
    destination: str = ""

    @property
    def until(self) -> int | None:
        """`end`, counted on from the start's midnight: beyond 24 h where the activity goes on past the next."""
        if self.start is None or self.end is None:
            return None
        return self.end + DAY_MINUTES if self.end < self.start else self.end


@dataclass(kw_only=True)
class Day:
    """One day of a plan."""

    city: str = ""  # as the line "Current City" has it
    hotel: str = ""  # empty: none
    hotel_price: float | None = None  # a room and night
    activities: list[Activity] = field(default_factory=list)

    @property
    def route(self) -> tuple[str, str] | None:
        """(from, to) of "from A to B"; None: the day is spent in one city."""
        found = _ROUTE.search(self.city)
        return (city_name(found[1]), city_name(found[2])) if found else None

    def of(self, kind: str) -> list[Activity]:
        return [activity for activity in self.activities if activity.kind == kind]


@dataclass(kw_only=True)
class Plan:
    """What could be read of a plan."""

    days: list[Day] = field(default_factory=list)
    total: float | None = None  # the estimated budget; None: there is none
    unread: list[str] = field(default_factory=list)  # lines with a time that are no activity or of no day, or too long


def city_name(text: str) -> str:
    """A city without what stands in brackets behind it."""
    return _BRACKETS.sub("", text).strip()


def plan_text(response: str) -> str | None:
    """What stands between <plan> and </plan> in the last turn, several blocks joined; None: it is no final answer.

    A turn that calls a tool is none, nor one without a closed block.
    """
    last_turn = response.rpartition(_FINAL)[2]
    if _CALL in last_turn:
        return None
    blocks, begin = [], None
    for tag in _TAG.finditer(last_turn):
        if not tag[0].startswith("</"):
            begin = tag.end() if begin is None else begin
        elif begin is not None:
            blocks.append(last_turn[begin : tag.start()].strip())
            begin = None
    return "\n\n".join(block for block in blocks if block) or None


def read_plan(text: str, known: Container[str] = frozenset()) -> Plan:
    """The plan. `known`: names that tell where "A - B - C" is to be parted, where a name has a dash in it."""
    plan = Plan()
    day: Day | None = None
    for line in text.splitlines():
        if len(line) > LONGEST_LINE:
            plan.unread.append(line)
            continue
        line = _MONEY.sub(lambda money: _THOUSANDS.sub("", money[0]), _MARKS.sub("", line))
        if found := _LINE.match(line):
            if day is None:
                plan.unread.append(line)
            else:
                day.activities.append(_activity(found, known))
        elif _TIMED.match(line):
            plan.unread.append(line)
        elif _DAY.fullmatch(line):
            day = Day()
            plan.days.append(day)
        elif found := _TOTAL.match(line):
            plan.total = _first_amount(found[1])
        elif day is not None and not day.activities:  # the budget's summary has lines that begin as a head does
            _read_head(day, line)
    return plan


def _read_head(day: Day, line: str) -> None:
    """A line between the day's number and its first activity."""
    if found := _CITY.match(line):
        day.city = found[1].strip()
    elif found := _HOTEL.match(line):
        day.hotel, day.hotel_price = _name_and_price(found[1])


def _activity(line: re.Match[str], known: Container[str]) -> Activity:
    kind = line["kind"].lower()
    start, end, details = minute(line["start"]), minute(line["end"]), line["details"].strip()
    if kind == "travel_city":
        road, cost = _without_measures(details)
        origin, destination = part_route(road, known)
        return Activity(kind=kind, start=start, end=end, cost=cost, origin=origin, destination=destination)
    if kind == "travel_intercity_public":
        ride, cost = _without_measures(details)
        first, _, road = _parted(ride)
        mode, _, number = first.partition(" ")
        origin, destination = part_route(road, known)
        return Activity(
            kind=kind, start=start, end=end, cost=cost, origin=origin, destination=destination, mode=mode.lower(),
            number=number.split()[0] if number.split() else "",
        )  # fmt: skip
    name, cost = _name_and_price(details)
    first, comma, rest = _parted(name)
    if kind == "hotel" or (kind == "meal" and first.lower() in _MEALS):
        name = rest if comma else ""
    return Activity(kind=kind, start=start, end=end, cost=cost, name="" if kind == "buffer" else name)


def minute(text: str) -> int | None:
    """Minute of the day of "HH:MM", 24:00 being 23:59 as the public scorer has it; None: it is no such time."""
    found = re.fullmatch(r"(\d{1,2}):(\d{2})", text.strip())
    if not found:
        return None
    hours, minutes = int(found[1]), int(found[2])
    if (hours, minutes) == (24, 0):
        return DAY_MINUTES - 1
    return hours * 60 + minutes if hours < 24 and minutes < 60 else None


def part_route(road: str, known: Container[str] = frozenset()) -> tuple[str, str]:
    """The two ends of "A - B": at the first dash that leaves most known names on its sides. ("", ""): it has none."""
    ends = [(road[: dash.start()].strip(), road[dash.end() :].strip()) for dash in _DASH.finditer(road)]
    return max(ends, key=lambda pair: sum(end in known for end in pair), default=("", ""))


def price_of(text: str) -> float | None:
    """¥60/person, 60 RMB, ￥1000/间/晚, 60 or Free; None: it is no price."""
    text = text.strip()
    if _FREE.fullmatch(text):
        return 0.0
    found = _PRICE.fullmatch(text)
    return float(found["amount"]) if found else None


def _first_amount(text: str) -> float | None:
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def _parted(text: str) -> tuple[str, bool, str]:
    """(before the first comma, is there one, behind it)"""
    parts = _COMMA.split(text, maxsplit=1)
    return (parts[0].strip(), True, parts[1].strip()) if len(parts) == 2 else (text.strip(), False, "")


def _name_and_price(text: str) -> tuple[str, float | None]:
    """A name, which may hold commas, and the price in the last field."""
    text = text.strip()
    if text in _NONE:
        return "", None
    last = _LAST_FIELD.search(text)
    price = price_of(last[1]) if last else None
    return (text, None) if last is None or price is None else (text[: last.start()].strip(), price)


def _without_measures(text: str) -> tuple[str, float | None]:
    """What stands before the distance, the time and the price, and the price."""
    cost = None
    while last := _LAST_FIELD.search(text):
        price = price_of(last[1])
        if price is None and not _MEASURE.fullmatch(last[1].strip()):
            break
        cost = price if cost is None else cost
        text = text[: last.start()]
    return text.strip(), cost
