"""Look at what a run stands on before its first iteration, and refuse what would waste an hour.

parallel/probe.py measures, training/verdicts.py judges (and states the limits, with reasons); here the ranks' answers
are gathered, told and written down. Every rank gathers the same values and so comes to the same judgement.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint import layout
from megatron_ext.config.tree import Config
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.data.manifest import manifest_path, read_manifest
from megatron_ext.durable import write_whole
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.model.flops import padded_vocab_size, parameter_count
from megatron_ext.parallel import device, groups, probe
from megatron_ext.parallel.launch import Launch
from megatron_ext.parallel.probe import Rates
from megatron_ext.training import verdicts
from megatron_ext.training.describe import table
from megatron_ext.training.provenance import code_revision, package_versions
from megatron_ext.training.run_dir import run_directory
from megatron_ext.training.verdicts import DataFacts, Finding, RankFacts

_LOG = logging.getLogger(__name__)
RECORD = "preflight.json"
_PACKAGES = ("torch", "megatron-core", "transformer-engine")
_ABSENT = "not installed"
_MEASUREMENTS = 5
"""An outlier must be one each time; where there is none, one measurement is enough."""
_LISTED = 8
"""Nodes told by name."""
_ROOT = Path(__file__).resolve().parents[2]


class Fact(NamedTuple):
    """One line of the report."""

    about: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """What was seen. The same on every rank."""

    facts: tuple[Fact, ...]
    findings: tuple[Finding, ...]
    ranks: tuple[dict[str, Any], ...]
    """What each rank measured, for the record."""
    seconds: float

    def errors(self) -> list[str]:
        """What keeps a run from starting, each once."""
        return [str(finding) for finding in self.findings if finding.level == "error"]

    def as_json(self) -> str:
        """Write everything down as JSON."""
        body = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(self.seconds, 3),
            "findings": [finding._asdict() for finding in self.findings],
            "facts": {fact.about: fact.text for fact in self.facts},
            "ranks": list(self.ranks),
        }
        return json.dumps(body, indent=1) + "\n"


def check(config: Config, launch: Launch, *, iteration: int) -> None:
    """Look before the first iteration, as reliability.preflight says. Every rank calls it.

    Raises:
        ConfigError: something would make the run fail later: all of it, with the node of each.
    """
    if not config.reliability.preflight:
        return
    seen = examine(launch, config, iteration=iteration)
    if launch.rank == 0:
        for line in table(seen.facts, "<<"):
            _LOG.info("preflight: %s", line)
        for finding in seen.findings:
            if finding.level == "warning":
                _LOG.warning("preflight: %s", finding)
        try:
            write_whole(run_directory(config) / RECORD, seen.as_json())
        except OSError as error:
            _LOG.warning("preflight: %s cannot be written (%s)", RECORD, error.strerror or error)
    if problems := seen.errors():
        refusal = ConfigError([f"preflight: {problem}" for problem in problems])
        refusal.everywhere = True  # all ranks judge the same values
        raise refusal


def examine(launch: Launch, config: Config | None = None, *, iteration: int | None = None) -> Preflight:
    """Measure, gather and judge. Every rank calls it, after `groups.initialize`.

    Args:
        launch: this process's place.
        config: the run; None: only ranks, links, devices and clocks are looked at.
        iteration: how far the run is; None: as far as its newest checkpoint.
    """
    begin = time.perf_counter()
    ranks = _ranks(launch)
    nodes = [fact.node for fact in ranks]
    kind = "cuda" if device.is_cuda() else "cpu"
    rates, slow = _rates(ranks, kind)
    facts = [*_rank_facts(ranks), *_rate_facts(rates, kind)]
    findings = [*verdicts.judge_versions(ranks), *verdicts.judge_devices(ranks), *verdicts.judge_clocks(ranks), *slow]
    if config is not None:
        for fact, found in (_directory(config, nodes), _disk(config, nodes, iteration), _data(config, nodes)):
            facts.append(fact)
            findings += found
    return Preflight(
        facts=tuple(facts),
        findings=tuple(findings),
        ranks=tuple(_record(fact, rate) for fact, rate in zip(ranks, rates, strict=True)),
        seconds=time.perf_counter() - begin,
    )


def _ranks(launch: Launch) -> list[RankFacts]:
    """Ask each rank who it is. Every rank calls it, and gets all answers."""
    node = probe.node_name(launch)
    nodes: list[str] = groups.gather_objects(node)
    found = package_versions(_PACKAGES).items()
    versions = {"python": platform.python_version(), **{name: version or _ABSENT for name, version in found}}
    if launch.rank in probe.first_ranks(nodes):  # git looks at every file: once per node is enough
        commit, dash, dirty = code_revision(_ROOT).partition("-")
        versions["code"] = f"{commit[:12]}{dash}{dirty}"
    mine = RankFacts(
        rank=launch.rank, node=node, device=device.name(), versions=versions, clock=probe.clock_offset(nodes)
    )
    ranks: list[RankFacts] = groups.gather_objects(mine)
    codes = {fact.node: fact.versions["code"] for fact in ranks if "code" in fact.versions}
    return [replace(fact, versions={**fact.versions, "code": codes[fact.node]}) for fact in ranks]


def _rates(ranks: Sequence[RankFacts], kind: str) -> tuple[list[Rates], list[Finding]]:
    """Measure devices and links, again where one looks slow, and judge. Every rank calls it."""
    nodes = [fact.node for fact in ranks]
    best: list[Rates] = []
    slow: list[Finding] = []
    for _ in range(_MEASUREMENTS):
        measured: list[Rates] = groups.gather_objects(probe.rates(nodes))
        best = verdicts.best_of(best, measured) if best else measured
        slow = [*verdicts.judge_matmul(ranks, best, kind), *verdicts.judge_links(nodes, best, kind)]
        if not slow:
            break
    return best, slow


def _rank_facts(ranks: Sequence[RankFacts]) -> Iterator[Fact]:
    nodes = list(dict.fromkeys(fact.node for fact in ranks))
    listed = ", ".join(nodes[:_LISTED]) + (f" and {len(nodes) - _LISTED} more" if len(nodes) > _LISTED else "")
    devices = " and ".join(dict.fromkeys(fact.device for fact in ranks))
    plural = "" if len(nodes) == 1 else "s"
    yield Fact("ranks", f"{len(ranks)} on {len(nodes)} node{plural} ({listed}), {devices}")
    there = {name: version for name, version in ranks[0].versions.items() if version != _ABSENT}
    yield Fact("versions", ", ".join(f"{name} {version}" for name, version in there.items()))
    clocks = [fact.clock for fact in ranks if fact.clock is not None]
    if clocks:
        worst = max(clocks, key=lambda clock: abs(clock.seconds))
        text = f"within {verdicts.format_seconds(abs(worst.seconds))} of node {nodes[0]}'s"
        yield Fact("clocks", f"{text} (known to {verdicts.format_seconds(worst.uncertainty)})")


def _rate_facts(rates: Sequence[Rates], kind: str) -> Iterator[Fact]:
    product = "bf16" if kind == "cuda" else "fp32"
    yield Fact("matmul", f"{product} {_span([rate.matmul for rate in rates], verdicts.format_flops)}")
    axes = dict.fromkeys(axis for rate in rates for axis in rate.all_reduce)
    if axes:
        yield Fact("all-reduce", _spans({axis: verdicts.group_rates(rates, axis).values() for axis in axes}))
    rings = dict.fromkeys(ring for rate in rates for ring in rate.pairs)
    if rings:
        yield Fact("pairs", _spans({ring: [pair.rate for pair in verdicts.pairs_of(rates, ring)] for ring in rings}))


def _spans(rates: Mapping[str, Collection[float]]) -> str:
    return ", ".join(f"{name} {_span(found, verdicts.format_bytes_rate)}" for name, found in rates.items())


def _span(values: Collection[float], spelled: Callable[[float], str]) -> str:
    least, most = spelled(min(values)), spelled(max(values))
    if least == most:
        return most
    number, _, unit = least.partition(" ")
    return f"{number} to {most}" if most.endswith(f" {unit}") else f"{least} to {most}"


def _directory(config: Config, nodes: Sequence[str]) -> tuple[Fact, list[Finding]]:
    """See whether all ranks have the run directory. Every rank calls it."""
    directory = run_directory(config)
    wrong = probe.shared_directory(directory, nodes)
    text = f"not the same for all {len(nodes)} ranks" if wrong else "written and read by all ranks"
    return Fact("run directory", f"{directory}: {text}"), verdicts.judge_directory(wrong, nodes)


def _disk(config: Config, nodes: Sequence[str], iteration: int | None) -> tuple[Fact, list[Finding]]:
    """Compare the disk, as rank 0 sees it, with the checkpoints to come. Every rank calls it."""
    seen: tuple[str, int, int, int] | None = None
    with groups.together():
        if groups.where_am_i().rank == 0:
            directory = run_directory(config).absolute()
            there = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
            newest, whole = _whole_checkpoints(directory / layout.CHECKPOINTS)
            now, planned = checkpoints_to_come(config, newest if iteration is None else iteration, whole)
            seen = str(directory), shutil.disk_usage(there).free, now, planned
    directory_name, free, now, planned = groups.broadcast_object(seen)
    size = checkpoint_bytes(config)
    text = f"{verdicts.format_size(free)} free, a checkpoint takes {verdicts.format_size(size)}, {planned} to be saved"
    finding = verdicts.judge_disk(nodes[0], directory_name, free=free, checkpoint=size, now=now, planned=planned)
    return Fact("disk", text), finding


def _whole_checkpoints(directory: Path) -> tuple[int, int]:
    """Give the newest iteration that is saved (0: none is), and how many are."""
    names = list(directory.iterdir()) if directory.is_dir() else []
    iterations = [found for path in names if (found := layout.iteration_of(path)) is not None]
    return max(iterations, default=0), len(iterations)


def checkpoint_bytes(config: Config) -> int:
    """Estimate the size of one checkpoint: weights as they are trained, and what the optimizer keeps of each in fp32.

    That is a master copy and Adam's two moments; an fp32 model without the distributed optimizer is its own master.
    """
    model, fp32 = config.model, config.precision.dtype == "fp32"
    words = (padded_vocab_size(model) - model.vocab_size) * model.hidden_size
    total = parameter_count(model).total + words * (1 if model.share_embeddings_and_output_weights else 2)
    own_master = fp32 and not config.parallel.use_distributed_optimizer
    return total * ((4 if fp32 else 2) + (8 if own_master else 12))


def checkpoints_to_come(config: Config, iteration: int, whole: int) -> tuple[int, int]:
    """Count the checkpoints that must fit beside the `whole` ones that are there now, and those that the run adds.

    keep_last of them stay, and one more is there before the oldest goes. Without keep_last all stay, and only the
    next one must fit for certain: a person may move them away meanwhile.
    """
    train, settings = config.train, config.checkpoint
    last = train.train_iters if train.exit_iters is None else train.exit_iters
    interval = last if settings.save_interval is None else settings.save_interval
    saved = (
        sorted({*range((iteration // interval + 1) * interval, last + 1, interval), last}) if iteration < last else []
    )
    if settings.keep_last is None:
        return min(len(saved), 1), len(saved)
    now = min(len(saved), max(1, settings.keep_last + 1 - whole))
    kept = sum(found % settings.keep_every == 0 for found in saved) if settings.keep_every else 0
    return now, min(len(saved), now + kept)


def _data(config: Config, nodes: Sequence[str]) -> tuple[Fact, list[Finding]]:
    """Compare each node's data files with their manifests and the model. Every rank calls it.

    The tokenizer was compared when the data was opened (`data.blend.check_sources`).
    """
    prefixes = (*config.data.train_data, *(config.data.valid_data or ()))
    looks = groups.where_am_i().rank in probe.first_ranks(nodes)
    seen = {prefix: data_facts(prefix, vocab_size=config.model.vocab_size) for prefix in prefixes} if looks else None
    data: list[dict[str, DataFacts] | None] = groups.gather_objects(seen)
    findings = verdicts.judge_data(data, nodes)
    first = data[0]
    assert first is not None
    described = sum(facts.has_manifest for facts in first.values())
    text = f"{len(prefixes)} {'prefix' if len(prefixes) == 1 else 'prefixes'}: index and size fit"
    if described:
        text += f"; {described} with a manifest: tokenizer, vocabulary, type of ids, counts and sizes fit"
    return Fact("data", "does not fit" if findings else text), findings


def data_facts(prefix: str, *, vocab_size: int) -> DataFacts:
    """Compare a `.bin/.idx` pair with its manifest, and that with the model's vocabulary. No token is read."""
    try:
        file, manifest = IndexedFile.open(prefix), read_manifest(prefix)
        digest = "" if manifest is None else hashlib.sha256(manifest_path(prefix).read_bytes()).hexdigest()
    except (DataError, OSError) as error:
        return DataFacts("", False, (str(error).rstrip("."),))
    sizes = f"{file.bin_bytes} {file.idx_bytes} {file.dtype.name}"
    if manifest is None:
        return DataFacts(sizes, False, ())
    compared = (
        ("bin_bytes", manifest.bin_bytes, file.bin_bytes),
        ("idx_bytes", manifest.idx_bytes, file.idx_bytes),
        ("dtype", manifest.dtype, file.dtype.name),
        ("tokens", manifest.tokens, file.tokens.size),
        ("documents", manifest.documents, file.num_documents),
    )
    where = manifest_path(prefix)
    faults = [f"{where}: {name} is {said}, the files have {has}" for name, said, has in compared if said != has]
    if manifest.tokenizer.vocab_size > vocab_size:
        ids = manifest.tokenizer.vocab_size
        faults.append(f"{where}: its tokenizer has {ids} ids, model.vocab_size ({vocab_size}) must cover them")
    return DataFacts(f"{sizes} {digest}", True, tuple(faults))


def _record(fact: RankFacts, rate: Rates) -> dict[str, Any]:
    clock = None if fact.clock is None else fact.clock._asdict()
    return {
        **asdict(fact),
        "clock": clock,
        "matmul_flops": rate.matmul,
        "all_reduce": {axis: group._asdict() for axis, group in rate.all_reduce.items()},
        "pairs": rate.pairs,
    }
