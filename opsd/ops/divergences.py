"""DIVERGENCES stays here for those who import it; it is defined in `opsd.ops.losses.divergences`."""

from opsd.ops.losses.divergences import DIVERGENCES

__all__ = ["DIVERGENCES"]
