"""`python -m tip.train`: opsd's training loop with token importance patched in.

For example `python -m tip.train selector=entropy selector.ratio=0.2 output_dir=... student.path=...`.
"""

from opsd.train import launch
from tip.config import TipRunConfig


def main() -> None:
    launch(TipRunConfig, "tip.conf", "tip")


if __name__ == "__main__":
    main()
