"""Which rank stands where: the arithmetic of the layout, without any process group.

Megatron's order is tp-cp-ep-dp-pp (`parallel_state.initialize_model_parallel`), ep being 1 here: ranks of one
tensor-parallel group are neighbours, and a pipeline stage is one run of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ext.errors import LaunchError


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The layout of `world_size` ranks.

    Raises:
        LaunchError: the degrees do not divide the number of ranks.
    """

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1

    def __post_init__(self) -> None:
        if min(self.world_size, self.model_parallel_size) < 1 or self.world_size % self.model_parallel_size:
            sizes = (
                self.tensor_model_parallel_size,
                self.pipeline_model_parallel_size,
                self.context_parallel_size,
            )
            raise LaunchError(
                f"the number of processes ({self.world_size}) must be a multiple of tensor x pipeline x "
                f"context parallel size ({' x '.join(map(str, sizes))} = {self.model_parallel_size}); "
                "start another number of them."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model, each with its own samples."""
        return self.world_size // self.model_parallel_size

    def coordinates(self, rank: int) -> Coordinates:
        """Return where `rank` stands; its inverse is `rank`."""
        assert 0 <= rank < self.world_size, (rank, self.world_size)
        rest, tp = divmod(rank, self.tensor_model_parallel_size)
        rest, cp = divmod(rest, self.context_parallel_size)
        pp, dp = divmod(rest, self.data_parallel_size)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, place: Coordinates) -> int:
        """Return the rank that stands at `place`."""
        stage = place.pp * self.data_parallel_size + place.dp
        return (stage * self.context_parallel_size + place.cp) * self.tensor_model_parallel_size + place.tp


def layers_of_stage(num_layers: int, stages: int, chunks: int, stage: int) -> tuple[range, ...]:
    """Return the layers of a pipeline stage, one range for each of its model chunks.

    Chunk c of stage p follows chunk c of stage p - 1, so a stage of an interleaved schedule holds `chunks`
    separate runs of layers (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    per_chunk = num_layers // (stages * chunks)
    starts = [(chunk * stages + stage) * per_chunk for chunk in range(chunks)]
    return tuple(range(start, start + per_chunk) for start in starts)
