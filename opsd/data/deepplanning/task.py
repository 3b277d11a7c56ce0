"""What a task asks for: the trip, its hard constraints, and the folder of its database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsd.strict_json import read_json

# How a hard constraint's name begins -> the fields that say what it needs, one of which must be there.
CONSTRAINTS = {
    "flight_": ("outbound_flight_no", "inbound_flight_no"),
    "train_": ("outbound_train_no", "inbound_train_no"),
    "hotel_": ("hotel_name",),
    "restaurant_": ("restaurant_name",),
    "attraction_": ("attraction_names",),
    "budget_constraint": ("max_budget",),
}
KINDS: dict[str, type | tuple[type, ...]] = {
    "attraction_names": list,
    "max_budget": (int, float),
}  # of these fields; the others are text


@dataclass(frozen=True, kw_only=True)
class Trip:
    """The public `meta_info` as far as rules read it."""

    org: str  # city of departure and return
    days: int
    people: int
    rooms: int
    weekday: int | None  # of the first day, 1 Monday .. 7 Sunday; None: not known, and no place is taken for closed
    constraints: Mapping[str, Mapping[str, Any]]  # name -> its fields


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row's reference answer: what a plan is held against."""

    database: str  # folder
    trip: Trip


def reference_of(database: str, meta: Any) -> str:
    """The reference answer of a row, as text. Raises ValueError where `meta`, the public meta_info, does not fit."""
    read_trip(meta)
    return json.dumps({"database": database, "meta_info": meta}, ensure_ascii=False)


def read_task(reference: str) -> Task:
    """What `reference_of` wrote. Raises ValueError that says what was expected."""
    fields = read_json(reference)
    if not isinstance(fields, dict) or not isinstance(fields.get("database"), str):
        raise ValueError("the reference answer is no task of DeepPlanning's as scripts/prepare_data.py writes it")
    return Task(database=fields["database"], trip=read_trip(fields.get("meta_info")))


def read_trip(meta: Any) -> Trip:
    """Raises ValueError that names the field."""
    if not isinstance(meta, Mapping):
        raise ValueError(f"meta_info must be an object, got {meta!r}")
    org = meta.get("org")
    if not isinstance(org, str) or not org.strip():
        raise ValueError(f"meta_info.org must be a city, got {org!r}")
    constraints = meta.get("hard_constraints", {})
    if not isinstance(constraints, Mapping):
        raise ValueError(f"meta_info.hard_constraints must be an object, got {constraints!r}")
    for name, fields in constraints.items():
        _check_constraint(name, fields)
    weekday = meta.get("depart_weekday")
    return Trip(
        org=org.strip(),
        days=_whole(meta, "days", 0),
        people=_whole(meta, "people_number", 1),
        rooms=_whole(meta, "room_number", 1),
        weekday=None if weekday is None else _whole(meta, "depart_weekday", 0, at_most=7),
        constraints=constraints,
    )


def _check_constraint(name: str, fields: Any) -> None:
    needs = next((needs for start, needs in CONSTRAINTS.items() if name.startswith(start)), None)
    if needs is None:
        raise ValueError(f"hard constraint {name!r} is of no known kind: {', '.join(CONSTRAINTS)}")
    given = {need: fields[need] for need in needs if fields.get(need)} if isinstance(fields, Mapping) else {}
    if not given or not all(isinstance(value, KINDS.get(need, str)) for need, value in given.items()):
        raise ValueError(f"hard constraint {name!r} needs {' or '.join(needs)}, got {fields!r}")


def _whole(meta: Mapping[str, Any], name: str, default: int, at_most: int = 1000) -> int:
    value = meta.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
        raise ValueError(f"meta_info.{name} must be a whole number from 1 to {at_most}, got {value!r}")
    return value
