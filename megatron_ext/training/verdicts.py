"""Judge what preflight gathered: who is slow, whose clock is off, what differs, what will not fit. Pure functions.

A rate is judged against the median of its kind (of an even number, the upper middle one). One that is off is measured
again, several times, and the best is kept. What is called an outlier then:

- on CUDA, below 0.8 of the median: GPUs of one model, and links of one kind, lie within a few percent of each other,
  and a rank at 0.8 costs a synchronous run a fifth of its speed;
- on the CPU, below a tenth: ranks share cores with whatever else runs there. With six processes waiting for each core,
  one of two equal groups was seen at a fifth of the other after three measurements;
- a single pair on CUDA, below 0.4, and within a node only against the same pair of other nodes: paths differ by design
  (NVLink bridges, PCIe switches, sockets), and a rank with one good neighbour is well itself.

A clock is off by more than 1 s: the job's end, the log and the metrics are read from it in seconds. Two differing
versions of what computes or communicates are an error: such ranks hang, or drift apart without a word.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_ext.parallel.probe import ClockOffset, GroupRate, Rates

SKEW_SECONDS = 1.0
OUTLIER_RATIO = {"cpu": 0.1, "cuda": 0.8}
LINK_RATIO = {"cpu": 0.1, "cuda": 0.4}
TIGHT = 1.1
"""Free disk below this many times what is needed is called tight: logs and caches grow there too."""
GIB = 2**30


class Finding(NamedTuple):
    """Something that is not as it should be."""

    level: Literal["error", "warning"]
    """An error stops the run; a warning does not."""
    where: str
    what: str
    to_do: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.to_do}."


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """What one rank told of itself."""

    rank: int
    node: str
    device: str
    versions: Mapping[str, str]
    clock: ClockOffset | None
    """None where it was not compared: on rank 0's node, and but on the first rank of the others."""


class DataFacts(NamedTuple):
    """One `.bin/.idx` pair as one node sees it."""

    identity: str
    """The same on two nodes that have the same files, as far as sizes and manifest tell."""
    has_manifest: bool
    faults: tuple[str, ...]


def place_of(ranks: Iterable[int], nodes: Sequence[str]) -> str:
    """Name ranks and their nodes: `node n2 (ranks 4, 5)`."""
    by_node: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_node.setdefault(nodes[rank], []).append(rank)
    return ", ".join(
        f"node {node} ({'rank' if len(there) == 1 else 'ranks'} {', '.join(map(str, there))})"
        for node, there in by_node.items()
    )


def judge_versions(facts: Sequence[RankFacts]) -> list[Finding]:
    """Name the nodes whose software differs from that of most ranks."""
    nodes = [fact.node for fact in facts]
    findings = []
    for name in facts[0].versions:
        found = [fact.versions[name] for fact in facts]
        usual = Counter(found).most_common(1)[0][0]  # of two as frequent, the one of the lower rank
        for version in sorted(set(found) - {usual}):
            there = [rank for rank, other in enumerate(found) if other == version]
            findings.append(
                Finding(
                    "error", place_of(there, nodes), f"{name} is {version}, on the other ranks {usual}",
                    "start all ranks from one environment and checkout (a shared folder, or one container image)",
                )
            )  # fmt: skip
    return findings


def judge_devices(facts: Sequence[RankFacts]) -> list[Finding]:
    """Name the nodes whose devices are of another model than most."""
    nodes = [fact.node for fact in facts]
    usual = Counter(fact.device for fact in facts).most_common(1)[0][0]
    others = {fact.device for fact in facts} - {usual}
    return [
        Finding(
            "warning",
            place_of((fact.rank for fact in facts if fact.device == other), nodes),
            f"its device is {other}, that of the other ranks {usual}",
            "ask the scheduler for nodes of one kind: the slowest sets the pace",
        )
        for other in sorted(others)
    ]


def judge_clocks(facts: Sequence[RankFacts]) -> list[Finding]:
    """Name the nodes whose clock is off by more than SKEW_SECONDS for certain."""
    findings = []
    for fact in facts:
        if fact.clock is None or abs(fact.clock.seconds) - fact.clock.uncertainty <= SKEW_SECONDS:
            continue
        side = "ahead of" if fact.clock.seconds > 0 else "behind"
        findings.append(
            Finding(
                "warning", f"node {fact.node}",
                f"its clock is {format_seconds(abs(fact.clock.seconds))} {side} that of node {facts[0].node}, more "
                f"than {SKEW_SECONDS:g} s",
                "synchronise the clocks (timedatectl, chronyc tracking): the job's end and the log are read from them",
            )
        )  # fmt: skip
    return findings


def judge_matmul(facts: Sequence[RankFacts], rates: Sequence[Rates], kind: str) -> list[Finding]:
    """Name the ranks whose matrix products are slow beside those of like devices."""
    nodes, findings = [fact.node for fact in facts], []
    for device in sorted({fact.device for fact in facts}):
        like = {fact.rank: rates[fact.rank].matmul for fact in facts if fact.device == device}
        median = statistics.median_high(like.values())
        slow = [rank for rank, rate in like.items() if rate < OUTLIER_RATIO[kind] * median]
        for there in _of_one_node(slow, nodes):
            figures = ", ".join(format_flops(like[rank]) for rank in there)
            findings.append(
                Finding(
                    "warning", place_of(there, nodes), f"matmul at {figures}, the median is {format_flops(median)}",
                    f"see what slows it ({_LOOK_AT[kind]}), or leave the node out (sbatch --exclude={nodes[there[0]]})",
                )
            )  # fmt: skip
    return findings


_LOOK_AT = {
    "cuda": "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
    "cpu": "what else runs there: top",
}


class Pair(NamedTuple):
    """Two ranks that exchanged messages."""

    low: int
    high: int
    rate: float
    """Bytes per second each way, by the end that was slower."""


def judge_links(nodes: Sequence[str], rates: Sequence[Rates], kind: str) -> list[Finding]:
    """Name slow ranks, slow links between good ranks, and slow groups of good links; each cause once."""
    findings: list[Finding] = []
    blamed: set[int] = set()
    for ring in sorted({ring for rate in rates for ring in rate.pairs}):
        pairs = pairs_of(rates, ring)
        findings += _slow_ranks(ring, pairs, nodes, kind, blamed)
    for ring in sorted({ring for rate in rates for ring in rate.pairs}):
        findings += _slow_pairs(ring, pairs_of(rates, ring), nodes, kind, blamed)
    return findings + _slow_groups(nodes, rates, kind, blamed)


def pairs_of(rates: Sequence[Rates], ring: str) -> list[Pair]:
    """Give the pairs of one kind of ring."""
    return [
        Pair(low, high, min(rate, rates[high].pairs[ring][low]))
        for low, of_rank in enumerate(rates)
        for high, rate in of_rank.pairs.get(ring, {}).items()
        if low < high
    ]


def _slow_ranks(ring: str, pairs: Sequence[Pair], nodes: Sequence[str], kind: str, blamed: set[int]) -> list[Finding]:
    """A rank that is slow with each of several partners is slow itself; adds it to `blamed`."""
    of_rank: dict[int, list[float]] = {}
    for pair in pairs:
        of_rank.setdefault(pair.low, []).append(pair.rate)
        of_rank.setdefault(pair.high, []).append(pair.rate)
    best = {rank: max(found) for rank, found in of_rank.items()}
    # The median of what each rank reaches with its better partner: one slow rank spoils two of a ring's pairs.
    median = statistics.median_high(best.values())
    slow = [rank for rank in best if len(of_rank[rank]) > 1 and best[rank] < OUTLIER_RATIO[kind] * median]
    slow = [rank for rank in slow if rank not in blamed]
    blamed.update(slow)
    return [
        Finding(
            "warning",
            place_of(there, nodes),
            f"exchanges {ring} at {', '.join(format_bytes_rate(best[rank]) for rank in there)} with each partner, "
            f"the median is {format_bytes_rate(median)}",
            f"look at its network card, cable and port, or leave the node out (sbatch --exclude={nodes[there[0]]})",
        )
        for there in _of_one_node(slow, nodes)
    ]


def _slow_pairs(ring: str, pairs: Sequence[Pair], nodes: Sequence[str], kind: str, blamed: set[int]) -> list[Finding]:
    """A pair that is slow though neither end is blamed is a slow link; blames both ends for what comes after."""
    alike: dict[tuple[int, ...] | None, list[Pair]] = {}
    for pair in pairs:
        within = nodes[pair.low] == nodes[pair.high]
        numbers = tuple(nodes[:rank].count(nodes[rank]) for rank in (pair.low, pair.high))
        alike.setdefault(numbers if within else None, []).append(pair)
    findings, ends = [], set[int]()
    for same in alike.values():
        median = statistics.median_high(pair.rate for pair in same)
        for pair in same:
            if pair.rate < LINK_RATIO[kind] * median and blamed.isdisjoint((pair.low, pair.high)):
                ends.update((pair.low, pair.high))
                findings.append(
                    Finding(
                        "warning", place_of((pair.low, pair.high), nodes),
                        f"exchange {ring} at {format_bytes_rate(pair.rate)}, the median of such pairs is "
                        f"{format_bytes_rate(median)}, and both are well with others or have none",
                        "look at the link between the two: cables, switch ports, the route",
                    )
                )  # fmt: skip
    blamed.update(ends)
    return findings


def _slow_groups(nodes: Sequence[str], rates: Sequence[Rates], kind: str, blamed: set[int]) -> list[Finding]:
    """A group that is slow beside its like, though its ranks are well in pairs."""
    findings = []
    for axis in sorted({axis for rate in rates for axis in rate.all_reduce}):
        found = group_rates(rates, axis)
        for spanned in sorted({len({nodes[rank] for rank in ranks}) for ranks in found}):
            like = {ranks: rate for ranks, rate in found.items() if len({nodes[r] for r in ranks}) == spanned}
            median = statistics.median_high(like.values())
            for ranks, rate in like.items():
                if rate < OUTLIER_RATIO[kind] * median and blamed.isdisjoint(ranks):
                    findings.append(
                        Finding(
                            "warning", f"{axis} group, {place_of(ranks, nodes)}",
                            f"all-reduce at {format_bytes_rate(rate)}, the median is {format_bytes_rate(median)}, "
                            "and no rank of it is slow in pairs",
                            "compare what NCCL_DEBUG=INFO tells of this group and of another"
                            if kind == "cuda" else "see what else runs on these nodes",
                        )
                    )  # fmt: skip
    return findings


def group_rates(rates: Sequence[Rates], axis: str) -> dict[tuple[int, ...], float]:
    """Give the rate of each group of an axis, by its ranks: what its slowest rank saw."""
    found: dict[tuple[int, ...], float] = {}
    for rate in rates:
        group = rate.all_reduce.get(axis)
        if group is not None:
            found[group.ranks] = min(group.bytes_per_second, found.get(group.ranks, group.bytes_per_second))
    return found


def best_of(first: Sequence[Rates], second: Sequence[Rates]) -> list[Rates]:
    """Keep the better of two measurements of the same ranks, figure by figure."""
    return [
        Rates(
            matmul=max(one.matmul, other.matmul),
            all_reduce={
                axis: GroupRate(group.ranks, max(group.bytes_per_second, other.all_reduce[axis].bytes_per_second))
                for axis, group in one.all_reduce.items()
            },
            pairs={
                ring: {partner: max(rate, other.pairs[ring][partner]) for partner, rate in found.items()}
                for ring, found in one.pairs.items()
            },
        )
        for one, other in zip(first, second, strict=True)
    ]


def judge_directory(wrong: Mapping[int, str], nodes: Sequence[str]) -> list[Finding]:
    """Name the nodes that do not have the run directory; `wrong` says what is wrong, by rank."""
    findings = []
    for reason in dict.fromkeys(wrong.values()):
        for there in _of_one_node([rank for rank in wrong if wrong[rank] == reason], nodes):
            findings.append(
                Finding(
                    "error", place_of(there, nodes), f"run directory {reason}",
                    "all ranks must see one directory, and write to it: name a run_dir on a file system that every "
                    "node mounts, by a path that is the same everywhere",
                )
            )  # fmt: skip
    return findings


def judge_disk(node: str, directory: str, *, free: int, checkpoint: int, now: int, planned: int) -> list[Finding]:
    """Compare free bytes with the checkpoints to come.

    Args:
        node: whose view it is.
        directory: the run directory.
        free: bytes.
        checkpoint: bytes of one.
        now: checkpoints that must fit beside those that are there, whatever happens.
        planned: checkpoints that the run adds until it ends, as far as it is let.
    """
    room, where = free // checkpoint, f"node {node}"
    said = f"{directory} has {format_size(free)} free, and a checkpoint takes {format_size(checkpoint)}"
    lower = "lower checkpoint.keep_last, " if now > 1 else ""
    mend = f"free space, {lower}or name a run_dir where there is more"
    if room < now:
        return [Finding("error", where, f"{said}: room for {room}, {now} must fit", mend)]
    if free < TIGHT * now * checkpoint:
        return [Finding("warning", where, f"{said}: {now} must fit, which is tight", mend)]
    if room < planned:
        text = f"{said}: room for {room} of the {planned} that the run will save"
        return [Finding("warning", where, text, "set checkpoint.keep_last, or free space before the disk is full")]
    return []


def judge_data(data: Sequence[Mapping[str, DataFacts] | None], nodes: Sequence[str]) -> list[Finding]:
    """Name what is wrong with the data, and the nodes that see other files than rank 0.

    Args:
        data: by rank, and prefix; None for ranks that did not look.
        nodes: by rank.
    """
    first, looked = data[0], [rank for rank, seen in enumerate(data) if seen is not None]
    assert first is not None
    faults: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for rank in looked:
        for prefix, facts in (data[rank] or {}).items():
            for fault in facts.faults:
                faults.setdefault(fault, []).append(nodes[rank])
            if facts.identity != first[prefix].identity and not (facts.faults or first[prefix].faults):
                others.setdefault(prefix, []).append(nodes[rank])
    return [
        *(Finding("error", _nodes(there, len(looked)), fault, _REMAKE) for fault, there in faults.items()),
        *(
            Finding("error", _nodes(there, len(looked)), f"{prefix}: its files are not those on node {nodes[0]}", _COPY)
            for prefix, there in others.items()
        ),
    ]


_REMAKE = "preprocess it again, or copy it again whole"
_COPY = "copy the data to this node again, or name it on a file system that every node mounts"


def _nodes(there: Sequence[str], of: int) -> str:
    return f"{'node' if len(there) == 1 else 'all nodes:' if len(there) == of else 'nodes'} {', '.join(there)}"


def _of_one_node(ranks: Sequence[int], nodes: Sequence[str]) -> list[list[int]]:
    """Part ranks by their node."""
    return [[rank for rank in ranks if nodes[rank] == node] for node in dict.fromkeys(nodes[rank] for rank in ranks)]


def format_bytes_rate(rate: float) -> str:
    """Say bytes per second."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"


def format_flops(rate: float) -> str:
    """Say FLOP/s."""
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.1f} GFLOP/s"


def format_size(size: float) -> str:
    """Say bytes."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Say a short time."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
