"""`python -m tip.plan`: `python -m opsd.plan` for a run of `python -m tip.train`, whose settings it takes."""

from opsd.plan.program import launch
from tip.config import TipRunConfig

if __name__ == "__main__":
    launch(TipRunConfig, "tip.conf", "tip")
