"""The token view: every token of a few rollouts as a chip, coloured by quadrant, filled where it was trained on."""

from __future__ import annotations

from html import escape
from typing import Any

from opsd.report.formats import decimal, percent
from opsd.report.read import RunData, weighted_mean

QUADRANTS = {
    1: ("Unsure, teacher disagrees", "A fork in the road, taken differently: the most to learn."),
    2: ("Unsure, teacher agrees", "A real choice, and both models spread their bets alike."),
    3: ("Sure, teacher disagrees", "Overconfident: a mistake that entropy alone misses."),
    4: ("Sure, teacher agrees", "Solved: there is nothing left to learn here."),
}
LEGEND_ORDER = (2, 1, 4, 3)  # rows: entropy high, low; columns: divergence low, high
MAX_STEPS = 12
MAX_TOKENS = 1500  # of one rollout: a browser lays out tens of thousands of chips, not millions
SAMPLE = (
    '<span class="sample"><i class="t q1 kept" style="--w:1;--d:.5">token</i> trained on'
    '<i class="t q1 drop" style="--w:0;--d:.5">token</i> dropped</span>'
)
SPLIT = (
    "The four kinds are split at the medians of all of a step's tokens, kept or not: high is above the median of the "
    "student's entropy, or of the reverse KL."
)
VERDICTS: dict[bool | None, tuple[str, str]] = {True: ("right", "✓ right"), False: ("wrong", "✗ wrong")}
NEWLINE = "\n"
VISIBLE = {" ": "·", "\n": "↵", "\t": "→"}


def token_view(run: RunData) -> str:
    """The whole section; the empty string where the run recorded no rollouts."""
    if not run.rollouts:
        return ""
    steps = _spread(sorted({rollout["step"] for rollout in run.rollouts}), MAX_STEPS)
    shown = [rollout for rollout in run.rollouts if rollout["step"] in steps]
    full_bar = _full_bar(shown)
    groups = "".join(_step_group(step, [r for r in shown if r["step"] == step], full_bar) for step in steps)
    buttons = "".join(f'<button type="button" data-step="{step}">{step}</button>' for step in steps)
    return f"""<section id="tokens">
<h2>Which tokens were trained on</h2>
<p class="lead">Answers that the student wrote during training. A filled token is in the loss, the deeper the heavier;
one with a thin frame only was dropped. The bar under a token is the reverse KL to the teacher, full at
{decimal(full_bar)} nats. {SPLIT} Rest on a token to see its numbers, on a field below to see only its kind.</p>
<div class="tokenview">
{_legend(run)}
<div class="steps" role="group" aria-label="Training step"><b>Step</b>{buttons}{SAMPLE}</div>
{groups}</div></section>"""


def _legend(run: RunData) -> str:
    cells = []
    for quadrant in LEGEND_ORDER:
        name, meaning = QUADRANTS[quadrant]
        share = weighted_mean(run.train, f"quadrant_{quadrant}", "num_tokens")
        kept = _kept_share(run, quadrant)
        cells.append(
            f'<div class="cell q{quadrant}"><b>Q{quadrant}</b> <strong>{name}</strong><p>{meaning}</p>'
            f"<small>{percent(share)} of all tokens, {percent(kept)} of them kept</small></div>"
        )
    return (
        '<div class="legend"><i class="axis x">low divergence</i><i class="axis x">high divergence</i>'
        f'<i class="axis y">high entropy</i>{cells[0]}{cells[1]}'
        f'<i class="axis y">low entropy</i>{cells[2]}{cells[3]}</div>'
    )


def _kept_share(run: RunData, quadrant: int) -> float | None:
    """Over the whole run: each step counts with its number of tokens of that quadrant."""
    lines = [
        {"kept": line[f"kept_quadrant_{quadrant}"], "tokens": line[f"quadrant_{quadrant}"] * line["num_tokens"]}
        for line in run.train
        if None not in (line.get(f"kept_quadrant_{quadrant}"), line.get(f"quadrant_{quadrant}"), line.get("num_tokens"))
    ]
    return weighted_mean(lines, "kept", "tokens")


def _step_group(step: int, rollouts: list[dict[str, Any]], full_bar: float) -> str:
    cards = "".join(_rollout_card(rollout, full_bar) for rollout in rollouts)
    return f'<div class="stepgroup" data-step="{step}"><h3>Step {step}</h3>{cards}</div>\n'


def _rollout_card(rollout: dict[str, Any], full_bar: float) -> str:
    num_tokens = len(rollout["tokens"])
    num_kept = sum(1 for weight in rollout["weight"] if weight)
    verdict = VERDICTS.get(rollout.get("correct"), ("", "not graded"))
    facts = [f"<b>{num_kept}</b> of {num_tokens} tokens kept"]
    if rollout.get("answer") is not None:
        facts.append(f"reference answer <b>{escape(printable(str(rollout['answer'])))}</b>")
    if not rollout.get("stopped", True):
        facts.append('<span class="cut">cut at the length limit</span>')
    hidden = num_tokens - MAX_TOKENS
    more = f'<span class="more">… {hidden:,} more tokens</span>' if hidden > 0 else ""
    prompt = escape(printable(str(rollout.get("prompt", "")), keep="\n\t"))
    return f"""<article class="rollout">
<header><span class="verdict {verdict[0]}">{verdict[1]}</span><span>{"</span><span>".join(facts)}</span></header>
<div class="prompt">{prompt}</div>
<div class="chips">{_chips(rollout, full_bar)}{more}</div></article>"""


def _chips(rollout: dict[str, Any], full_bar: float) -> str:
    top_weight = max((weight or 0.0 for weight in rollout["weight"]), default=0.0) or 1.0
    columns = (rollout[name][:MAX_TOKENS] for name in ("tokens", "entropy", "reverse_kl", "quadrant", "weight"))
    chips = [
        _chip(str(token), entropy, divergence, int(quadrant), weight or 0.0, top_weight, full_bar)
        for token, entropy, divergence, quadrant, weight in zip(*columns, strict=True)
    ]
    for place, text in rollout.get("between") or []:  # of tools
        if place < len(chips):
            chips[place] = f'<span class="tool">{escape(printable(str(text), keep=NEWLINE))}</span>{chips[place]}'
    return "".join(chips)


def _chip(
    token: str,
    entropy: float | None,
    divergence: float | None,
    quadrant: int,
    weight: float,
    top_weight: float,
    full_bar: float,
) -> str:
    """One token. Everything that comes from the run is either escaped text or a formatted number."""
    kept = weight > 0
    fate = f"kept, weight {decimal(weight)}" if kept else "dropped"
    title = (
        f"Q{quadrant} {QUADRANTS[quadrant][0].lower()}\nentropy h {decimal(entropy)}\n"
        f"reverse KL {decimal(divergence)} nats\n{fate}"
    )
    bar = min(1.0, (divergence or 0.0) / full_bar)
    text = "".join(f"<s>{VISIBLE[c]}</s>" if c in VISIBLE else escape(printable(c)) for c in token) or "<s>∅</s>"
    line_break = "<br>" if token.endswith("\n") else ""
    return (
        f'<i class="t q{quadrant} {"kept" if kept else "drop"}" style="--w:{weight / top_weight:.2f};--d:{bar:.2f}" '
        f'title="{title}">{text}</i>{line_break}'
    )


def printable(text: str, keep: str = "") -> str:
    """Control, bidirectional and other invisible characters as \\u escapes: model output must not reorder the page."""
    return "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text)


def _full_bar(rollouts: list[dict[str, Any]]) -> float:
    """The reverse KL that fills a bar: the 95th percentile of the tokens shown, so that one outlier flattens none."""
    values = sorted(value for rollout in rollouts for value in rollout["reverse_kl"] if value is not None)
    return max(values[int(0.95 * (len(values) - 1))], 1e-3) if values else 1.0


def _spread(steps: list[int], limit: int) -> list[int]:
    """At most `limit` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= limit:
        return steps
    return [steps[round(place * (len(steps) - 1) / (limit - 1))] for place in range(limit)]
