"""Trajectories that several files look at."""

import pytest

from opsd.agents.toolbox import end_toolbox
from opsd.agents.trajectories import AgentWork
from opsd.engines.work import Work
from tests.opsd.agents.agent_models import make_agent_model
from tests.opsd.agents.sampled import SAMPLING, make_engine, requests_of, spec_of


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_agent_model(root / name, seed=seed) for name, seed in (("student", 2), ("teacher", 1))]


@pytest.fixture(scope="session")
def sampled(paths):
    """Trajectories of the student, made twice: with few requests at a time and with many."""
    spec, engine, made = spec_of(paths[0]), make_engine(paths[0]), []
    for engine.max_num_seqs in (3, 16):
        groups = list(AgentWork(Work(requests_of(paths[0])), spec).made_by(engine, SAMPLING, 0, 4))
        made.append({place: rollout for group in groups for place, rollout in group.items()})
    end_toolbox(spec)
    return made
