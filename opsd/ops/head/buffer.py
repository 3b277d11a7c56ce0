"""The large memory of the output head's backward: the weight's gradient, and the shares of the chunk at hand.

A chunk of rows goes through the blocks of the vocabulary twice: forth, when the shares of each block are put here, and
back, when they are taken, block after block, and what is made of them is added to the weight's gradient. While the
first chunk is under way that holds nothing yet, so there the shares wait in its own memory, at the end:

    all put    [        free         | shares 0 | shares 1 | shares 2 ]
    0 added    [ gradient 0 |          free     | shares 1 | shares 2 ]
    1 added    [ gradient 0 | gradient 1 |      free       | shares 2 ]

Where all shares fit, the gradient of a block, however wide it is, ends before the shares of the next one begin. That
holds only as long as the blocks come in order: `HeadBuffer` keeps it.
"""
# N rows of a chunk, D width, V rows of the weight, C columns of a block

from __future__ import annotations

import torch
from torch import Tensor


class HeadBuffer:
    """The weight's gradient [V, D], where it is needed, and of one chunk the shares [N, C] of each block.

    The order: `begin`; `put` for each block, from the first column on; then, for each block in the same order, `take`
    and `gradient_of`; after the last block `begin` for the next chunk, or `result`. Between the last `put` and the
    first `take`, `revise` gives any block's shares to be read and changed. `drop` ends a chunk whose gradient nobody
    needs. Any other use is a bug of this package: AssertionError. A block's shares are valid until its `gradient_of`,
    which may be written over them.
    """

    def __init__(
        self, weight_VD: Tensor, *, vocab_size: int, dtype: torch.dtype, needs_gradient: bool, in_blocks: bool
    ) -> None:
        """`dtype`: of shares and gradient. `in_blocks` False: the whole vocabulary is one block.

        What is made of such a block takes the place of its shares, which therefore never wait in the gradient.
        """
        self.vocab_size, self.in_blocks = vocab_size, in_blocks
        self.gradient_VD = weight_VD.new_empty(weight_VD.shape, dtype=dtype) if needs_gradient else None
        self.apart = weight_VD.new_empty(0, dtype=dtype)  # for shares alone; kept, as fresh pages cost time
        self.shares = self.apart  # of the chunk at hand, flat, block after block
        self.num_chunks = self.num_rows = 0
        # The column where each pass through the chunk goes on; at the end all three are `vocab_size`.
        self.put_next = self.take_next = self.gradient_next = vocab_size

    def begin(self, num_rows: int) -> None:
        """Makes room for the shares of a chunk."""
        self._expect(self.gradient_next == self.vocab_size, "a chunk begins")
        size = num_rows * self.vocab_size
        is_first = self.num_chunks == 0
        if self.gradient_VD is not None and self.in_blocks and is_first and size <= self.gradient_VD.numel():
            self.shares = self.gradient_VD.view(-1)[self.gradient_VD.numel() - size :]
        else:
            if self.apart.numel() < size:
                self.apart = self.apart.new_empty(size)
            self.shares = self.apart[:size]
        self.num_chunks, self.num_rows = self.num_chunks + 1, num_rows
        self.put_next = self.take_next = self.gradient_next = 0

    def put(self, columns: slice) -> Tensor:
        """Where the shares [N, C] of the next block are to be written."""
        self._expect(columns.start == self.put_next and self.take_next == 0, "shares are put", columns)
        self.put_next = columns.stop
        return self._shares_of(columns)

    def revise(self, columns: slice) -> Tensor:
        """The shares [N, C] of a block, once all are put and none is taken."""
        self._expect(self.put_next == self.vocab_size and self.take_next == 0, "shares are revised", columns)
        return self._shares_of(columns)

    def drop(self) -> None:
        """Ends the chunk without a gradient."""
        self._expect(self.gradient_VD is None, "shares are dropped")
        self.put_next = self.take_next = self.gradient_next = self.vocab_size

    def take(self, columns: slice) -> Tensor:
        """The shares [N, C] of the next block."""
        is_all_put = self.put_next == self.vocab_size
        is_next = columns.start == self.take_next == self.gradient_next
        self._expect(is_all_put and is_next, "shares are taken", columns)
        self.take_next = columns.stop
        return self._shares_of(columns)

    def gradient_of(self, columns: slice) -> Tensor | None:
        """The gradient [C, D] of the block that was taken last, to be added to; None where the weight needs none.

        In the first chunk it holds nothing yet, not even zeros.
        """
        is_next = columns.start == self.gradient_next and columns.stop == self.take_next
        self._expect(is_next, "a gradient is written", columns)
        self.gradient_next = columns.stop
        return None if self.gradient_VD is None else self.gradient_VD[columns]

    @property
    def is_first_chunk(self) -> bool:
        return self.num_chunks == 1

    def result(self) -> Tensor | None:
        """The weight's gradient; None where it needs none. 0 in its padding, and everywhere where no chunk came."""
        self._expect(self.gradient_next == self.vocab_size, "the result is taken")
        if self.gradient_VD is not None:
            self.gradient_VD[self.vocab_size if self.num_chunks > 0 else 0 :].zero_()
        return self.gradient_VD

    def _shares_of(self, columns: slice) -> Tensor:
        part = self.shares[self.num_rows * columns.start : self.num_rows * columns.stop]
        return part.view(self.num_rows, -1)

    def _expect(self, is_in_order: bool, what: str, columns: slice | None = None) -> None:
        where = "" if columns is None else f" for columns {columns.start}..{columns.stop}"
        assert is_in_order, (
            f"out of order: {what}{where}, with shares put up to {self.put_next}, taken up to {self.take_next} and "
            f"gradients written up to {self.gradient_next} of {self.vocab_size} columns"
        )


def rows_in_gradient(weight_VD: Tensor, vocab_size: int) -> int:
    """How many rows' shares the gradient of the weight has room for."""
    return weight_VD.numel() // vocab_size
