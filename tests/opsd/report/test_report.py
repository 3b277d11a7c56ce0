"""The report of a run: what a reader relies on in report.html and its PNGs."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from matplotlib.image import imread

from opsd.errors import DataError
from opsd.monitor.jsonl import append_jsonl
from opsd.report.build import build_report
from opsd.report.formats import decimal, duration
from opsd.report.page import render_page
from opsd.report.read import read_run
from opsd.report.token_view import token_view

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
TOKENS = ["7", " +", "\n", "\t", "<b>", "", ATTACK, "\u202e"]
KEPT = (0, 2, 6)


def train_line(step):
    quadrants = {f"quadrant_{q}": 0.25 for q in (1, 2, 3, 4)} | {f"kept_quadrant_{q}": 0.2 * q for q in (1, 2, 3, 4)}
    phases = {f"phase_s/{name}": 0.5 for name in ("rollout", "score", "select", "learn", "sync", "evaluate")}
    return {
        "step": step, "loss": 1.0 / step, "kept_ratio": 0.5, "reverse_kl": 0.6, "entropy": 0.2, "response_length": 30.0,
        "named_mass": 0.7,
        "truncated": 0.1, "accuracy_train": None, "grad_norm": 1.0, "learning_rate": 1e-3, "num_tokens": 100,
        "num_kept": 50, "dropped": 0, "tokens_per_s": 900.0, **quadrants, **phases,
    }  # fmt: skip


def rollout_line(step, **changed):
    size = len(TOKENS)
    return {
        "step": step, "prompt": f"7+3+9? {ATTACK}", "answer": ATTACK, "correct": True, "stopped": True,
        "tokens": TOKENS, "entropy": [0.125] * size, "reverse_kl": [1.5] * size,
        "quadrant": [1, 2, 3, 4] * (size // 4), "weight": [0.75 if place in KEPT else 0 for place in range(size)],
        **changed,
    }  # fmt: skip


def summary():
    return {
        "accuracy_before": 0.312, "accuracy_after": 0.741, "teacher_accuracy": 0.862, "reverse_kl_before": 0.68,
        "reverse_kl_after": 0.098, "top1_agreement_before": 0.71, "top1_agreement_after": 0.903, "steps": 300,
        "tokens_generated": 690_000, "tokens_scored": 690_000, "tokens_trained": 345_000, "kept_ratio": 0.437,
        "wall_s": 625.0, "startup_s": 25.0, "phase_s": {"rollout": 300.0, "learn": 240.0, "other": 60.0},
        "versions": {"torch": "2.13.0"}, "config": {"student": {"path": "models/pupil"}, "note": ATTACK},
        "seed": 7, "git_commit": "4f2a9c1d",
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    """One report for all the tests that only look at it."""
    return build_report(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def page(report_path):
    return Page(report_path.read_text(encoding="utf-8"))


def write_run(tmp_path):
    """Three steps, evaluations at 0 and 3, two steps with rollouts."""
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 0, "eval/accuracy": 0.312, "eval/reverse_kl": 0.68})
    for step in (1, 2, 3):
        append_jsonl(tmp_path / "metrics.jsonl", train_line(step))
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 3, "eval/accuracy": 0.741, "eval/reverse_kl": None})
    for step in (1, 3):
        append_jsonl(tmp_path / "tokens.jsonl", rollout_line(step))
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    return tmp_path


class Page(HTMLParser):
    """The page as a browser sees it: its elements, its text outside style and script, its token chips."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.chips, self._text, self._inside = [], [], [], None
        self.feed(source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag in ("script", "style"):
            self._inside = tag
        if tag == "i" and (attributes.get("class") or "").startswith("t q") and "title" in attributes:
            self.chips.append({**attributes, "text": ""})

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None
        if tag == "i" and self.chips:
            self.chips[-1]["closed"] = True

    def handle_data(self, data):
        if self._inside is None:
            self._text.append(data)
            if self.chips and not self.chips[-1].get("closed"):
                self.chips[-1]["text"] += data


def test_the_headline_numbers_are_shown(page):
    for shown in (
        "31.2% → 74.1%", "+42.9 points", "78% of the way to the teacher", "teacher 86.2%", "0.680 → 0.098", "−86%",
        "71.0% → 90.3%", "43.7%", "345,000 trained on", "Steps 300", "10 min 25 s start-up 25 s",
        "1,150 tok/s", "pupil",
    ):  # fmt: skip
        assert shown in page.text, shown


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ({"name": "top_ratio", "score": "soft_or", "ratio": 0.5}, "selector soft_or (top_ratio) ratio 0.5 loss jsd"),
        ({"name": "all", "score": "soft_or", "ratio": 1.0}, "selector all ratio 1.0 loss jsd"),
        (None, "loss jsd"),  # a run of opsd.train
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_the_head_names_models_selector_and_ratio_also_while_the_run_goes_on(run_dir, selector, said, finished):
    config = {
        "student": {"path": "models/pupil"}, "teacher": {"path": "/models/big"}, "loss": {"divergence": "jsd"},
        "seed": 7, **({"selector": selector} if selector else {}),
    }  # fmt: skip
    (run_dir / "summary.json").unlink()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        (run_dir / "summary.json").write_text(json.dumps({**summary(), "config": config, "support": "union"}))
    text = Page(render_page(read_run(run_dir))).text
    assert f"student models/pupil teacher /models/big {said}" in text
    assert ("support union" in text) == finished


def test_dropped_tokens_can_be_read_and_the_split_of_the_quadrants_is_said(page, report_path):
    source = report_path.read_text()
    assert "line-through" not in source
    rule = source.partition(".t.drop {")[2].partition("}")[0]
    assert "box-shadow" in rule and not re.search(r"(^|;)\s*(color|opacity|text-decoration):", rule)
    assert "split at the medians of all of a step's tokens" in page.text


def test_phase_times_config_and_versions_are_shown(page):
    for shown in ("rollout 5 min 00 s 50.0%", "learn 4 min 00 s 40.0%", "other 1 min 00 s 10.0%"):
        assert shown in page.text, shown
    for shown in ("student.path models/pupil", "torch 2.13.0", "git commit 4f2a9c1d"):
        assert shown in page.text, shown


def test_every_token_is_a_chip_with_its_quadrant_its_fate_and_its_numbers(page):
    assert len(page.chips) == 2 * len(TOKENS)
    for place, chip in enumerate(page.chips[: len(TOKENS)]):
        quadrant, kept = place % 4 + 1, place in KEPT
        assert chip["class"].split() == ["t", f"q{quadrant}", "kept" if kept else "drop"]
        assert f"Q{quadrant} " in chip["title"]
        assert "entropy h 0.125" in chip["title"]
        assert "reverse KL 1.50 nats" in chip["title"]
        assert ("kept, weight 0.750" if kept else "dropped") in chip["title"]


def test_invisible_tokens_can_be_seen_and_the_others_read_as_they_are(page):
    shown = [chip["text"] for chip in page.chips[: len(TOKENS)]]
    assert shown == ["7", "·+", "↵", "→", "<b>", "∅", ATTACK.replace(" ", "·"), "\\u202e"]


def test_a_heavier_token_is_filled_deeper(run_dir):
    (run_dir / "tokens.jsonl").unlink()
    append_jsonl(run_dir / "tokens.jsonl", rollout_line(1, weight=[0, 0.5, 2, 1, 0, 0, 0, 0]))
    fills = [re.search(r"--w:([\d.]+)", chip["style"])[1] for chip in Page(token_view(read_run(run_dir))).chips]
    assert fills == ["0.00", "0.25", "1.00", "0.50", "0.00", "0.00", "0.00", "0.00"]


def test_the_legend_says_the_share_of_each_quadrant_and_how_much_was_kept(page):
    for quadrant, kept in ((1, 20), (2, 40), (3, 60), (4, 80)):
        assert re.search(rf"Q{quadrant} (Unsure|Sure)[^%]*25\.0% of all tokens, {kept}\.0% of them kept", page.text)


def test_text_of_a_run_cannot_become_html(page):
    """ATTACK stands in a prompt, an answer, a token and the config; the page's own script is the only one."""
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(ATTACK) == 2 * 2 + 1  # prompt and answer of two rollouts, config; a token has · for a space


def test_the_page_asks_for_nothing_outside_itself(report_path, page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, name, attributes[name])
    source = report_path.read_text(encoding="utf-8")
    assert set(re.findall(r"url\((.)", source)) <= {"#"}
    assert "@import" not in source
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_curves_take_the_colours_of_the_page_so_that_dark_mode_reaches_them(report_path):
    source = report_path.read_text(encoding="utf-8")
    charts = re.findall(r'<svg class="chart".*?</svg>', source, re.DOTALL)
    assert len(charts) == 15
    assert all("var(--" in chart for chart in charts)
    fixed = [colour for chart in charts for colour in re.findall(r"(?:fill|stroke): (#\w+)", chart)]
    assert fixed == []
    ids = re.findall(r' id="([^"]+)"', "".join(re.findall(r"<(?:clipPath|path) id=[^>]*>", "".join(charts))))
    assert len(ids) == len(set(ids))


def test_pngs_are_pictures_and_not_blank(report_path):
    for name in ("accuracy", "loss", "kl", "length", "phases", "kept"):
        pixels = imread(report_path.parent / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.01, f"{name}.png is blank"


def test_one_step_without_evaluations_tokens_or_accuracies_works(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", train_line(1))
    (tmp_path / "summary.json").write_text(
        json.dumps({**summary(), "accuracy_before": None, "accuracy_after": None, "teacher_accuracy": None, "steps": 1})
    )
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert page.chips == []
    assert "– → –" in page.text
    assert "not measured in this run" in page.text
    assert imread(tmp_path / "accuracy.png").size > 0


def test_a_run_still_going_on_shows_what_there_is(run_dir):
    (run_dir / "summary.json").unlink()
    text = Page(render_page(read_run(run_dir))).text
    assert "has not finished" in text
    assert "31.2% → 74.1%" in text
    assert "50.0%" in text  # kept


def test_a_run_killed_before_its_first_step_has_a_report_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "not measured in this run" in Page(build_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_long_run_shows_some_steps_the_first_and_the_last_among_them(run_dir):
    (run_dir / "tokens.jsonl").unlink()
    for step in range(10, 1001, 10):
        append_jsonl(run_dir / "tokens.jsonl", rollout_line(step))
    elements = Page(token_view(read_run(run_dir))).elements
    steps = [int(attributes["data-step"]) for tag, attributes in elements if tag == "button"]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (10, 1000)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        build_report(tmp_path)


def test_lists_of_different_lengths_are_named(run_dir):
    append_jsonl(run_dir / "tokens.jsonl", rollout_line(5, weight=[1.0]))
    with pytest.raises(DataError, match=r"tokens\.jsonl, line 3.*'weight': 1"):
        build_report(run_dir)


@pytest.mark.slow  # a process of its own that imports torch
def test_the_command_rebuilds_a_report_and_says_what_is_wrong(run_dir, tmp_path):
    command = [sys.executable, "-m", "opsd.report"]
    good = subprocess.run([*command, str(run_dir)], capture_output=True, text=True)
    assert good.stdout.strip() == str(run_dir / "report.html")
    bad = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "–"), (0.03, "30 ms"), (9.94, "9.9 s"), (59.7, "1 min 00 s"), (7503, "2 h 05 min")]
)
def test_durations_read_naturally(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (0, "0"), (0.01234, "0.0123"), (123.4, "123")])
def test_decimals_have_three_digits(value, shown):
    assert decimal(value) == shown
