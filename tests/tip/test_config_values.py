"""The options of token importance are looked through as every other setting is."""

import math

import pytest
from omegaconf import OmegaConf

from opsd.config.run import compose_config
from opsd.errors import ConfigError
from tip.config import TipRunConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adjust": {"reward": {"beta": -math.inf}}}, "adjust.reward.beta must be a finite number, got -inf"),
        ({"filters": {"horizon": {"ends": [1, math.nan]}}}, "filters.horizon.ends[1] must be a finite number, got nan"),
    ],
)
def test_a_number_that_is_none_is_named_wherever_it_stands(settings, said):
    required = {"output_dir": "out", "student": {"path": "s"}, "data": {"train_path": "a"}}
    merged = OmegaConf.merge(OmegaConf.create(required), OmegaConf.create(settings))
    with pytest.raises(ConfigError) as refused:
        compose_config(merged, TipRunConfig)
    assert str(refused.value).startswith(said)
