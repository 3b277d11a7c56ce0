"""The report as one HTML file, which asks the network for nothing: headline numbers, curves, tokens, time, settings."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path
from typing import Any

from opsd.report.formats import NOT_MEASURED, count, decimal, duration, nats, percent
from opsd.report.plots import CHARTS, PHASE_COLOURS, render_svg
from opsd.report.read import RunData, weighted_mean
from opsd.report.token_view import token_view
from opsd.run_folder import flat

HERE = Path(__file__).parent
CHARTS_WITH_OWN_PLACE = ("phases", "idle")


def render_page(run: RunData) -> str:
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = escape(run.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} – distillation report</title>
<style>{style}</style>
</head>
<body>
<main>
<header class="top"><p class="kind">On-policy distillation</p><h1>{name}</h1>{_subtitle(run)}</header>
{"" if run.finished else '<p class="notice">This run has not finished: the numbers below are those so far.</p>'}
{_headline(run)}
{_curves(run)}
{token_view(run)}
{_time(run)}
{_settings(run)}
</main>
<div id="tip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def _subtitle(run: RunData) -> str:
    """Models, which tokens were trained on, objective and seed, as far as the config names them."""
    config = run.summary.get("config") or {}
    teacher, loss, selector = (config.get(section) or {} for section in ("teacher", "loss", "selector"))
    others = [f"{source}: {value}" for source, value in (teacher.get("by_source") or {}).items()]
    chosen = selector.get("name")
    if chosen and chosen != "all":
        chosen = f"{selector.get('score')} ({chosen})"
    support = run.summary.get("support") or loss.get("support")
    if loss.get("payload") == "hidden":
        support = "every token (hidden states)"
    elif loss.get("residual"):
        support = f"{support}, with the residual"
    facts = [
        ("student", (config.get("student") or {}).get("path")),
        ("trains", _adapter(run.summary.get("lora"))),
        ("teacher", ", ".join([*filter(None, [teacher.get("path")]), *(teacher.get("urls") or []), *others])),
        ("selector", chosen),
        ("ratio", selector.get("ratio")),
        ("loss", loss.get("divergence")),
        ("support", support),
        ("seed", run.summary.get("seed")),
    ]
    facts = [(label, value) for label, value in facts if value not in (None, "")]
    spans = "".join(f"<span>{label} <b>{escape(str(value))}</b></span>" for label, value in facts)
    return f'<p class="sub">{spans}</p>'


def _adapter(lora: dict[str, Any] | None) -> str | None:
    """In words; None where the student itself trains."""
    if not lora:
        return None
    return f"LoRA of rank {lora['rank']}, {count(lora['parameters_trained'])} of {count(lora['parameters'])} parameters"


def _headline(run: RunData) -> str:
    summary = run.summary
    startup_s, generated = summary.get("startup_s"), summary.get("tokens_generated")
    loop_s = sum((summary.get("phase_s") or {}).values())
    speed = generated / loop_s if generated is not None and loop_s else None
    agreement = _change(percent(summary.get("top1_agreement_before")), percent(summary.get("top1_agreement_after")))
    tiles: tuple[tuple[str, str, str], ...] = (
        ("Kept tokens", percent(summary.get("kept_ratio")), f"{count(summary.get('tokens_trained'))} trained on"),
        ("Top-1 agreement", agreement, "with the teacher"),
        ("Steps", count(summary.get("steps")), "of the optimiser"),
        ("Wall time", duration(summary.get("wall_s")), f"start-up {duration(startup_s)}"),
        ("Throughput", f"{count(speed)}<small> tok/s</small>", f"{count(generated)} tokens generated"),
    )
    tiles += _tools_tile(run)
    cells = "".join(
        f'<div class="tile"><h3>{label}</h3><p class="value">{value}</p><p class="note">{note}</p></div>'
        for label, value, note in tiles
    )
    cards = _accuracy_card(summary) + _kl_card(summary)
    return f'<section class="headline">{cards}<div class="tiles">{cells}</div></section>'


def _tools_tile(run: RunData) -> tuple[tuple[str, str, str], ...]:
    """Over all steps; none for a run without tools."""
    lines = [line for line in run.train if line.get("tools/trajectories")]
    if not lines:
        return ()
    turns = weighted_mean(lines, "tools/turns", "tools/trajectories")
    calls, failed = (sum(line.get(name) or 0 for line in lines) for name in ("tools/calls", "tools/failed"))
    return (("Turns", decimal(turns), f"per trajectory; {count(calls)} calls of tools, {count(failed)} failed"),)


def _accuracy_card(summary: dict[str, Any]) -> str:
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    teacher = summary.get("teacher_accuracy")
    notes, span = [], ""
    if before is not None and after is not None:
        span = f'<u style="left:{100 * min(before, after):.2f}%;width:{100 * abs(after - before):.2f}%"></u>'
        notes.append(_signed(f"{100 * (after - before):+.1f} points"))
        if teacher is not None and teacher > before:
            notes.append(f"{_signed(f'{(after - before) / (teacher - before):.0%}')} of the way to the teacher")
    marks = "".join(
        f'<i class="{kind}" style="left:{100 * value:.2f}%"></i>'
        for kind, value in (("teacher", teacher), ("before", before), ("after", after))
        if value is not None
    )
    return f"""<div class="card"><h3>Accuracy, before → after</h3>
<p class="big">{_change(percent(before), percent(after))}</p>
<p class="note">{" · ".join(notes) or "not measured before and after"}</p>
<div class="track">{span}{marks}</div>
<p class="key"><span class="before">before {percent(before)}</span><span class="after">after {percent(after)}</span>
<span class="teacher">teacher {percent(teacher)}</span></p></div>"""


def _kl_card(summary: dict[str, Any]) -> str:
    before, after = summary.get("reverse_kl_before"), summary.get("reverse_kl_after")
    note, bars = "not measured before and after", ""
    if before and after is not None:
        note = f"{_signed(f'{(after - before) / before:+.0%}')}, nats per token on held-out prompts"
        top = max(before, after)
        bars = "".join(
            f'<span>{label}</span><div><i class="{label}" style="width:{100 * value / top:.2f}%"></i></div>'
            for label, value in (("before", before), ("after", after))
        )
    return f"""<div class="card"><h3>Reverse KL to the teacher</h3>
<p class="big">{_change(nats(before), nats(after))}</p>
<p class="note">{note}</p><div class="bars">{bars}</div></div>"""


def _change(before: str, after: str) -> str:
    return f'<span class="was">{before}</span> <span class="to">→</span> <span class="now">{after}</span>'


def _signed(number: str) -> str:
    """With a minus sign, which a hyphen is too short to be."""
    return number.replace("-", "−")


def _curves(run: RunData) -> str:
    figures = "".join(_figure(name, run) for name in CHARTS if name not in CHARTS_WITH_OWN_PLACE)
    return f'<section><h2>Curves</h2><div class="curves">{figures}</div></section>'


def _figure(name: str, run: RunData) -> str:
    chart = CHARTS[name]
    wide = ' class="wide"' if chart.wide else ""
    return (
        f"<figure{wide}><figcaption><b>{chart.title}</b><span>{chart.note}</span></figcaption>"
        f"{render_svg(chart, run, name)}</figure>"
    )


def _time(run: RunData) -> str:
    seconds = {name: value for name, value in (run.summary.get("phase_s") or {}).items() if value is not None}
    total = sum(seconds.values())
    if total <= 0:
        return ""
    order = [name for name in (*PHASE_COLOURS, "other") if seconds.get(name, 0) > 0]
    bar, key = "", ""
    for name in order:
        colour, share = "c-" + PHASE_COLOURS.get(name, "grey"), seconds[name] / total
        bar += f'<i class="{colour}" style="flex-grow:{share:.4f}"></i>'
        key += f'<li class="{colour}"><b>{name}</b> {duration(seconds[name])} <span>{percent(share)}</span></li>'
    return f"""<section><h2>Where the time went</h2><div class="card"><div class="phasebar">{bar}</div>
<ul class="phasekey">{key}</ul>{_figure("phases", run)}{_figure("idle", run)}</div></section>"""


def _settings(run: RunData) -> str:
    config, versions = run.summary.get("config") or {}, run.summary.get("versions") or {}
    commit = run.summary.get("git_commit")
    if commit:
        versions = {**versions, "git commit": commit}
    blocks = []
    if config:
        blocks.append(f"<details><summary>Config</summary>{_table(flat(config))}</details>")
    if versions:
        blocks.append(f"<details open><summary>Versions</summary>{_table(versions)}</details>")
    return f'<section class="settings"><h2>How it was made</h2>{"".join(blocks)}</section>' if blocks else ""


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{NOT_MEASURED if value is None else escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"
