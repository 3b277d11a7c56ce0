"""Whether a teacher scores the student's candidates has one answer, wherever its engine runs and whoever asks."""

import sys
from types import SimpleNamespace

import pytest

from opsd.config.backends import ENGINES
from opsd.config.engine import EngineConfig, RolloutConfig, TeacherConfig, scores_candidates, teacher_spec
from opsd.config.loss import LossConfig
from opsd.config.support import decide_support
from opsd.engines import vllm as vllm_engine
from opsd.errors import ConfigError, StageError
from opsd.models.facts import ModelFacts
from opsd.plan.traffic import candidates_scored
from opsd.teacher import facts as teacher_facts
from opsd.teacher.server.config import ServerConfig
from opsd.teacher.server.program import info_of, limits_of
from opsd.types import Vocabulary

MODEL = ModelFacts(tokens=("a", "b"), vocab_size=2, stop_ids=(0,), max_position_embeddings=64)
URLS = ["http://127.0.0.1:1"]


def answers(monkeypatch, **settings):
    """(preflight's of an engine in the run, preflight's of the same engine in a server, the plan's)"""
    monkeypatch.setattr(teacher_facts, "read_facts", lambda *_: MODEL)
    in_process = TeacherConfig(path="/m", top_k=2, **settings)
    server = ServerConfig(teacher=in_process)
    info = info_of(server, MODEL, limits_of(server, MODEL, hidden_bytes=0), "cpu")
    monkeypatch.setattr(teacher_facts, "served_info", lambda _: info)
    monkeypatch.setattr(teacher_facts, "get_when_ready", lambda *_: ("a", "b"))
    served = TeacherConfig(backend="http", urls=URLS, top_k=2)
    run = SimpleNamespace(teacher=in_process, loss=LossConfig())
    return (
        teacher_facts.teacher_facts(in_process, "teacher").scores_candidates,
        teacher_facts.teacher_facts(served, "teacher").scores_candidates,
        candidates_scored(run)["teacher"],
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"score_candidates": False}, False),
        ({"scoring": "prompt_logprobs"}, False),
        ({"backend": "transformers"}, True),
        ({"backend": "transformers", "score_candidates": False}, False),
    ],
)
def test_run_server_and_plan_agree_so_the_loss_does_not_depend_on_the_deployment(monkeypatch, settings, expected):
    found = answers(monkeypatch, **settings)
    assert found == (expected, expected, expected)
    assert {decide_support("auto", {"teacher": each}) for each in found} == {"union" if expected else "teacher"}


def test_a_client_may_do_without_what_its_server_gives(monkeypatch):
    info = {"scores_candidates": True, "max_top_k": 2, "vocab_size": 2, "stop_ids": [0], "max_model_tokens": 9}
    monkeypatch.setattr(teacher_facts, "served_info", lambda _: info)
    monkeypatch.setattr(teacher_facts, "get_when_ready", lambda *_: ("a", "b"))
    modest, eager = (TeacherConfig(backend="http", urls=URLS, top_k=2, score_candidates=wish) for wish in (False, True))
    assert not teacher_facts.teacher_facts(modest, "teacher").scores_candidates
    assert teacher_facts.teacher_facts(eager, "teacher").scores_candidates
    info["scores_candidates"] = False
    with pytest.raises(ConfigError, match=r"the server at http://127\.0\.0\.1:1 does not score"):
        teacher_facts.teacher_facts(eager, "teacher")


@pytest.mark.parametrize(("backend", "scoring"), [("vllm", "prompt_logprobs"), ("openai", "rows")])
def test_what_cannot_be_had_is_refused_where_it_is_asked_for(backend, scoring):
    urls = URLS if backend == "openai" else []
    asked = TeacherConfig(path="/m", backend=backend, scoring=scoring, urls=urls, score_candidates=True)
    with pytest.raises(ConfigError, match=rf"score_candidates=true is not possible with .*={backend}"):
        scores_candidates(asked)


def test_vllms_own_way_is_vllms():
    with pytest.raises(ConfigError, match=r"^teacher\.scoring=prompt_logprobs is vLLM's; teacher\.backend is transf"):
        TeacherConfig(path="/m", backend="transformers", scoring="prompt_logprobs")


def test_one_teacher_without_decides_for_all_of_them():
    scored = {"teacher": True, "teacher.by_source.code": False}
    assert decide_support("auto", scored) == decide_support("teacher", scored) == "teacher"
    with pytest.raises(ConfigError, match=r"loss\.support=student needs .*, which teacher\.by_source\.code does not"):
        decide_support("student", scored)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("section", [EngineConfig, RolloutConfig])
def test_an_engine_that_only_generates_promises_nothing(section, backend):
    assert not scores_candidates(section(backend=backend))


@pytest.mark.parametrize("runs_v2", [True, False])
def test_an_engine_that_cannot_keep_the_promise_does_not_start(monkeypatch, runs_v2):
    """On a GPU, as far as a machine without one can tell: with vLLM in another's place."""

    class LLM:
        def __init__(self, **_):
            self.model_config = SimpleNamespace(get_vocab_size=lambda: 2)
            self.llm_engine = SimpleNamespace(
                vllm_config=SimpleNamespace(use_v2_model_runner=runs_v2), set_weight_version=lambda version: None
            )

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    monkeypatch.setattr(vllm_engine, "model_without_weights", lambda *_, **__: None)
    monkeypatch.setattr(vllm_engine, "untied_settings", lambda *_, **__: {})

    def start(**settings):
        cfg, vocabulary = TeacherConfig(path="/m", **settings), Vocabulary(size=2, stop_ids=(0,))
        spec = teacher_spec(cfg, vocabulary=vocabulary, device="cuda", max_model_tokens=8)
        return vllm_engine.VllmEngine(spec)

    assert not start(scoring="prompt_logprobs").scores_candidates
    if runs_v2:
        with pytest.raises(StageError, match=r"^teacher: vLLM runs /m with its V2 .*\.scoring=prompt_logprobs$"):
            start()
    else:
        assert start().scores_candidates
