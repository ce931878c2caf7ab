"""Judgements on planted values: what is named, what is not, and that each cause is told once."""

from __future__ import annotations

import pytest

from megatron_ext.parallel import probe
from megatron_ext.parallel.probe import ClockOffset, GroupRate, Rates
from megatron_ext.training import verdicts
from megatron_ext.training.verdicts import DataFacts, RankFacts

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "abc"}


def rank(number: int, node: str = "n1", *, device: str = "H100", clock=None, **versions: str) -> RankFacts:
    return RankFacts(rank=number, node=node, device=device, versions={**VERSIONS, **versions}, clock=clock)


def measured(nodes, *, matmul=(), pair=lambda ring, low, high: 10e9, group=lambda axis, ranks: 10e9, axes=None):
    """What ranks on these nodes would measure; `pair` and `group` give the rates."""
    found = []
    for me in range(len(nodes)):
        pairs = {}
        for ring, ranks in probe.rings(nodes, me, ()).items():
            others = [other for other in probe.partners(ranks, me) if other is not None]
            pairs[ring] = {other: pair(ring, min(me, other), max(me, other)) for other in others}
        groups = {axis: next(g for g in all_ if me in g) for axis, all_ in (axes or {}).items()}
        rates = {axis: GroupRate(ranks, group(axis, ranks)) for axis, ranks in groups.items()}
        found.append(Rates(matmul=matmul[me] if matmul else 1e12, all_reduce=rates, pairs=pairs))
    return found


def places(findings):
    return [finding.where for finding in findings]


FOUR_NODES = ("n1",) * 2 + ("n2",) * 2 + ("n3",) * 2 + ("n4",) * 2
ONE_NODE = ("n1",) * 4


# --- versions, devices, clocks


def test_equal_versions_are_not_told():
    assert verdicts.judge_versions([rank(0), rank(1, "n2")]) == []


def test_differing_version_is_an_error_that_names_the_node_with_the_rarer_one():
    ranks = [rank(0, torch="2.9"), rank(1, "n2"), rank(2, "n3")]
    (finding,) = verdicts.judge_versions(ranks)
    assert (finding.level, finding.where) == ("error", "node n1 (rank 0)")
    assert finding.what == "torch is 2.9, on the other ranks 2.13.0"


def test_differing_code_of_a_node_is_told_once_for_all_its_ranks():
    ranks = [rank(0), rank(1), rank(2, "n2", code="def-dirty"), rank(3, "n2", code="def-dirty")]
    assert places(verdicts.judge_versions(ranks)) == ["node n2 (ranks 2, 3)"]


def test_two_nodes_of_other_versions_are_told_version_by_version():
    ranks = [rank(0), rank(1), rank(2, "n2", torch="2.8", code="x"), rank(3, "n3", torch="2.9")]
    told = [(finding.where, finding.what.partition(",")[0]) for finding in verdicts.judge_versions(ranks)]
    assert told == [
        ("node n2 (rank 2)", "torch is 2.8"),
        ("node n3 (rank 3)", "torch is 2.9"),
        ("node n2 (rank 2)", "code is x"),
    ]


def test_other_device_is_a_warning():
    (finding,) = verdicts.judge_devices([rank(0), rank(1), rank(2, "n2", device="A100")])
    assert (finding.level, finding.where) == ("warning", "node n2 (rank 2)")
    assert "A100" in finding.what and "H100" in finding.what


@pytest.mark.parametrize(("seconds", "side"), [(1.5, "1.5 s ahead of"), (-40.0, "40.0 s behind")])
def test_skewed_clock_is_named_with_its_side(seconds, side):
    (finding,) = verdicts.judge_clocks([rank(0), rank(1, "n2", clock=ClockOffset(seconds, 0.001))])
    assert finding.where == "node n2" and f"{side} that of node n1" in finding.what


def test_clock_within_the_limit_is_not_told():
    assert verdicts.judge_clocks([rank(0), rank(1, "n2", clock=ClockOffset(0.9, 0.0))]) == []


def test_clock_that_a_slow_connection_leaves_uncertain_is_not_told():
    assert verdicts.judge_clocks([rank(0), rank(1, "n2", clock=ClockOffset(1.4, 0.5))]) == []


# --- devices' rates


def matmuls(kind, *rates, devices=None):
    ranks = [rank(i, f"n{i}", device=devices[i] if devices else "X") for i in range(len(rates))]
    return verdicts.judge_matmul(ranks, measured([r.node for r in ranks], matmul=rates), kind)


def test_device_below_four_fifths_of_the_median_is_named_on_cuda():
    (finding,) = matmuls("cuda", 700e12, 690e12, 550e12, 710e12)
    assert (finding.level, finding.where) == ("warning", "node n2 (rank 2)")
    assert finding.what == "matmul at 550 TFLOP/s, the median is 700 TFLOP/s"
    assert "--exclude=n2" in finding.to_do


def test_same_device_at_nine_tenths_is_well():
    assert matmuls("cuda", 700e12, 690e12, 630e12, 710e12) == []


@pytest.mark.parametrize(("rate", "told"), [(12e9, 0), (8e9, 1)])
def test_cpu_is_named_only_below_a_tenth(rate, told):
    assert len(matmuls("cpu", 100e9, rate)) == told


def test_devices_of_another_model_are_not_compared():
    assert matmuls("cuda", 700e12, 300e12, devices=("H100", "A100")) == []


def test_slow_devices_of_one_node_are_one_finding():
    ranks = [rank(i, "n2" if i > 2 else "n1") for i in range(5)]
    rates = measured([r.node for r in ranks], matmul=(7e14, 7e14, 7e14, 3e14, 3e14))
    assert places(verdicts.judge_matmul(ranks, rates, "cuda")) == ["node n2 (ranks 3, 4)"]


# --- links


def links(nodes, kind="cuda", **planted):
    return verdicts.judge_links(nodes, measured(nodes, **planted), kind)


def test_even_links_are_not_told():
    assert links(FOUR_NODES) == []


@pytest.mark.parametrize("nodes", [ONE_NODE, ("n1",) * 3, ("a", "b", "c"), ("a", "b", "c", "d", "e")])
def test_rank_that_is_slow_with_all_partners_is_named(nodes):
    (finding,) = links(nodes, pair=lambda ring, low, high: 3e9 if 1 in (low, high) else 10e9)
    assert finding.where == f"node {nodes[1]} (rank 1)"
    assert "at 3.0 GB/s with each partner, the median is 10.0 GB/s" in finding.what


def test_slow_node_is_named_once_for_all_its_ranks():
    def pair(ring, low, high):
        return 2e9 if ring == "between nodes" and "n3" in (FOUR_NODES[low], FOUR_NODES[high]) else 10e9

    assert places(links(FOUR_NODES, pair=pair)) == ["node n3 (ranks 4, 5)"]


def test_slow_pair_of_ranks_that_are_well_with_others_is_a_link():
    (finding,) = links(FOUR_NODES, pair=lambda ring, low, high: 2e9 if (low, high) == (3, 5) else 10e9)
    assert finding.where == "node n2 (rank 3), node n3 (rank 5)"
    assert finding.what.startswith("exchange between nodes at 2.0 GB/s")


def test_slow_pair_between_the_only_two_nodes_is_a_link_as_no_end_can_be_told_from_the_other():
    nodes = ("n1",) * 4 + ("n2",) * 4
    findings = links(nodes, pair=lambda ring, low, high: 2e9 if (low, high) == (3, 7) else 10e9)
    assert places(findings) == ["node n1 (rank 3), node n2 (rank 7)"]


def test_pair_that_is_slow_by_design_on_every_node_is_not_told():
    nodes = ("n1",) * 4 + ("n2",) * 4

    def bridged(ring, low, high):  # NVLink between 0-1 and 2-3 of a node, PCIe elsewhere
        return 200e9 if ring == "within nodes" and low % 2 == 0 and high == low + 1 else 20e9

    assert links(nodes, pair=bridged) == []


def test_pair_within_a_node_that_other_nodes_have_faster_is_a_link():
    nodes = ("n1",) * 4 + ("n2",) * 4 + ("n3",) * 4

    def pair(ring, low, high):
        return 5e9 if (low, high) == (4, 5) else 20e9

    assert places(links(nodes, pair=pair)) == ["node n2 (ranks 4, 5)"]


def test_pair_at_half_the_rate_is_not_told():
    assert links(FOUR_NODES, pair=lambda ring, low, high: 5e9 if (low, high) == (3, 5) else 10e9) == []


TENSOR = {"tensor": ((0, 1), (2, 3), (4, 5), (6, 7))}


def test_slow_group_of_good_pairs_is_named_as_a_group():
    (finding,) = links(FOUR_NODES, axes=TENSOR, group=lambda axis, ranks: 3e9 if 4 in ranks else 10e9)
    assert finding.where == "tensor group, node n3 (ranks 4, 5)"


def test_slow_group_with_a_slow_rank_is_told_of_the_rank_alone():
    findings = links(
        FOUR_NODES, axes=TENSOR, group=lambda axis, ranks: 3e9 if 4 in ranks else 10e9,
        pair=lambda ring, low, high: 3e9 if ring == "between nodes" and 4 in (low, high) else 10e9,
    )  # fmt: skip
    assert places(findings) == ["node n3 (rank 4)"]


def test_groups_that_span_more_nodes_are_compared_among_themselves():
    axes = {"data": ((0, 1), (2, 3), (4, 6), (5, 7))}
    assert links(FOUR_NODES, axes=axes, group=lambda axis, ranks: 1e9 if 4 in ranks or 5 in ranks else 10e9) == []


def test_second_measurement_clears_an_outlier_that_was_chance():
    slow = measured(ONE_NODE, pair=lambda ring, low, high: 1e9 if 1 in (low, high) else 10e9)
    assert verdicts.judge_links(ONE_NODE, slow, "cuda")
    assert verdicts.judge_links(ONE_NODE, verdicts.best_of(slow, measured(ONE_NODE)), "cuda") == []


def test_best_of_two_measurements_is_taken_figure_by_figure():
    axes = {"world": ((0, 1),)}
    one = measured(("n1", "n1"), matmul=(1.0, 4.0), pair=lambda *_: 5.0, group=lambda *_: 8.0, axes=axes)
    other = measured(("n1", "n1"), matmul=(2.0, 3.0), pair=lambda *_: 6.0, group=lambda *_: 7.0, axes=axes)
    best = verdicts.best_of(one, other)
    assert [rate.matmul for rate in best] == [2.0, 4.0]
    assert best[0].pairs == {"within nodes": {1: 6.0}} and best[0].all_reduce["world"].bytes_per_second == 8.0


# --- run directory, disk, data


def test_unseen_directory_is_an_error_by_node():
    wrong = {2: "/run: not seen", 3: "/run: not seen", 5: "/run cannot be read (Permission denied)"}
    findings = verdicts.judge_directory(wrong, ("n1", "n1", "n2", "n2", "n3", "n3"))
    assert [(finding.level, finding.where) for finding in findings] == [
        ("error", "node n2 (ranks 2, 3)"),
        ("error", "node n3 (rank 5)"),
    ]


def disk(free, now, planned):
    return verdicts.judge_disk("n1", "/run", free=free, checkpoint=100, now=now, planned=planned)


@pytest.mark.parametrize(
    ("free", "now", "planned", "level"),
    [
        (99, 1, 1, "error"),
        (299, 3, 3, "error"),
        (100, 1, 1, "warning"),  # to the last byte
        (320, 3, 3, "warning"),
        (330, 3, 3, None),
        (330, 1, 20, "warning"),  # all are kept, and they will not all fit
        (0, 0, 0, None),  # nothing is to be saved any more
    ],
)
def test_disk_is_judged_by_the_checkpoints_to_come(free, now, planned, level):
    assert [finding.level for finding in disk(free, now, planned)] == ([] if level is None else [level])


def test_little_disk_names_node_directory_and_room():
    (finding,) = verdicts.judge_disk("n7", "/run", free=5 << 30, checkpoint=2 << 30, now=4, planned=4)
    assert str(finding) == (
        "node n7: /run has 5.0 GiB free, and a checkpoint takes 2.0 GiB: room for 2, 4 must fit; free space, lower "
        "checkpoint.keep_last, or name a run_dir where there is more."
    )


def data(identity="1", *faults):
    return {"web": DataFacts(identity, True, faults)}


def test_data_alike_on_all_nodes_is_not_told():
    assert verdicts.judge_data([data(), None, data()], ("n1", "n1", "n2")) == []


def test_faulty_data_names_the_nodes_that_have_it():
    (finding,) = verdicts.judge_data([data(), data("", "web.bin: short"), data("", "web.bin: short")], ("a", "b", "c"))
    assert (finding.level, finding.where, finding.what) == ("error", "nodes b, c", "web.bin: short")


def test_faulty_data_on_every_node_is_told_once():
    findings = verdicts.judge_data([data("", "web.bin: short")] * 2, ("a", "b"))
    assert places(findings) == ["all nodes: a, b"]


def test_node_with_other_data_than_rank_0_is_an_error():
    (finding,) = verdicts.judge_data([data("1"), data("1"), data("2")], ("a", "b", "c"))
    assert (finding.level, finding.where) == ("error", "node c")
    assert finding.what == "web: its files are not those on node a"
