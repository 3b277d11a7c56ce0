"""A teacher behind HTTP: real servers, real engines, real runs; what comes back is what the engine in process gives."""

import json
import signal
import time
from contextlib import ExitStack
from dataclasses import replace

import httpx
import numpy as np
import psutil
import pytest
import torch

from opsd.cluster.ray import ray_cluster
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.config.http import HttpConfig
from opsd.config.loss import LossConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.engines.groups import in_order
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.errors import ConfigError, StageError
from opsd.preflight import check
from opsd.teacher.pool import TeacherPool
from opsd.teacher.remote.wire import pack_score_request
from opsd.teacher.router import TeacherRouter
from opsd.teacher.sources import DEFAULT, teachers_by_source
from opsd.types import NoScores, Vocabulary
from tests.opsd.builders import answered, scored_rollouts
from tests.teacher_servers import TOKEN, client_token, make_models, teacher_server
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
VOCABULARY = Vocabulary(size=60, stop_ids=(0, 3))  # the models have 64 ids and stop with 0
TOP_K = 6
ROLLOUTS = [item.rollout for item in scored_rollouts([4, 9, 1, 17, 6, 3, 12], VOCABULARY, top_k=5)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=9, num_candidates=1)
QUICK = HttpConfig(backoff_s=0.05, max_backoff_s=0.5, give_up_after_s=2.0, start_timeout_s=2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two teachers, a student, and prompts of two sources."""
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    rows = [{"prompt": f"{a}+{b}=", "data_source": "even" if a % 2 == 0 else "odd"} for a in range(9) for b in range(9)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module", autouse=True)
def cluster(joined):
    with client_token(), ray_cluster(dashboard=False):
        yield


@pytest.fixture(scope="module")
def servers(models):
    """Of "teacher" (a small limit for its requests) and of "other" (one that merges requests)."""
    with ExitStack() as stack:
        small = ["max_rollouts=3", "max_tokens=70", "max_body_mib=1", "teacher.top_k=8"]
        found = {
            "teacher": stack.enter_context(teacher_server(models / "teacher", *small, token=TOKEN)),
            "other": stack.enter_context(teacher_server(models / "other", "max_merged_tokens=9999", token=TOKEN)),
        }
        yield found
        for server in found.values():
            assert server.process.poll() is None, "".join(server.output)


def remote(*urls: str, **settings) -> TeacherConfig:
    return TeacherConfig(backend="http", urls=list(urls), **{"top_k": TOP_K, "http": QUICK, **settings})


STARTED = {}  # by settings


def started(cfg: TeacherConfig):
    if repr(cfg) not in STARTED:
        made = {"vocabulary": VOCABULARY, "device": "cpu", "max_model_tokens": 64}
        pools = {
            source: TeacherPool(teacher_spec(each, **made), role=f"teacher-{len(STARTED)}-{source}")
            for source, each in teachers_by_source(cfg).items()
        }
        pool = TeacherRouter(pools) if cfg.by_source else pools[DEFAULT]
        pool.wait_ready()
        STARTED[repr(cfg)] = pool
    return STARTED[repr(cfg)]


def in_process(path, vocabulary=VOCABULARY) -> TransformersEngine:
    cfg = TeacherConfig(path=str(path), backend="transformers", top_k=TOP_K)
    return TransformersEngine(teacher_spec(cfg, vocabulary=vocabulary, device="cpu", max_model_tokens=64))


@pytest.fixture(scope="module")
def expected(models):
    """name -> the scores of each of ROLLOUTS, which this process computes."""
    return {name: in_process(models / name).score(ROLLOUTS, TOP_K) for name in ("teacher", "other")}


def scored(pool, rollouts=ROLLOUTS):
    """In two groups, the second first."""
    half = len(rollouts) // 2
    places = dict(enumerate(rollouts))
    groups = [{p: r for p, r in places.items() if p >= half}, {p: r for p, r in places.items() if p < half}]
    return answered(pool.begin(groups))


def expect_equal(pairs, expected_scores, atol=1e-4):
    for rollout, wanted, (scored_rollout, scores) in zip(ROLLOUTS, expected_scores, pairs, strict=True):
        assert scored_rollout is rollout
        for name in ("top_logprobs", "sampled_logprobs", "candidate_logprobs"):
            np.testing.assert_allclose(getattr(scores, name), getattr(wanted, name), atol=atol, rtol=0)
        assert scores.top_ids.shape == wanted.top_ids.shape


def test_scores_are_those_of_the_engine_and_large_groups_are_cut_to_the_servers_limits(servers, expected):
    expect_equal(scored(started(remote(servers["teacher"].url))), expected["teacher"])


def test_one_request_is_scored_bit_for_bit_as_in_process(servers, models):
    rollouts = ROLLOUTS[:3]
    pool = started(remote(servers["teacher"].url))
    pairs = answered(pool.begin([dict(enumerate(rollouts))]))
    torch.set_num_threads(1)
    for wanted, (_, scores) in zip(in_process(models / "teacher").score(rollouts, TOP_K), pairs, strict=True):
        for name in ("top_ids", "top_logprobs", "sampled_logprobs", "candidate_logprobs"):
            np.testing.assert_array_equal(getattr(scores, name), getattr(wanted, name))


def test_a_rollout_with_a_foreign_token_is_left_unscored(servers):
    foreign = replace(ROLLOUTS[1], response_ids=np.full_like(ROLLOUTS[1].response_ids, 61))
    pairs = scored(started(remote(servers["teacher"].url)), [ROLLOUTS[0], foreign, *ROLLOUTS[2:]])
    assert [place for place, (_, scores) in enumerate(pairs) if isinstance(scores, NoScores)] == [1]


def test_the_teacher_answers_prompts_as_in_process(servers, models):
    prompts = [replace(rollout.prompt, index=place) for place, rollout in enumerate(ROLLOUTS)]
    pool = started(remote(servers["teacher"].url))
    engine = in_process(models / "teacher")
    for answers, temperature in ((pool.greedy(prompts, 9), 0.0), (in_order(pool.sample(prompts, [5] * 7, 9)), 1.0)):
        sampling = replace(SAMPLING, temperature=temperature)
        wanted = in_order(engine.generate([(prompt, 0, 5) for prompt in prompts], sampling, 0))
        for prompt, answer, reference in zip(prompts, answers, wanted, strict=True):
            assert answer.prompt.index == prompt.index
            assert answer.response_ids.tolist() == reference.response_ids.tolist()
            assert answer.stopped == reference.stopped
            np.testing.assert_allclose(answer.sampled_logprobs, reference.sampled_logprobs, atol=1e-4)


def test_requests_that_wait_are_scored_together(servers, expected):
    url, headers = servers["other"].url, {"Authorization": f"Bearer {TOKEN}"}
    pool = started(remote(url))
    pending = [pool.begin([{place: rollout}]) for _ in range(4) for place, rollout in enumerate(ROLLOUTS)]
    for place, begun in enumerate(pending):
        [(_, scores)] = answered(begun)
        wanted = expected["other"][place % len(ROLLOUTS)]
        np.testing.assert_allclose(scores.sampled_logprobs, wanted.sampled_logprobs, atol=1e-4)
    page = dict(line.rsplit(maxsplit=1) for line in httpx.get(f"{url}/metrics", headers=headers).text.splitlines())
    requests = float(page['opsd_teacher_requests_total{endpoint="/score"}'])
    calls = float(page["opsd_teacher_batch_requests_count"])
    assert requests >= len(pending) and calls < requests / 2


def test_each_source_is_scored_by_its_teacher(servers, expected):
    sources = ["even", "odd", "", "even", "odd", "", "even"]
    rollouts = [
        replace(rollout, prompt=replace(rollout.prompt, data_source=source))
        for rollout, source in zip(ROLLOUTS, sources, strict=True)
    ]
    router = started(remote(servers["teacher"].url, by_source={"odd": servers["other"].url}))
    pending = router.begin([dict(enumerate(rollouts))])
    assert sorted(place for part in pending for place in part.rollouts) == list(range(7))
    for place, (rollout, scores) in enumerate(answered(pending)):
        assert pending[0].is_scored() and rollout is rollouts[place]
        of_teacher, of_other = (expected[name][place].sampled_logprobs for name in ("teacher", "other"))
        wanted = of_other if sources[place] == "odd" else of_teacher
        np.testing.assert_allclose(scores.sampled_logprobs, wanted, atol=1e-4)
        assert np.abs(of_teacher - of_other).max() > 0.1
    prompts = [rollout.prompt for rollout in rollouts]
    alone = {name: started(remote(server.url)).greedy(prompts, 9) for name, server in servers.items()}
    for place, answer in enumerate(router.greedy(prompts, 9)):
        wanted = alone["other" if sources[place] == "odd" else "teacher"][place]
        assert answer.response_ids.tolist() == wanted.response_ids.tolist()
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(*alone.values(), strict=True))


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}])
def test_a_wrong_token_is_401(servers, given):
    url = servers["teacher"].url
    for method, path in (("GET", "/info"), ("POST", "/score"), ("GET", "/metrics")):
        assert httpx.request(method, url + path, headers=given).status_code == 401
    for path in ("/health", "/ready"):
        assert httpx.get(url + path).status_code == 200


def test_oversized_and_malformed_requests_are_refused_and_the_server_lives(servers, expected):
    url, headers = servers["teacher"].url, {"Authorization": f"Bearer {TOKEN}"}
    whole = pack_score_request(ROLLOUTS[:2], TOP_K, VOCABULARY, with_candidates=True)
    for body, status in (
        (b"0" * (2**20 + 1), 413),
        (pack_score_request(ROLLOUTS[:4], TOP_K, VOCABULARY, with_candidates=False), 413),
        (b"garbage" * 99, 400),
        (whole[:-3], 400),
        (pack_score_request(ROLLOUTS[:1], 9, VOCABULARY, with_candidates=False), 422),
        (pack_score_request([with_id(64)], TOP_K, VOCABULARY, with_candidates=False), 422),
        (pack_score_request([with_id(-1)], TOP_K, VOCABULARY, with_candidates=False), 422),
    ):
        refused = httpx.post(f"{url}/score", content=body, headers=headers)
        assert refused.status_code == status
        assert len(refused.json()["error"].splitlines()) == 1
    expect_equal(scored(started(remote(url))), expected["teacher"])


def with_id(token_id: int):
    return replace(ROLLOUTS[2], response_ids=np.array([token_id], np.int32))


def run_config(models, tmp_path, teacher: TeacherConfig, **sections) -> RunConfig:
    file = str(models / "prompts.jsonl")
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        student=StudentConfig(path=str(models / "student")),
        teacher=teacher,
        data=DataConfig(train_path=file, eval_path=file),
        **sections,
    )


def test_preflight_compares_vocabularies_without_the_teachers_folder(servers, models, tmp_path):
    setup = check(run_config(models, tmp_path, remote(servers["teacher"].url)))
    assert (setup.vocabulary.size, setup.vocabulary.stop_ids) == (64, (0,))
    check(run_config(models, tmp_path, remote(servers["teacher"].url), loss=LossConfig(support="union")))
    make_char_tokenizer(tmp_path / "student", eos_token_id=5)
    make_tiny_qwen3(tmp_path / "student", tied=True, seed=0, eos_token_id=5)
    cfg = run_config(models, tmp_path, remote(servers["teacher"].url))
    with pytest.raises(ConfigError, match="does not share the student's ids: .* the first is id 0"):
        check(replace(cfg, student=StudentConfig(path=str(tmp_path / "student"))))


def test_preflight_refuses_what_a_server_cannot_do(servers, models, tmp_path):
    url = servers["teacher"].url
    for teacher, said in (
        (remote(url, top_k=9), "teacher.top_k=9: the server allows 8"),
        (remote(url, servers["other"].url), "must serve the same teacher: .* differ in .*weights_sha256"),
        (remote(url, http=HttpConfig(token_env="TEACHER_TEST_NO_TOKEN")), "/info refuses: 401"),
        (remote("http://127.0.0.1:1"), "http://127.0.0.1:1 is not ready after 2 s: ConnectError"),
        (TeacherConfig(backend="openai", urls=[url]), "teacher.path must name a folder with the served model's"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(run_config(models, tmp_path, teacher))


def test_servers_that_die_cost_no_rollout_leave_no_engine_and_say_why(models, expected):
    """One is killed with requests under way: it is stopped before they are sent. The other loses its engine."""
    with ExitStack() as stack:
        pair = [stack.enter_context(teacher_server(models / "teacher", token=TOKEN)) for _ in range(2)]
        pool = started(remote(*(server.url for server in pair)))
        expect_equal(scored(pool), expected["teacher"])
        children = psutil.Process(pair[0].process.pid).children(recursive=True)
        assert children
        pair[0].process.send_signal(signal.SIGSTOP)
        pending = pool.begin([{place: rollout} for place, rollout in enumerate(ROLLOUTS)])
        deadline = time.monotonic() + 60
        while sum(group.is_scored() for group in pending) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= sum(group.is_scored() for group in pending) < len(pending), "both servers must have had requests"
        assert {group.is_scored() for group in pending} == {True, False}
        pair[0].end()
        expect_equal(answered(pending), expected["teacher"])
        assert all(group.is_scored() for group in pending)
        assert not psutil.wait_procs(children, timeout=60)[1], "a killed server leaves its engine behind"

        [engine] = [c for c in psutil.Process(pair[1].process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        engine.kill()
        body = pack_score_request(ROLLOUTS[:1], TOP_K, VOCABULARY, with_candidates=False)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(f"{pair[1].url}/score", content=body, headers=headers, timeout=60)
        assert (answer.status_code, "engine's process has ended" in answer.text) == (503, True)
        assert pair[1].process.wait(timeout=60) == 2
        with pytest.raises(StageError, match="no teacher server has answered for 2 s") as caught:
            scored(pool)
        assert all(server.url in str(caught.value) for server in pair)
    output = "".join(pair[1].output)
    assert "error: the teacher's engine failed" in output and "Traceback" not in output, output
