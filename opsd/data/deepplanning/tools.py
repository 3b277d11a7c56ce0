"""The nine look-ups of DeepPlanning's travel tasks: tools.build=opsd.data.deepplanning.tools:build_tools.

They only read. An answer is a line that says what it is, then one row per line, each a JSON object with the columns of
the CSV file; where there are too many, whole rows are left out at the end, and the answer says how many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from opsd.data.deepplanning.database import Database, Row, number, open_database
from opsd.errors import ConfigError, DataError

SMALLEST_ANSWER = 500  # characters: below that a row of a hotel would not fit
ENOUGH_SEATS = "enough"  # where the file says nothing of the seats that are left

SEGMENT = (
    "dep_station_name", "dep_datetime", "arr_station_name", "arr_datetime", "duration", "seat_class",
)  # fmt: skip
TRAIN = ("train_no", "train_type", *SEGMENT)
FLIGHT = ("flight_no", "airline", *SEGMENT, "manufacturer", "equip_type", "equip_size")
HOTEL = (
    "name", "price", "hotel_star", "score", "brand", "decoration_time", "services", "address", "latitude", "longitude",
)  # fmt: skip
ATTRACTION = ("attraction_name", "attraction_type", "description")
ATTRACTION_DETAILS = (
    "attraction_name", "city", "attraction_type", "rating", "ticket_price", "opening_time", "closing_time",
    "closing_dates", "min_visit_hours", "max_visit_hours", "latitude", "longitude", "address", "description",
)  # fmt: skip
RESTAURANT = (
    "restaurant_name", "price_per_person", "cuisine", "rating", "opening_time", "closing_time", "tags",
    "nearby_attraction_name", "latitude", "longitude",
)  # fmt: skip
PLACE = ("poi_name", "latitude", "longitude")
ROUTE = ("origin", "destination", "distance_meters", "duration_minutes", "cost")

Arguments = Mapping[str, Any]
Shown = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LookUp:
    """One tool. `find` returns the rows that it shows; none: nothing was found."""

    find: Callable[[Database, Arguments], Shown]
    description: str
    needs: Mapping[str, str]  # argument -> what it is; all are text
    takes: Mapping[str, str] | None = None  # the same, of those that may be left out


def _rides(table: str, shown: tuple[str, ...]) -> Callable[[Database, Arguments], Shown]:
    """A row per journey: its segments, and the price per person of the whole, which its first segment has."""

    def find(database: Database, asked: Arguments) -> Shown:
        wanted = {
            "origin_city": asked["origin"],
            "destination_city": asked["destination"],
            "dep_date": asked["depDate"],
            "seat_class": asked.get("seatClassName"),
        }
        rows = sorted(_matching(database.rows(table), wanted), key=_place_in_journey)
        journeys = [list(segments) for _, segments in groupby(rows, key=lambda row: row["route_index"])]
        return [
            {
                "price": segments[0]["price"],
                "segments": [
                    {**_columns(row, shown), "seats_left": row["seat_status"] or ENOUGH_SEATS} for row in segments
                ],
            }
            for segments in journeys
        ]

    return find


def _place_in_journey(row: Row) -> tuple[float, str, float]:
    """By the number of the journey, and of the segment in it."""
    return number(row["route_index"]) or 0.0, row["route_index"], number(row["segment_index"]) or 0.0


def _of(table: str, shown: tuple[str, ...], **columns: str) -> Callable[[Database, Arguments], Shown]:
    """The rows whose columns are as asked for: column=argument."""

    def find(database: Database, asked: Arguments) -> Shown:
        wanted = {column: asked.get(argument) for column, argument in columns.items()}
        return [_columns(row, shown) for row in _matching(database.rows(table), wanted)]

    return find


def _first(find: Callable[[Database, Arguments], Shown]) -> Callable[[Database, Arguments], Shown]:
    """The first row alone: a restaurant has one for every place that it is near to."""
    return lambda database, asked: find(database, asked)[:1]


def _matching(rows: Sequence[Row], wanted: Mapping[str, str | None]) -> list[Row]:
    """Those with these values, letter for letter; a value that is not asked for, or empty, matches all."""
    asked = {column: str(value) for column, value in wanted.items() if value}
    return [row for row in rows if all(row[column] == value for column, value in asked.items())]


def _columns(row: Row, shown: tuple[str, ...]) -> dict[str, str]:
    return {name: row[name] for name in shown if row.get(name)}


NAME = "letter for letter as another tool's answer has it"
COORDINATE = "with all digits of the tool's answer"
RIDE_NEEDS = {"origin": "city of departure", "destination": "city of arrival", "depDate": "date, YYYY-MM-DD"}
SEAT = {"seatClassName": "seat class, as the answers name it; left out: all"}
POINT = "latitude,longitude, " + COORDINATE

LOOK_UPS = {
    "query_train_info": LookUp(
        find=_rides("trains", TRAIN),
        description="Trains between two cities on a day, direct or with changes: stations, times, minutes, seats left, "
        "and the price per person of the whole journey.",
        needs=RIDE_NEEDS,
        takes=SEAT,
    ),
    "query_flight_info": LookUp(
        find=_rides("flights", FLIGHT),
        description="Flights between two cities on a day, direct or with changes: airports, times, minutes, seats "
        "left, aircraft, and the price per person of the whole journey.",
        needs=RIDE_NEEDS,
        takes=SEAT,
    ),
    "query_hotel_info": LookUp(
        find=_of("hotels", HOTEL, hotel_star="hotelStar", brand="hotelBrands"),
        description="Hotels at the destination: price per room and night, stars, score, brand, services, coordinates.",
        needs={
            "destination": "city",
            "checkinDate": "date, YYYY-MM-DD",
            "checkoutDate": "date, YYYY-MM-DD",
        },
        takes={"hotelStar": "stars, 1 to 5", "hotelBrands": "one brand, as the answers name it"},
    ),
    "query_attraction_details": LookUp(
        find=_first(_of("attractions", ATTRACTION_DETAILS, attraction_name="attraction_name")),
        description="All about one attraction: ticket price, opening hours, closing days, advised hours of a visit.",
        needs={"attraction_name": f"the attraction, {NAME}"},
    ),
    "recommend_attractions": LookUp(
        find=_of("attractions", ATTRACTION, attraction_type="attraction_type"),
        description="The attractions of the destination, with their types and what they are.",
        needs={"city": "city"},
        takes={"attraction_type": "one type, as the answers name it; left out: all"},
    ),
    "search_location": LookUp(
        find=_first(_of("places", PLACE, poi_name="place_name")),
        description="The coordinates of a station, airport, hotel, attraction or restaurant.",
        needs={"place_name": f"the place, {NAME}"},
    ),
    "query_road_route_info": LookUp(
        find=_first(_of("routes", ROUTE, origin="origin", destination="destination")),
        description="The way between two places: metres, minutes, and the cost of a car for four. Up to two kilometres "
        "it is walked and costs nothing.",
        needs={"origin": POINT, "destination": POINT},
    ),
    "recommend_restaurants": LookUp(
        find=_of("restaurants", RESTAURANT, query_latitude="latitude", query_longitude="longitude"),
        description="Restaurants near a place: price per person, cuisine, rating, opening hours, what they offer.",
        needs={"latitude": COORDINATE, "longitude": COORDINATE},
    ),
    "query_restaurant_details": LookUp(
        find=_first(_of("restaurants", RESTAURANT, restaurant_name="restaurant_name")),
        description="All about one restaurant.",
        needs={"restaurant_name": f"the restaurant, {NAME}"},
    ),
}


class LookUpSession:
    """The look-ups in the database of one task."""

    def __init__(self, database: Database, max_answer_chars: int) -> None:
        self.database = database
        self.max_answer_chars = max_answer_chars

    def call(self, name: str, arguments: Arguments) -> str:
        """The answer's text. Raises ValueError for a tool or an argument that there is not."""
        if name not in LOOK_UPS:
            raise ValueError(f"there is no tool {name!r}, but {', '.join(LOOK_UPS)}")
        tool = LOOK_UPS[name]
        if missing := [need for need in tool.needs if not arguments.get(need)]:
            raise ValueError(f"{name} needs {', '.join(missing)}")
        rows = [json.dumps(row, ensure_ascii=False) for row in tool.find(self.database, arguments)]
        if not rows:
            asked = ", ".join(f"{key}={value}" for key, value in arguments.items())
            return f"Nothing found for {asked}. Names and coordinates must be as another tool's answer has them."
        return fitted(rows, self.max_answer_chars)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class LookUpTools:
    """What `build_tools` makes: schemas for the student, and a session for every trajectory."""

    max_answer_chars: int

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [schema(name, tool) for name, tool in LOOK_UPS.items()]

    def open(self, row: Mapping[str, Any]) -> LookUpSession:
        """The look-ups for a row of the prompt file. Raises DataError where it is no travel task's."""
        extra = row.get("extra_info")
        folder = extra.get("database") if isinstance(extra, Mapping) else None
        if not isinstance(folder, str):
            raise DataError("a row has no extra_info.database: it is none of DeepPlanning's (scripts/prepare_data.py)")
        return LookUpSession(open_database(folder), self.max_answer_chars)


def build_tools(max_answer_chars: int = 4096) -> LookUpTools:
    """The nine look-ups. `max_answer_chars`: of an answer, which loses whole rows beyond it. Raises ConfigError."""
    if (
        isinstance(max_answer_chars, bool)
        or not isinstance(max_answer_chars, int)
        or max_answer_chars < SMALLEST_ANSWER
    ):
        raise ConfigError(
            f"tools.options.max_answer_chars must be a whole number of at least {SMALLEST_ANSWER}, got "
            f"{max_answer_chars!r}"
        )
    return LookUpTools(max_answer_chars)


def schema(name: str, tool: LookUp) -> dict[str, Any]:
    """As chat templates take it."""
    arguments = {**tool.needs, **(tool.takes or {})}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": tool.description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": said} for key, said in arguments.items()},
                "required": list(tool.needs),
            },
        },
    }


def fitted(rows: Sequence[str], max_chars: int) -> str:
    """As many rows from the first as fit, whole, below a line that says how many there are and how many are shown."""
    shown = len(rows)
    while True:
        head = f"{len(rows)} found" + (f", the first {shown} are shown:" if shown < len(rows) else ":")
        text = "\n".join([head, *rows[:shown]])
        if len(text) <= max_chars or shown == 0:
            return text
        shown -= 1
