"""The published folder becomes rows, split by a seed; what is wrong in it is one line that names the place."""

import json
import shutil

import pytest

from opsd.data.deepplanning.folder import read_folder
from opsd.data.deepplanning.instructions import INSTRUCTIONS
from opsd.data.deepplanning.task import read_task
from opsd.data.prepare import arguments, prepare
from opsd.data.rows import read_rows
from opsd.errors import DataError
from tests.opsd.data.deepplanning.world import META, TASKS, publish


def run(output, *options):
    return prepare(arguments().parse_args([str(output), *map(str, options)]))


def fields(file):
    return [row.fields for row in read_rows(file)]


def test_a_task_becomes_a_row(tmp_path, folder):
    run(tmp_path, f"--eval=deepplanning={folder}", "--variant=boxed")
    first, *_ = rows = fields(tmp_path / "val_deepplanning.parquet")
    assert [row["extra_info"]["id"] for row in rows] == ["0", "1", "2"]
    assert first["prompt"] == [
        {"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": TASKS[0]["query"]},
    ]  # fmt: skip
    assert first["data_source"] == "deepplanning_en" and first["extra_info"]["split"] == "test"
    task = read_task(first["reward_model"]["ground_truth"])
    assert task.database == first["extra_info"]["database"] == str(folder / "database" / "database_en" / "id_0")
    trip = task.trip
    assert (trip.org, trip.days, trip.people, trip.rooms, trip.weekday) == ("Alpha", 2, 2, 1, 3)
    assert trip.constraints == META["hard_constraints"]


def test_training_rows_are_four_fifths_by_the_seed_and_the_same_tasks_in_each_language(tmp_path):
    tasks = [{**TASKS[0], "id": str(number), "query": f"Trip {number}"} for number in range(10)]
    publish(tmp_path / "both", tasks=tasks)
    shutil.copytree(tmp_path / "both" / "database" / "database_en", tmp_path / "both" / "database" / "database_zh")
    text = json.dumps([{**task, "query": f"旅行 {task['id']}"} for task in tasks])
    (tmp_path / "both" / "data" / "travelplanning_query_zh.json").write_text(text)
    ids = {}
    for seed, name in ((1, "deepplanning"), (1, "deepplanning_zh"), (2, "deepplanning")):
        out = tmp_path / f"{name}{seed}"
        facts = run(out, f"--train={name}={tmp_path / 'both'}", f"--seed={seed}")
        assert f"train.parquet 8 rows, val_{name}.parquet 2 rows" in facts
        parts = [fields(out / f"{part}.parquet") for part in ("train", f"val_{name}")]
        ids[seed, name] = [[row["extra_info"]["id"] for row in part] for part in parts]
        assert sorted(sum(ids[seed, name], [])) == sorted(task["id"] for task in tasks)
    assert ids[1, "deepplanning"] == ids[1, "deepplanning_zh"] != ids[2, "deepplanning"]


TRAINS, HOTELS = "trains/trains.csv", "hotels/hotels.csv"


def rewritten(name, edit):
    def change(folder):
        path = folder / "database" / "database_en" / "id_1" / name
        path.write_bytes(edit(path.read_bytes()))

    return change


def with_meta(**meta):
    def change(folder):
        tasks = [TASKS[0], {**TASKS[1], "meta_info": {**META, **meta}}]
        (folder / "data" / "travelplanning_query_en.json").write_text(json.dumps(tasks))

    return change


def with_queries(text):
    return lambda folder: (folder / "data" / "travelplanning_query_en.json").write_text(text)


def without(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def zipped(folder):
    without("database/database_en")(folder)
    (folder / "database" / "database_en.zip").touch()


DATABASE = "database/database_en/id_1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("data/travelplanning_query_en.json"), "travelplanning_query_en.json: it cannot be read: No such file"),
        (with_queries("[{]"), "travelplanning_query_en.json: not JSON"),
        (with_queries("{}"), "travelplanning_query_en.json: expected a list of tasks, got dict"),
        (with_queries('["a"]'), "travelplanning_query_en.json, task 1: expected an object, got str"),
        (with_queries('[{"query": "x"}]'), "travelplanning_query_en.json, task 1: expected an id of its own, got None"),
        (with_queries('[{"id": "0", "query": 5}]'), "task 1: expected its query, got 5"),
        (with_meta(days="two"), "task 2 (id 1): meta_info.days must be a whole number from 1 to 1000, got 'two'"),
        (with_meta(org=""), "task 2 (id 1): meta_info.org must be a city, got ''"),
        (with_meta(depart_weekday=8), "meta_info.depart_weekday must be a whole number from 1 to 7, got 8"),
        (with_meta(hard_constraints={"ship_cheapest": {}}), "hard constraint 'ship_cheapest' is of no known kind"),
        (
            with_meta(hard_constraints={"hotel_cheapest_star": {"hotel_star": 3}}),
            "'hotel_cheapest_star' needs hotel_name",
        ),
        (
            with_meta(hard_constraints={"attraction_x": {"attraction_names": "A"}}),
            "'attraction_x' needs attraction_names",
        ),
        (with_meta(hard_constraints=[]), "meta_info.hard_constraints must be an object, got []"),
        (zipped, "database_en: expected a folder with a database per task: "),
        (without(DATABASE), "id_1: there is no such folder, where a task's database was expected"),
        (without(f"{DATABASE}/{HOTELS}"), "id_1/hotels/hotels.csv: it cannot be read: No such file"),
        (
            rewritten(HOTELS, lambda text: text.replace(b"price", b"cost")),
            "hotels.csv: expected the columns price, got name, ",
        ),
        (rewritten(HOTELS, lambda text: text.replace(b"score", b"city")), "hotels.csv: a column stands twice in it"),
        (rewritten(HOTELS, lambda text: text + b"one,two\r\n"), "hotels.csv, line 4: expected 11 fields, got 2"),
        (rewritten(HOTELS, lambda text: text + b"\xff\r\n"), "hotels.csv: it is not in UTF-8"),
        (
            rewritten(HOTELS, lambda text: b""),
            "hotels.csv: expected the columns name, price, hotel_star, brand, got nothing",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_its_place(tmp_path, change, said):
    change(publish(tmp_path / "published", tasks=TASKS[:2]))
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", f"--train=deepplanning={tmp_path / 'published'}")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_journey_by_air_alone_needs_no_trains_but_one_of_them_is_needed(tmp_path):
    folder = publish(tmp_path / "published", tasks=TASKS[:1])
    database = folder / "database" / "database_en" / "id_0"
    (database / TRAINS).unlink()
    assert len(read_folder(str(folder), "en")) == 1
    (database / "flights" / "flights.csv").unlink()
    with pytest.raises(DataError, match=f"id_0: expected rows in {TRAINS} or flights/flights.csv"):
        read_folder(str(folder), "en")


def test_without_a_folder_it_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="^deepplanning: give the folder that it is in, deepplanning=FOLDER$"):
        run(tmp_path, "--train=deepplanning")
