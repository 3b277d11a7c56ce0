import pytest

from opsd.data.deepplanning.database import Database
from tests.opsd.data.deepplanning.world import publish, rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("travelplanning"))


@pytest.fixture(scope="session")
def prepared(folder):
    """The rows of the three tasks."""
    return rows(folder)


@pytest.fixture(scope="session")
def reference(prepared):
    """Task 0's reference answer."""
    return prepared[0]["reward_model"]["ground_truth"]


@pytest.fixture(scope="session")
def database(folder):
    """Task 0's."""
    return Database(folder / "database" / "database_en" / "id_0")
