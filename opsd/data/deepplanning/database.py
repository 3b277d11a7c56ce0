"""A task's database: a folder of seven CSV files as DeepPlanning publishes them, each read once and strictly."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from opsd.errors import DataError

Row = dict[str, str]  # column -> text, as the file has it, without the spaces around it


@dataclass(frozen=True)
class Table:
    """A file of the database. Columns beyond these are kept: look-ups show some of them where they are there."""

    file: str
    columns: tuple[str, ...]  # that look-ups and rules cannot do without
    optional: bool = False  # a journey is by train or by air, and the other file may be missing


RIDE = (
    "origin_city", "destination_city", "dep_date", "route_index", "segment_index", "dep_station_name",
    "arr_station_name", "dep_datetime", "arr_datetime", "duration", "seat_class", "seat_status", "price",
)  # fmt: skip
TABLES = {
    "trains": Table("trains/trains.csv", (*RIDE, "train_no", "train_type"), optional=True),
    "flights": Table("flights/flights.csv", (*RIDE, "flight_no", "airline", "manufacturer"), optional=True),
    "hotels": Table("hotels/hotels.csv", ("name", "price", "hotel_star", "brand")),
    "attractions": Table(
        "attractions/attractions.csv",
        (
            "attraction_name", "attraction_type", "ticket_price", "opening_time", "closing_time", "closing_dates",
            "min_visit_hours", "max_visit_hours",
        ),
    ),
    "restaurants": Table(
        "restaurants/restaurants.csv",
        (
            "restaurant_name", "price_per_person", "opening_time", "closing_time", "query_latitude", "query_longitude",
        ),
    ),
    "places": Table("locations/locations_coords.csv", ("poi_name", "latitude", "longitude")),
    "routes": Table(
        "transportation/distance_matrix.csv",
        ("origin", "destination", "distance_meters", "duration_minutes", "cost"),
    ),
}  # fmt: skip
NUMBER_COLUMNS = {"trains": "train_no", "flights": "flight_no"}
OPEN_AT_ONE_TIME = 8  # databases: the answers to one prompt are graded together


class Database:
    """One task's. A table is read at its first use; DataError names the file, and the line or column."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._read: dict[str, list[Row]] = {}

    def rows(self, table: str) -> list[Row]:
        """In the order of the file; an optional file that is not there has none."""
        if table not in self._read:
            self._read[table] = read_table(self.folder, TABLES[table])
        return self._read[table]

    def check(self) -> None:
        """Reads everything. Raises DataError."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: there is no such folder, where a task's database was expected")
        for table in TABLES:
            self.rows(table)
        if not self.rows("trains") and not self.rows("flights"):
            raise DataError(f"{self.folder}: expected rows in {' or '.join(TABLES[t].file for t in NUMBER_COLUMNS)}")

    @cached_property
    def hotels(self) -> dict[str, Row]:
        return self._by_name("hotels", "name")

    @cached_property
    def attractions(self) -> dict[str, Row]:
        return self._by_name("attractions", "attraction_name")

    @cached_property
    def restaurants(self) -> dict[str, Row]:
        return self._by_name("restaurants", "restaurant_name")

    @cached_property
    def places(self) -> dict[str, str]:
        """Name -> "latitude,longitude", digit for digit as the file has it: the distance matrix is asked with it."""
        return {
            name: f"{row['latitude']},{row['longitude']}" for name, row in self._by_name("places", "poi_name").items()
        }

    @cached_property
    def minutes(self) -> dict[tuple[str, str], float]:
        """(origin, destination), as in `places` -> minutes on the road; of several rows the first."""
        found: dict[tuple[str, str], float] = {}
        for row in self.rows("routes"):
            minutes = number(row["duration_minutes"])
            if minutes is not None:
                found.setdefault((row["origin"], row["destination"]), minutes)
        return found

    @cached_property
    def ride_prices(self) -> dict[str, list[float]]:
        """Number of a flight or train -> every price that it has; a flight's where both are so called."""
        found: dict[str, list[float]] = {}
        for table, column in NUMBER_COLUMNS.items():  # flights come last and replace trains
            own: dict[str, list[float]] = {}
            for row in self.rows(table):
                price = number(row["price"])
                own.setdefault(row[column], []).extend([] if price is None else [price])
            found |= own
        return found

    @cached_property
    def cities(self) -> dict[str, str]:
        """Station or airport -> its city, as the journeys have it; where they differ, the last."""
        found: dict[str, str] = {}
        for table in ("flights", "trains"):
            for row in self.rows(table):
                found[row["dep_station_name"]] = row["origin_city"]
                found[row["arr_station_name"]] = row["destination_city"]
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """Everything that a plan may name."""
        return frozenset((*self.places, *self.cities, *self.hotels, *self.attractions, *self.restaurants))

    def _by_name(self, table: str, column: str) -> dict[str, Row]:
        return {row[column]: row for row in self.rows(table) if row[column]}


@lru_cache(maxsize=OPEN_AT_ONE_TIME)
def open_database(folder: str) -> Database:
    """The database of a task. Raises DataError where the folder is not there."""
    if not Path(folder).is_dir():
        raise DataError(
            f"{folder}: there is no such folder: the task's database was there when the data was prepared; prepare it "
            "again from where it is now"
        )
    return Database(folder)


def read_table(folder: Path, table: Table) -> list[Row]:
    """The rows of a file. Raises DataError for one that is missing, in another encoding or without a column."""
    path = folder / table.file
    if table.optional and not path.exists():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(_rows(path, csv.reader(file, strict=True), table))
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not in UTF-8 ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: it is no CSV file ({error})") from error


def _rows(path: Path, lines: Any, table: Table) -> Iterator[Row]:
    """`lines`: a csv.reader, whose type has no public name."""
    header = [name.strip() for name in next(lines, [])]
    if missing := [name for name in table.columns if name not in header]:
        raise DataError(f"{path}: expected the columns {', '.join(missing)}, got {', '.join(header) or 'nothing'}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}: a column stands twice in it, of {', '.join(header)}")
    for values in lines:
        if values and len(values) != len(header):
            raise DataError(f"{path}, line {lines.line_num}: expected {len(header)} fields, got {len(values)}")
        if values:
            yield dict(zip(header, (value.strip() for value in values), strict=True))


def number(text: str) -> float | None:
    """None: the text is none, or empty."""
    try:
        return float(text)
    except ValueError:
        return None
