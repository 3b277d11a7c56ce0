"""The nine look-ups answer from a task's files, and lose whole rows where an answer is too long."""

import json

import pytest

from opsd.agents.runner import ToolRunner
from opsd.agents.tools import ToolCall
from opsd.data.deepplanning.tools import LOOK_UPS, build_tools
from opsd.errors import ConfigError, DataError


@pytest.fixture
def session(prepared):
    return build_tools().open(prepared[0])


def found(answer):
    """The rows of an answer; its first line says how many there are."""
    head, *lines = answer.splitlines()
    assert head == f"{len(lines)} found:"
    return [json.loads(line) for line in lines]


STAY = {"destination": "Beta", "checkinDate": "2025-11-12", "checkoutDate": "2025-11-13"}


@pytest.mark.parametrize(
    ("tool", "arguments", "column", "expected"),
    [
        ("query_hotel_info", STAY, "name", ["Lake Hotel - South Gate", "Hill Inn"]),
        ("query_hotel_info", {**STAY, "hotelStar": "2"}, "name", ["Hill Inn"]),
        ("query_hotel_info", {**STAY, "hotelStar": 2}, "name", ["Hill Inn"]),
        ("query_hotel_info", {**STAY, "hotelBrands": "Lake"}, "services", ["Gym;Swimming Pool"]),
        ("query_attraction_details", {"attraction_name": "Old Tower"}, "ticket_price", ["60"]),
        ("recommend_attractions", {"city": "Beta", "attraction_type": "Natural Scenery"}, "attraction_name",
         ["River Park", "Grand Garden"]),
        ("search_location", {"place_name": "Beta Station"}, "latitude", ["30.120000"]),
        ("query_road_route_info", {"origin": "30.000000,120.000000", "destination": "30.020000,120.020000"},
         "duration_minutes", ["20.0"]),
        ("recommend_restaurants", {"latitude": "30.030000", "longitude": "120.030000"}, "restaurant_name",
         ["Noodle House, Old Town", "Fish Table"]),
        ("query_restaurant_details", {"restaurant_name": "Noodle House, Old Town"}, "tags", ["Private Room;Parking"]),
    ],
)  # fmt: skip
def test_a_look_up_finds_what_the_files_hold(session, tool, arguments, column, expected):
    assert [row[column] for row in found(session.call(tool, arguments))] == expected


RIDE = {"origin": "Alpha", "destination": "Beta", "depDate": "2025-11-12"}


def test_a_journey_is_a_row_with_its_segments_and_the_price_of_the_whole(session):
    rows = found(session.call("query_train_info", RIDE))
    assert [(row["price"], [s["train_no"] for s in row["segments"]]) for row in rows] == [
        ("100.4", ["G1"]), ("160.0", ["G1"]), ("80", ["D5", "D6"]),
    ]  # fmt: skip
    assert [s["seats_left"] for row in rows for s in row["segments"]] == ["6", "3", "enough", "enough"]
    [first] = found(session.call("query_train_info", {**RIDE, "seatClassName": "First Class Seat"}))
    assert first["segments"][0]["dep_station_name"] == "Alpha Station"
    [flight] = found(session.call("query_flight_info", RIDE))
    assert (flight["price"], flight["segments"][0]["manufacturer"]) == ("500", "Maker")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("query_train_info", {**RIDE, "depDate": "2025-11-11"}),
        ("search_location", {"place_name": "Beta station"}),
        ("query_road_route_info", {"origin": "30.0,120.0", "destination": "30.02,120.02"}),  # not digit for digit
        ("recommend_restaurants", {"latitude": "30.000000", "longitude": "120.000000"}),
    ],
)
def test_what_is_not_there_is_said(session, tool, arguments):
    assert session.call(tool, arguments).startswith(f"Nothing found for {next(iter(arguments))}=")


def test_a_tool_that_there_is_not_and_a_missing_argument_are_refused(session):
    with pytest.raises(ValueError, match="there is no tool 'book_hotel', but query_train_info, "):
        session.call("book_hotel", {})
    with pytest.raises(ValueError, match="^query_train_info needs destination, depDate$"):
        session.call("query_train_info", {"origin": "Alpha"})


def test_a_long_answer_loses_whole_rows_from_its_end(prepared):
    whole = build_tools().open(prepared[0]).call("query_train_info", RIDE).splitlines()
    limit = len("\n".join(whole)) - 1
    cut = build_tools(max_answer_chars=limit).open(prepared[0]).call("query_train_info", RIDE)
    assert len(cut) <= limit
    assert cut.splitlines() == ["3 found, the first 2 are shown:", *whole[1:3]]


def test_every_tool_has_a_schema_that_a_template_takes():
    schemas = build_tools().schemas
    assert [schema["function"]["name"] for schema in schemas] == list(LOOK_UPS) and len(LOOK_UPS) == 9
    for schema in schemas:
        parameters = schema["function"]["parameters"]
        assert set(parameters["required"]) <= set(parameters["properties"])
        assert all(of["type"] == "string" and of["description"] for of in parameters["properties"].values())


@pytest.mark.parametrize("chars", [499, "4096", True, None])
def test_too_small_a_limit_is_refused(chars):
    with pytest.raises(ConfigError, match="tools.options.max_answer_chars must be a whole number of at least 500"):
        build_tools(max_answer_chars=chars)


def test_a_row_of_another_kind_and_a_database_that_was_moved_are_one_line(tmp_path):
    with pytest.raises(DataError, match="a row has no extra_info.database: it is none of DeepPlanning's"):
        build_tools().open({"prompt": "1+1="})
    with pytest.raises(DataError, match="gone: there is no such folder: the task's database was there when"):
        build_tools().open({"extra_info": {"database": str(tmp_path / "gone")}})


def test_the_runner_of_a_run_s_tools_makes_the_calls(prepared):
    """In a process of its own: what a student wrote, in order, and an argument that the schema lacks."""
    calls = [
        ToolCall("search_location", {"place_name": "Old Tower"}),
        ToolCall("query_train_info", {"origin": "Alpha"}),
        ToolCall("recommend_restaurants", {"latitude": "30.030000", "longitude": "120.030000"}),
    ]
    runner = ToolRunner(
        build="opsd.data.deepplanning.tools:build_tools", options={"max_answer_chars": 500}, max_answer_chars=500
    )
    try:
        assert [schema["function"]["name"] for schema in runner.schemas] == list(LOOK_UPS)
        place, refused, restaurants = runner.submit("trajectory", prepared[0], calls).result(timeout=60)
    finally:
        runner.close()
    assert found(place.text) == [{"poi_name": "Old Tower", "latitude": "30.020000", "longitude": "120.020000"}]
    assert refused.text.startswith("error: ") and "destination" in refused.text
    assert restaurants.text.splitlines()[0] == "2 found, the first 1 are shown:"
