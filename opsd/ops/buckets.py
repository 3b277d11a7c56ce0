"""The sparse head's public names stay here for those who import them; they are defined in `opsd.ops.head.loss`."""

from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss

__all__ = ["bucket_logprobs", "sparse_head_loss"]
