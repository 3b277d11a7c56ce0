"""What the trajectories of the fixture `sampled` are made of and scored with: tiny engines of this process."""

from dataclasses import replace

import numpy as np
from transformers import AutoTokenizer

from opsd.agents.toolbox import AgentSpec
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.config.tools import ToolsConfig
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.engines.worker import EngineWorker
from opsd.payload.kept import Wanted
from opsd.types import Prompt, Vocabulary
from tests.opsd.agents.agent_models import BUILD, ids_of

VOCABULARY = Vocabulary(size=128, stop_ids=(0, *range(50, 58)))  # letters, and 0, the template's
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=150, num_candidates=4)
TOP_K = 6
WANTED = Wanted(support="union", num_candidates=4, asked=frozenset({"rollout_logprob"}))


def engine_spec(path, *, backend="transformers", urls=(), **settings):
    config = TeacherConfig(path=str(path), backend=backend, top_k=TOP_K, urls=list(urls))
    return teacher_spec(config, vocabulary=VOCABULARY, device="cpu", max_model_tokens=400, **settings)


def make_engine(path, **settings):
    return TransformersEngine(engine_spec(path, **settings))


def spec_of(path):
    tools = ToolsConfig(build=BUILD, max_turns=4, max_answer_chars=30)
    return AgentSpec(tools=tools, path=str(path), trust_remote_code=False, stop_ids=VOCABULARY.stop_ids)


def requests_of(path):
    """Of sixteen rows, by place."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [np.array(ids_of(tokenizer, f"[u:{n}<end>[a:"), np.int32) for n in range(16)]
    prompts = [
        Prompt(index=n, token_ids=own, text="", answer=None, source="test", row={"start": n})
        for n, own in enumerate(ids)
    ]
    return {place: (prompt, 0, 50 + place) for place, prompt in enumerate(prompts)}


def scored_by(engine, rollouts, *, with_hidden=False):
    """What an engine's actor tells of them, and the rows that it gives a learner's rank."""
    worker = EngineWorker()
    worker.engine, worker.name = engine, "teacher"
    worker.score(0, rollouts, TOP_K, None)
    told = worker.told([0])
    num_tokens = len(told.stats["entropy_T"])
    return told, worker.rows(0, [np.arange(num_tokens)], replace(WANTED, with_hidden=with_hidden))
