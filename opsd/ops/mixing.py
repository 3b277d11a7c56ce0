"""Inputs between two sequences."""
# L tokens, D width

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mixed_embeddings(
    embed: Callable[[Tensor], Tensor], token_ids_L: Tensor, other_ids_L: Tensor, own_share_L: Tensor
) -> Tensor:
    """share * embedding(token) + (1 - share) * embedding(other), [L, D]; leading dimensions may stand before L.

    `embed` is the model's own table, so that two models mix the same sequences each in its own space. Source: MixKD,
    arXiv 2011.00593, section 3.1.
    """
    own_LD = embed(token_ids_L)
    other_share_L1 = (1.0 - own_share_L).to(own_LD.dtype)[..., None]
    return own_LD + other_share_L1 * (embed(other_ids_L) - own_LD)
