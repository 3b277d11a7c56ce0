"""Trajectories that an engine of this process makes, to hold those of a run against."""

import numpy as np
from transformers import AutoTokenizer

from opsd.agents.toolbox import AgentSpec
from opsd.agents.trajectories import AgentWork
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.engines.work import Work
from opsd.models.folder import model_config, stop_ids
from opsd.types import Prompt, Vocabulary
from tests.opsd.agents.agent_models import VOCAB_SIZE


def trajectories_of(path, requests, *, tools, max_tokens, temperature=1.0):
    """(tokenizer, a rollout per request). `requests`: (row, text of the prompt, seed) each."""
    tokenizer, config = AutoTokenizer.from_pretrained(path), model_config("model", str(path), False)
    vocabulary = Vocabulary(size=VOCAB_SIZE, stop_ids=tuple(sorted(stop_ids(str(path), config, tokenizer))))
    teacher = TeacherConfig(path=str(path), backend="transformers")
    engine = TransformersEngine(teacher_spec(teacher, vocabulary=vocabulary, device="cpu", max_model_tokens=400))
    spec = AgentSpec(tools=tools, path=str(path), trust_remote_code=False, stop_ids=vocabulary.stop_ids)
    given = {}
    for place, (row, text, seed) in enumerate(requests):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        given[place] = Prompt(index=place, token_ids=ids, text=text, answer="", source="", row=row), 0, seed
    sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
    [group] = AgentWork(Work(given), spec, keeps_tools=False).made_by(engine, sampling, 0, None)
    return tokenizer, [group[place] for place in range(len(given))]
