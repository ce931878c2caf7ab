"""Preflight's own arithmetic, what it asks of data files, and what a run makes of the findings."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.manifest import Manifest, TokenizerRecord, write_manifest
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.launch import single_process
from megatron_ext.training import preflight
from megatron_ext.training.verdicts import Finding

# --- checkpoints


def test_checkpoint_of_pints_has_fourteen_bytes_for_each_parameter():
    from megatron_ext.config.load import find_config, load_config

    config = load_config(find_config("pints_1.5b_2k"))
    # 1,565,886,464 parameters (model/flops.py) and 64 padding rows of 2,048 twice: bf16, fp32 copy, two moments.
    padded = 2 * 2048 * (-config.model.vocab_size % config.model.make_vocab_size_divisible_by)
    assert preflight.checkpoint_bytes(config) == 14 * (1_565_886_464 + padded)


def test_checkpoint_in_fp32_without_the_distributed_optimizer_has_no_master_copy(tiny_config):
    both = preflight.checkpoint_bytes(tiny_config())
    alone = preflight.checkpoint_bytes(tiny_config("--parallel.use_distributed_optimizer", "false"))
    assert (alone, both) == (12 * 44_320, 16 * 44_320)


@pytest.mark.parametrize(
    ("settings", "iteration", "whole", "expected"),
    [
        ({}, 0, 0, (1, 10)),  # every tenth of a hundred, all kept
        ({}, 95, 9, (1, 1)),
        ({}, 100, 10, (0, 0)),
        ({"exit_iters": 25}, 0, 0, (1, 3)),  # 10, 20, and at the end
        ({"save_interval": "none"}, 0, 0, (1, 1)),
        ({"keep_last": 2}, 0, 0, (3, 3)),  # two that stay, one in flight
        ({"keep_last": 2}, 50, 2, (1, 1)),
        ({"keep_last": 2}, 80, 0, (2, 2)),  # only two are still to be saved
        ({"keep_last": 2, "keep_every": 50}, 0, 0, (3, 5)),  # and 50 and 100 for good
    ],
)
def test_checkpoints_to_come_follow_interval_and_retention(settings, iteration, whole, expected, tiny_config):
    settings = {"save_interval": 10, **settings}
    words = [("--train." if name == "exit_iters" else "--checkpoint.") + name for name in settings]
    pairs = [word for name, value in zip(words, settings.values(), strict=True) for word in (name, str(value))]
    config = tiny_config("--train.train_iters", "100", *pairs)
    assert preflight.checkpoints_to_come(config, iteration, whole) == expected


def test_whole_checkpoints_are_counted_without_unfinished_ones(tmp_path):
    for name in ("iter_0000010", "iter_0000020", "iter_0000030.tmp", "latest"):
        (tmp_path / name).mkdir()
    assert preflight._whole_checkpoints(tmp_path) == (20, 2)


# --- data


@pytest.fixture
def pair(tmp_path):
    """A pair of three documents with a manifest that fits, and that manifest."""
    prefix = tmp_path / "web"
    with IndexedWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for length in (3, 4, 5):
            writer.add_document(range(length))
        totals = writer.publish()
    manifest = Manifest(
        tokenizer=TokenizerRecord(sha256="0" * 64, vocab_size=97, eod=2, folder="t"),
        options={}, inputs=(), documents=3, tokens=12, empty_documents=0, skipped_documents=0, dtype="uint16",
        bin_bytes=totals.bin_bytes, idx_bytes=totals.idx_bytes,
    )  # fmt: skip
    write_manifest(prefix, manifest)
    return prefix, manifest


def test_data_that_fits_its_manifest_has_no_fault(pair):
    facts = preflight.data_facts(str(pair[0]), vocab_size=97)
    assert facts.faults == () and facts.has_manifest


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"bin_bytes": 26}, "bin_bytes is 26, the files have 24"),
        ({"idx_bytes": 1}, "idx_bytes is 1, the files have 102"),
        ({"dtype": "int32"}, "dtype is int32, the files have uint16"),
        ({"tokens": 13}, "tokens is 13, the files have 12"),
        ({"documents": 4}, "documents is 4, the files have 3"),
    ],
)
def test_manifest_that_does_not_fit_its_files_is_told(changed, fault, pair):
    prefix, manifest = pair
    write_manifest(prefix, replace(manifest, **changed))
    assert preflight.data_facts(str(prefix), vocab_size=97).faults == (f"{prefix}.manifest.json: {fault}",)


def test_manifest_of_a_larger_vocabulary_than_the_model_is_told(pair):
    (fault,) = preflight.data_facts(str(pair[0]), vocab_size=96).faults
    assert fault.endswith("its tokenizer has 97 ids, model.vocab_size (96) must cover them")


def test_missing_data_is_a_fault_and_no_exception(tmp_path):
    (fault,) = preflight.data_facts(str(tmp_path / "gone"), vocab_size=97).faults
    assert "gone.bin: no such file" in fault


def test_same_files_have_one_identity_and_another_manifest_has_another(pair):
    prefix, manifest = pair
    before = preflight.data_facts(str(prefix), vocab_size=97).identity
    assert preflight.data_facts(str(prefix), vocab_size=97).identity == before
    write_manifest(prefix, replace(manifest, encoder="native"))
    assert preflight.data_facts(str(prefix), vocab_size=97).identity != before


# --- a run


def test_run_with_findings_stops_at_errors_and_tells_warnings(one_process, tiny_config, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = tiny_config()
    (path := preflight.run_directory(config)).mkdir()
    found = (
        Finding("warning", "node a", "its clock is off", "set it"),
        Finding("error", "node b", "its disk is full", "free it"),
        Finding("error", "node c", "it sees nothing", "mount it"),
    )
    seen = preflight.Preflight(facts=(preflight.Fact("ranks", "1"),), findings=found, ranks=(), seconds=0.1)
    monkeypatch.setattr(preflight, "examine", lambda *args, **kwargs: seen)
    with pytest.raises(ConfigError) as refused:
        preflight.check(config, single_process(), iteration=0)
    assert refused.value.problems == (
        "preflight: node b: its disk is full; free it.",
        "preflight: node c: it sees nothing; mount it.",
    )
    assert refused.value.everywhere  # so it is told once for a node, and not by each of its ranks
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["preflight: node a: its clock is off; set it."]
    assert [finding["where"] for finding in json.loads((path / "preflight.json").read_text())["findings"]] == [
        "node a", "node b", "node c",
    ]  # fmt: skip


def test_run_without_preflight_does_not_look(tiny_config, monkeypatch):
    monkeypatch.setattr(preflight, "examine", lambda *args, **kwargs: pytest.fail("it looked"))
    preflight.check(tiny_config("--reliability.preflight", "false"), single_process(), iteration=0)


def test_look_at_one_process_measures_again_only_when_something_is_slow(one_process, tiny_config, monkeypatch):
    looks = []
    plain = preflight.probe.rates
    monkeypatch.setattr(preflight.probe, "rates", lambda nodes: looks.append(1) or plain(nodes))
    preflight.examine(single_process(), tiny_config())
    assert len(looks) == 1
    slow = Finding("warning", "node a", "slow", "wait")
    monkeypatch.setattr(preflight.verdicts, "judge_links", lambda *args: [slow] if len(looks) < 3 else [])
    seen = preflight.examine(single_process(), tiny_config())
    assert len(looks) == 3 and seen.findings == ()


def test_look_tells_what_was_compared_of_the_data(one_process, tiny_config):
    facts = dict(preflight.examine(single_process(), tiny_config()).facts)
    assert facts["data"] == "2 prefixes: index and size fit"
    assert facts["disk"].endswith("a checkpoint takes 0.7 MiB, 1 to be saved")


def test_whole_record_is_json(one_process, tiny_config):
    body = json.loads(preflight.examine(single_process(), tiny_config()).as_json())
    assert body["findings"] == [] and body["ranks"][0]["versions"]["torch"]
