"""The head's public names stay here for those who import them; see `opsd.ops.head.loss` and `opsd.ops.head.exact`."""

from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss

__all__ = ["bucket_logprobs", "exact_head_loss", "sparse_head_loss"]
