"""teacher.by_source: which teacher each prompt has, and every way of getting it wrong."""

import numpy as np
import pytest

from opsd.config.engine import TeacherConfig
from opsd.errors import ConfigError, DataError
from opsd.teacher.sources import DEFAULT, check_sources, source_of, teachers_by_source
from opsd.types import Prompt


def prompts(*sources: str) -> list[Prompt]:
    ids = np.array([1], np.int32)
    return [
        Prompt(index=i, token_ids=ids, text="", answer=None, source="train.jsonl", data_source=source)
        for i, source in enumerate(sources)
    ]


def test_a_value_is_a_folder_an_address_addresses_or_a_mapping():
    cfg = TeacherConfig(
        path="/models/general",
        dtype="bfloat16",
        top_k=8,
        by_source={
            "gsm8k": "/models/maths",
            "code": "http://b:8100",
            "chat": ["https://c:1", "https://d:1"],
            "logic": {"path": "/models/big", "backend": "transformers", "dtype": "float32"},
        },
    )
    teachers = teachers_by_source(cfg)
    assert list(teachers) == [DEFAULT, "gsm8k", "code", "chat", "logic"]
    assert teachers[DEFAULT] is cfg
    assert (teachers["gsm8k"].path, teachers["gsm8k"].backend, teachers["gsm8k"].dtype) == (
        "/models/maths", "vllm", "bfloat16",
    )  # fmt: skip
    assert (teachers["code"].urls, teachers["code"].backend, teachers["code"].path) == (["http://b:8100"], "http", "")
    assert teachers["chat"].urls == ["https://c:1", "https://d:1"]
    assert (teachers["logic"].backend, teachers["logic"].dtype, teachers["logic"].top_k) == (
        "transformers",
        "float32",
        8,
    )


def test_a_section_behind_http_passes_its_backend_to_addresses_but_not_its_urls():
    cfg = TeacherConfig(backend="openai", urls=["http://a"], path="/facts", by_source={"x": {"path": "/m",
                        "backend": "vllm"}, "y": {"path": "/n", "urls": ["http://b"]}})  # fmt: skip
    teachers = teachers_by_source(cfg)
    assert (teachers["x"].urls, teachers["x"].path) == ([], "/m")
    assert (teachers["y"].backend, teachers["y"].urls) == ("openai", ["http://b"])


def test_prompts_go_to_their_source_and_the_others_to_the_default():
    assert source_of(prompts("gsm8k")[0], ["gsm8k", DEFAULT]) == "gsm8k"
    assert source_of(prompts("chat")[0], ["gsm8k", DEFAULT]) == DEFAULT


@pytest.mark.parametrize(
    ("by_source", "said"),
    [
        ({"gsm8k": 3}, "teacher.by_source.gsm8k must be a folder, an address, addresses or a mapping, got 3"),
        ({"gsm8k": {"pth": "/m"}}, "teacher.by_source.gsm8k: .*pth"),
        ({"gsm8k": {"path": "/m", "tensor_parallel_size": "two"}}, "teacher.by_source.gsm8k: .*two"),
        ({"gsm8k": {"backend": "http"}}, "teacher.by_source.gsm8k: teacher.urls and teacher.backend"),
        ({"gsm8k": {"backend": "transformers"}}, "teacher.by_source.gsm8k must have a path or urls"),
        ({"gsm8k": {"path": "/m", "top_k": 3}}, "the section's top_k"),
        ({"gsm8k": ["ftp://b"]}, "must hold addresses such as http://host:8100, got 'ftp://b'"),
    ],
)
def test_a_wrong_teacher_is_refused(by_source, said):
    with pytest.raises(ConfigError, match=said):
        teachers_by_source(TeacherConfig(path="/m", by_source=by_source))


def test_a_prompt_without_a_teacher_is_refused_with_its_row():
    teachers = teachers_by_source(TeacherConfig(by_source={"gsm8k": "/m"}))
    check_sources(prompts("gsm8k", "gsm8k"), teachers)
    with pytest.raises(DataError, match="train.jsonl, row 2: no teacher for data_source 'math': .* has gsm8k"):
        check_sources(prompts("gsm8k", "math"), teachers)


def test_a_teacher_without_a_prompt_is_refused():
    """With a default, a misspelt name would send its prompts there silently."""
    teachers = teachers_by_source(TeacherConfig(path="/d", by_source={"gsm8K": "/m"}))
    with pytest.raises(ConfigError, match="teacher.by_source.gsm8K: no prompt has this data_source"):
        check_sources(prompts("gsm8k"), teachers)


def test_no_teacher_at_all_is_refused():
    with pytest.raises(ConfigError, match="teacher.path must name the teacher's folder"):
        teachers_by_source(TeacherConfig())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "http"}, "teacher.urls and teacher.backend=http or openai need each other"),
        ({"urls": ["http://a"]}, "need each other, got teacher.backend=vllm with 1 urls"),
        ({"backend": "http", "urls": ["a:8100"]}, "got 'a:8100'"),
        ({"backend": "http", "urls": ["http://me:secret@a"]}, r"must hold no user or password \(a\)"),
        ({"backend": "http", "urls": ["http://a"], "follow_decay": 0.9}, "teacher.follow_decay needs one teacher"),
        ({"backend": "http", "urls": ["http://a"], "attention": True}, "teacher.attention=true needs"),
        ({"path": "/m", "by_source": {"x": "/n"}, "follow_decay": 0.9}, "teacher.follow_decay needs one teacher"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        TeacherConfig(**settings)
