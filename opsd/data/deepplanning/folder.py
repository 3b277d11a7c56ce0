"""The folder as DeepPlanning publishes it, travelplanning/, into rows to train on and to evaluate with.

FOLDER/data/travelplanning_query_en.json          (github.com/QwenLM/Qwen-Agent, benchmark/deepplanning)
FOLDER/database/database_en/id_0/trains/trains.csv and its like    (Hugging Face, Qwen/DeepPlanning, unzipped)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd.data.deepplanning.database import Database
from opsd.data.deepplanning.instructions import INSTRUCTIONS
from opsd.data.deepplanning.task import reference_of
from opsd.data.rows import Row
from opsd.errors import DataError
from opsd.strict_json import JsonError, read_json

LANGUAGES = ("en", "zh")


def read_folder(folder: str, language: str) -> list[Row]:
    """The tasks of one language, a row in verl's format each. Raises DataError that names file, task and field.

    Every database is read once, so that what is wrong with one is said before a training begins.
    """
    file = Path(folder) / "data" / f"travelplanning_query_{language}.json"
    databases = Path(folder) / "database" / f"database_{language}"
    tasks = _tasks(file)
    if not databases.is_dir():
        archive = databases.with_suffix(".zip")
        found = f"{archive} is there: unzip it in its folder" if archive.exists() else "there is no such folder"
        raise DataError(f"{databases}: expected a folder with a database per task: {found}")
    known: set[str] = set()
    rows = []
    for place, task in enumerate(tasks, start=1):
        where = f"{file}, task {place}"
        if not isinstance(task, dict):
            raise DataError(f"{where}: expected an object, got {type(task).__name__}")
        name, query = str(task.get("id", "")), task.get("query")
        if not name or name in known:
            raise DataError(f"{where}: expected an id of its own, got {task.get('id')!r}")
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"{where}: expected its query, got {query!r}")
        known.add(name)
        database = _database(databases, name)
        try:
            reference = reference_of(database, task.get("meta_info"))
        except ValueError as error:
            raise DataError(f"{where} (id {name}): {error}") from error
        rows.append(Row(where=where, fields=_fields(language, name, query, database, reference)))
    return rows


def _fields(language: str, name: str, query: str, database: str, reference: str) -> dict[str, Any]:
    return {
        "data_source": f"deepplanning_{language}",
        "prompt": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": query}],
        "ability": "travel",
        "reward_model": {"style": "rule", "ground_truth": reference},
        "extra_info": {"id": name, "database": database},
    }


def _tasks(file: Path) -> list[Any]:
    try:
        tasks = read_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, JsonError) as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(tasks, list) or not tasks:
        raise DataError(f"{file}: expected a list of tasks, got {type(tasks).__name__}")
    return tasks


def _database(databases: Path, name: str) -> str:
    """The absolute folder of a task's database, all of which was read."""
    folder = next((databases / part for part in (f"id_{name}", name) if (databases / part).is_dir()), None)
    folder = (folder or databases / f"id_{name}").resolve()
    Database(folder).check()
    return str(folder)
