"""Compare the weights of replicas, bit for bit: data- and context-parallel ranks hold the same ones.

A bit that memory flips, or a collective that goes wrong on one rank, otherwise trains on unseen: each replica goes its
own way, and what is saved is one of them. Weights that tensor-parallel ranks hold in common (norms) are not compared
between those: without sequence parallelism each computes their gradient for itself, which on a GPU may differ in the
last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ext.parallel import groups
from megatron_ext.parallel.checksum import combine, tensor_checksums
from megatron_ext.parallel.launch import read_launch
from megatron_ext.parallel.probe import node_name
from megatron_ext.training.hang_report import name_ranks
from megatron_ext.training.step import Machine, gathered_parameters

_MOST_NAMES = 3


class Weights(NamedTuple):
    """What one rank holds."""

    share: tuple[int, int]
    """Pipeline and tensor rank: ranks alike in both are replicas of each other."""
    node: str
    checksum: int


class Comparison(NamedTuple):
    """What was found; the same on every rank."""

    checksum: int
    """Of the whole model, in this layout."""
    difference: str | None
    """Which rank's weights differ, and where; None where all are equal."""


def compare_replicas(machine: Machine) -> Comparison | None:
    """Compare the weights of all replicas; None where there is only one. Every rank calls it."""
    place = machine.place
    if place.data_size * place.context_size == 1:
        return None
    named = [
        (f"{index}.{name}" if len(machine.model.bare) > 1 else name, parameter)
        for index, chunk in enumerate(machine.model.bare)
        for name, parameter in chunk.named_parameters()
    ]
    with gathered_parameters(machine):
        sums = tensor_checksums(parameter for _, parameter in named)
    mine = Weights((place.pipeline_rank, place.tensor_rank), node_name(read_launch()), combine(sums))
    found: list[Weights] = groups.gather_objects(mine)
    shares = {weights.share: weights.checksum for weights in reversed(found)}
    whole = combine(shares[share] for share in sorted(shares))
    if all(weights.checksum == shares[weights.share] for weights in found):
        return Comparison(whole, None)
    every_sum: list[list[int]] = groups.gather_objects(sums)
    every_name: list[list[str]] = groups.gather_objects([name for name, _ in named])
    return Comparison(whole, describe_difference(found, every_sum, every_name))


def describe_difference(
    found: Sequence[Weights], sums: Sequence[Sequence[int]], names: Sequence[Sequence[str]]
) -> str | None:
    """Say which ranks hold other weights than most of their replicas; all arguments by rank. Pure."""
    told = []
    for share in sorted({weights.share for weights in found}):
        ranks = [rank for rank, weights in enumerate(found) if weights.share == share]
        (common, times), *others = Counter(found[rank].checksum for rank in ranks).most_common()
        if not others:
            continue
        alike = [rank for rank in ranks if found[rank].checksum == common]
        odd = [rank for rank in ranks if rank not in alike]
        parameters = [
            name
            for index, name in enumerate(names[alike[0]])
            if any(sums[rank][index] != sums[alike[0]][index] for rank in odd)
        ]
        who = ", ".join(f"rank {rank} ({found[rank].node})" for rank in odd)
        doubt = "" if times > len(odd) else ", and which of them is right cannot be told"
        more = ", …" if len(parameters) > _MOST_NAMES else ""
        told.append(
            f"{who} differs from {name_ranks(alike)}{doubt}, in {len(parameters)} of {len(names[alike[0]])} parameters "
            f"({', '.join(parameters[:_MOST_NAMES])}{more})"
        )
    return "; ".join(told) or None
