"""Read the micro batches of an iteration: which rank reads which sample, and the tensors.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_ext.data.batch import Batch, share_batch
from megatron_ext.data.blend import Samples
from megatron_ext.parallel.groups import Place


def micro_batch_samples(
    first: int, *, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> list[range]:
    """List the samples that one data-parallel rank reads in an iteration, one range per micro batch.

    Iteration samples are `first .. first + global_batch_size`, dealt in blocks of a micro batch: rank r takes the
    blocks r, r + data_size, … So the union over ranks does not depend on their number.
    """
    stride = micro_batch_size * data_size
    assert global_batch_size % stride == 0, (global_batch_size, micro_batch_size, data_size)
    start = first + data_rank * micro_batch_size
    return [range(at, at + micro_batch_size) for at in range(start, start + global_batch_size, stride)]


class Loader:
    """Delivers the micro batches of this rank, on its device."""

    def __init__(
        self,
        samples: Samples,
        place: Place,
        *,
        micro_batch_size: int,
        seq_length: int,
        document_end: int | None = None,
    ) -> None:
        """Read from samples.

        Args:
            samples: what to read.
            place: this rank's coordinates.
            micro_batch_size: b.
            seq_length: s.
            document_end: id after which a new document begins, which sees nothing of those before it; None: a sample
                is one piece.
        """
        self.samples = samples
        self.document_end = document_end
        self._place = place
        self._micro_batch_size = micro_batch_size
        self._seq_length = seq_length
        self.delivered: list[int] = []
        """Samples that this rank has read in the newest iteration, in the order of reading; blanks left out. Empty on a
        rank that is given its batches by another."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and length of the tokens of a micro batch: (b, s), or (1, b s) where documents are kept apart."""
        rows, length = self._micro_batch_size, self._seq_length
        return (rows, length) if self.document_end is None else (1, rows * length)

    def iteration(self, first: int, *, global_batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the micro batches of the iteration that starts at sample `first`.

        Args:
            first: samples consumed before this iteration.
            global_batch_size: samples of this iteration, over all ranks.
            limit: samples from this index on are blanks whose loss does not count.
        """
        self.delivered = []
        for block in micro_batch_samples(
            first,
            global_batch_size=global_batch_size,
            micro_batch_size=self._micro_batch_size,
            data_rank=self._place.data_rank,
            data_size=self._place.data_size,
        ):
            host = self._read(block, limit) if self._place.tensor_rank == 0 else None
            shape = (self._micro_batch_size, self._seq_length)
            yield share_batch(host, self._place, shape=shape, document_end=self.document_end)

    def _read(self, block: range, limit: int | None) -> torch.Tensor:
        """Stack samples into [3, b, s] int64: tokens, labels, loss mask."""
        rows = []
        for k in block:
            real = limit is None or k < limit
            sample = self.samples[k if real else 0]
            if real:
                self.delivered.append(k)
            mask = sample.loss_mask.long() if real else torch.zeros_like(sample.labels)
            rows.append(torch.stack((sample.tokens, sample.labels, mask)))
        return torch.stack(rows, dim=1)
