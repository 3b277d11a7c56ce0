"""A made-up world in the form in which DeepPlanning is published: three tasks between Alpha and Beta, with their files.

The plan of task 0 keeps every rule; what it costs is worked out below, by hand.
"""

import csv
import json

from opsd.data.deepplanning.folder import read_folder
from opsd.data.deepplanning.plan import read_plan
from opsd.data.deepplanning.scorer import DIMENSIONS
from opsd.data.deepplanning.task import read_trip

RIDE = [
    "route_index", "segment_index", "origin_city", "destination_city", "dep_date", "dep_station_code",
    "dep_station_name", "arr_station_code", "arr_station_name", "dep_datetime", "arr_datetime", "duration",
]  # fmt: skip
END = ["seat_class", "seat_status", "price"]
TRAINS = [
    [*RIDE, "train_type", "train_no", *END],
    ["2", "1", "Alpha", "Beta", "2025-11-12", "a", "Alpha Station", "b", "Beta Station", "2025-11-12 07:00:00",
     "2025-11-12 09:00:00", "120", "High-speed", "G1", "First Class Seat", "3", "160.0"],
    ["1", "1", "Alpha", "Beta", "2025-11-12", "a", "Alpha Station", "b", "Beta Station", "2025-11-12 07:00:00",
     "2025-11-12 09:00:00", "120", "High-speed", "G1", "Second Class Seat", "6", "100.4"],
    ["10", "2", "Alpha", "Beta", "2025-11-12", "c", "Gamma Station", "b", "Beta Station", "2025-11-12 11:00:00",
     "2025-11-12 12:30:00", "90", "Ordinary", "D6", "Second Class Seat", "", "80"],
    ["10", "1", "Alpha", "Beta", "2025-11-12", "a", "Alpha Station", "c", "Gamma Station", "2025-11-12 08:00:00",
     "2025-11-12 10:00:00", "120", "Ordinary", "D5", "Second Class Seat", "", "80"],
    ["1", "1", "Beta", "Alpha", "2025-11-13", "b", "Beta Station", "a", "Alpha Station", "2025-11-13 17:00:00",
     "2025-11-13 19:00:00", "120", "High-speed", "G2", "Second Class Seat", "7", "100"],
]  # fmt: skip
FLIGHTS = [
    [*RIDE, "airline", "flight_no", "equip_size", "equip_type", "manufacturer", *END],
    ["1", "1", "Alpha", "Beta", "2025-11-12", "x", "Alpha Airport", "y", "Beta Airport", "2025-11-12 08:00:00",
     "2025-11-12 10:30:00", "150", "Air A", "F10", "M", "320", "Maker", "Economy Class", "", "500"],
    ["1", "1", "Beta", "Alpha", "2025-11-14", "y", "Beta Airport", "x", "Alpha Airport", "2025-11-14 15:00:00",
     "2025-11-14 17:00:00", "120", "Air A", "F11", "M", "320", "Maker", "Economy Class", "", "450"],
]  # fmt: skip
HOTELS = [
    ["name", "city", "address", "latitude", "longitude", "decoration_time", "hotel_star", "price", "score", "brand",
     "services"],
    ["Lake Hotel - South Gate", "Beta", "1 Lake Road", "30.000000", "120.000000", "2024", "3", "300.0", "4.6", "Lake",
     "Gym;Swimming Pool"],
    ["Hill Inn", "Beta", "2 Hill Road", "30.010000", "120.010000", "2010", "2", "200", "4.1", "Hill", ""],
]  # fmt: skip
ATTRACTIONS = [
    ["attraction_id", "attraction_name", "city", "address", "latitude", "longitude", "description", "rating",
     "opening_time", "closing_time", "closing_dates", "min_visit_hours", "max_visit_hours", "ticket_price",
     "attraction_type"],
    ["1", "Old Tower", "Beta", "Tower Square", "30.020000", "120.020000", "A tower, and old", "4.8", "09:00", "17:00",
     "Monday", "1", "3", "60", "City Landmark"],
    ["2", "River Park", "Beta", "River", "30.030000", "120.030000", "Green", "4.5", "Open 24 Hours", "Open 24 Hours",
     "", "1", "4", "0", "Natural Scenery"],
    ["3", "Night Market", "Beta", "Market", "30.040000", "120.040000", "Late", "4.2", "16:30", "02:00", "", "1", "3",
     "0", "Leisure Experience"],
    ["4", "Art Museum", "Beta", "Art Street", "30.050000", "120.050000", "Pictures", "4.7", "09:00", "17:00",
     "Thursday,Sunday", "1", "3", "40", "Art Exhibition"],
    ["5", "Grand Garden", "Beta", "Garden", "30.060000", "120.060000", "Flowers", "4.9", "08:00", "18:00", "", "2",
     "5", "30.4", "Natural Scenery"],
    ["6", "Hidden Cave", "Beta", "Cave", "30.070000", "120.070000", "Dark", "4.0", "", "", "", "", "", "", "Cave"],
]  # fmt: skip
RESTAURANTS = [
    ["restaurant_id", "restaurant_name", "latitude", "longitude", "price_per_person", "cuisine", "opening_time",
     "closing_time", "nearby_attraction_name", "rating", "tags", "query_latitude", "query_longitude"],
    ["1", "Noodle House, Old Town", "30.080000", "120.080000", "50.0", "Noodles", "10:00", "22:00", "Old Tower", "4.4",
     "Private Room;Parking", "30.020000", "120.020000"],
    ["1", "Noodle House, Old Town", "30.080000", "120.080000", "50.0", "Noodles", "10:00", "22:00", "River Park",
     "4.4", "Private Room;Parking", "30.030000", "120.030000"],
    ["2", "Fish Table", "30.090000", "120.090000", "80", "Fish", "16:00", "01:00", "River Park", "4.7", "",
     "30.030000", "120.030000"],
    ["3", "Duck House (Tower Branch)", "30.100000", "120.100000", "90", "Duck", "10:30", "21:00", "Grand Garden",
     "4.3", "", "30.060000", "120.060000"],
    ["4", "Tea Room", "30.110000", "120.110000", "", "Tea", "", "", "Grand Garden", "4.0", "", "30.060000",
     "120.060000"],
]  # fmt: skip
STATIONS = {
    "Alpha Station": ("29.000000", "119.000000"), "Beta Station": ("30.120000", "120.120000"),
    "Beta Airport": ("30.130000", "120.130000"),
}  # fmt: skip


def places():
    named = [(row[0], *row[3:5]) for row in HOTELS[1:]]
    named += [(row[1], row[4], row[5]) for row in ATTRACTIONS[1:]]
    named += [(row[1], row[2], row[3]) for row in RESTAURANTS[1:]]
    return dict.fromkeys([*named, *((name, *point) for name, point in STATIONS.items())])


def matrix():
    """20 minutes between any two places of Beta, 13 to and from the cave, none from a place to itself."""
    points = [(name, f"{latitude},{longitude}") for name, latitude, longitude in places() if "Alpha" not in name]
    yield ["origin", "destination", "distance_meters", "duration_minutes", "cost"]
    for name, origin in points:
        for other, destination in points:
            minutes = "0" if name == other else "13" if "Hidden Cave" in (name, other) else "20.0"
            yield [origin, destination, "6000", minutes, "20"]


TABLES = {
    "trains/trains.csv": TRAINS,
    "flights/flights.csv": FLIGHTS,
    "hotels/hotels.csv": HOTELS,
    "attractions/attractions.csv": ATTRACTIONS,
    "restaurants/restaurants.csv": RESTAURANTS,
    "locations/locations_coords.csv": [
        ["poi_name", "latitude", "longitude", "poi_type"],
        *([*p, "x"] for p in places()),
    ],
    "transportation/distance_matrix.csv": list(matrix()),
}
CONSTRAINTS = {
    "train_seat_status": {"people_number": 2, "outbound_train_no": "G1", "inbound_train_no": "G2"},
    "hotel_star_service_required": {"hotel_name": "Lake Hotel - South Gate", "required_service": "Gym"},
    "restaurant_highest_rated": {"restaurant_name": "Fish Table"},
    "attraction_must_visit_named": {"attraction_names": ["Old Tower", "Grand Garden"]},
    "budget_constraint": {"max_budget": 1500},
}
META = {
    "org": "Alpha", "dest": ["Beta"], "days": 2, "depart_date": "2025-11-12", "depart_weekday": 3,
    "return_date": "2025-11-13", "people_number": 2, "room_number": 1, "hard_constraints": CONSTRAINTS,
}  # fmt: skip
TASKS = [
    {"id": "0", "query": "Two days in Beta by train, please, for 1,500 yuan.", "meta_info": META},
    {"id": "1", "query": "Three days in Beta by air.", "meta_info": {**META, "days": 3, "hard_constraints": {
        "flight_cheapest_direct": {"outbound_flight_no": "F10"}}}},
    {"id": "2", "query": "Five of us go to Beta.", "meta_info": {**META, "people_number": 5, "room_number": 3}},
]  # fmt: skip

# Two people, one room. Per person: trains 100 + 100, meals 50 + 80 + 90, tickets 60 + 0 + 30, together 510; one night
# 300; nine taxis of 20. So 2 * 510 + 300 + 180 = 1500.
PLAN = """\
Day 1:
Current City: from Alpha to Beta
Accommodation: Lake Hotel - South Gate, ¥300/room/night
07:00-09:00 | travel_intercity_public | train G1, Alpha Station - Beta Station, ¥100/person
09:00-09:20 | travel_city | Beta Station - Lake Hotel - South Gate, 6km, 20min, ¥20
09:20-10:00 | hotel | Check-in, Lake Hotel - South Gate
10:00-10:20 | travel_city | Lake Hotel - South Gate - Old Tower, 6km, 20min, ¥20
10:20-12:00 | attraction | Old Tower, ¥60/person
12:00-12:20 | travel_city | Old Tower - Noodle House, Old Town, 6km, 20min, ¥20
12:20-13:20 | meal | Lunch, Noodle House, Old Town, ¥50/person
13:20-13:40 | travel_city | Noodle House, Old Town - River Park, 6km, 20min, ¥20
13:40-16:30 | attraction | River Park, ¥0
16:30-17:00 | buffer | Rest
17:00-17:20 | travel_city | River Park - Fish Table, 6km, 20min, ¥20
17:20-18:30 | meal | Dinner, Fish Table, ¥80/person
18:30-18:50 | travel_city | Fish Table - Lake Hotel - South Gate, 6km, 20min, ¥20
18:50-24:00 | hotel | Rest, Lake Hotel - South Gate

Day 2:
Current City: from Beta to Alpha
Accommodation: -
09:00-09:20 | travel_city | Lake Hotel - South Gate - Grand Garden, 6km, 20min, ¥20
09:20-12:00 | attraction | Grand Garden, ¥30/person
12:00-12:20 | travel_city | Grand Garden - Duck House (Tower Branch), 6km, 20min, ¥20
12:20-13:40 | meal | Lunch, Duck House (Tower Branch), ¥90/person
13:40-14:00 | travel_city | Duck House (Tower Branch) - Beta Station, 6km, 20min, ¥20
14:00-17:00 | buffer | Waiting at the station
17:00-19:00 | travel_intercity_public | train G2, Beta Station - Alpha Station, ¥100/person

**Budget Summary**:
Transportation: 580 RMB
Accommodation: 300 RMB
Meals: 440 RMB
Attractions & Tickets: 180 RMB
**Total Estimated Budget: 1500 RMB**
"""


def publish(folder, *, language="en", tasks=TASKS):
    """Writes the folder as it is published; returns it."""
    (folder / "data").mkdir(parents=True)
    text = json.dumps(tasks, ensure_ascii=False)
    (folder / "data" / f"travelplanning_query_{language}.json").write_text(text, encoding="utf-8")
    for task in tasks:
        for name, lines in TABLES.items():
            path = folder / "database" / f"database_{language}" / f"id_{task['id']}" / name
            path.parent.mkdir(parents=True)
            with path.open("w", encoding="utf-8-sig", newline="") as file:
                csv.writer(file).writerows(lines)
    return folder


def rows(folder, language="en"):
    return [row.fields for row in read_folder(str(folder), language)]


def broken(plan, database, **meta):
    """The names of the rules that a plan for task 0, with another meta_info, breaks."""
    trip, read = read_trip({**META, **meta}), read_plan(plan, database.names)
    return {rule.__name__ for rules in DIMENSIONS.values() for rule in rules if list(rule(read, trip, database))}
