"""What the hooks of a TIP run say on stderr: that a comparison of the models stands on little mass."""

import dataclasses

import pytest
import torch

from tests.tip.test_plugin import by_entropy, make_batch
from tip.config import SelectorConfig, TipRunConfig
from tip.plugin import build_hooks
from tip.scores import SCORES


def with_mass(batch, mass):
    named_mass_T = torch.full((len(batch.tokens),), mass)
    return dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, named_mass_T=named_mass_T))


@pytest.mark.parametrize("score", ["divergence", "soft_or", "q3"])
def test_a_comparison_on_little_mass_is_said_once(score, capsys):
    hooks = build_hooks(TipRunConfig(selector=SelectorConfig(score=score)))
    hooks.select(with_mass(make_batch(), 0.95))
    assert capsys.readouterr().err == ""
    hooks.select(with_mass(make_batch(step=6), 0.31))
    [line] = capsys.readouterr().err.splitlines()
    said = f"selector.score={score}: the models are compared on tokens that hold 0.31 of"
    assert line.startswith(f"warning: step 7: {said}")
    hooks.select(with_mass(make_batch(step=7), 0.2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"selector": SelectorConfig(score="entropy")}, ""),
        ({"selector": SelectorConfig(score="random")}, ""),
        ({"selector": SelectorConfig(name="all")}, ""),
        ({"selector": SelectorConfig(score="mine")}, "selector.score=mine"),
        ({"selector": SelectorConfig(name="all"), "adjust": {"temperature": {}}}, "adjust.temperature"),
        ({"adjust": {"temperature": {}}}, "selector.score=soft_or and adjust.temperature"),
    ],
)
def test_only_a_comparison_is_said(settings, said, monkeypatch, capsys):
    monkeypatch.setitem(SCORES, "mine", by_entropy)
    batch = with_mass(make_batch(), 0.5)
    distance_T = batch.tokens.reverse_kl_T
    batch = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, extra={"hellinger_T": distance_T}))
    build_hooks(TipRunConfig(**settings)).select(batch)
    line = capsys.readouterr().err
    assert line.startswith(f"warning: step 1: {said}: the models are compared") if said else line == ""
