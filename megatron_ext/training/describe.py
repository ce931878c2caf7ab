"""What a run would be, as text: the report of --dry_run. No torch, and of the data files only their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_ext.config.derived import model_parallel_size
from megatron_ext.config.load import to_toml
from megatron_ext.config.tree import Config
from megatron_ext.data import usage
from megatron_ext.model.flops import flops_per_token, padded_vocab_size, parameter_count
from megatron_ext.model.memory import memory_of_stage
from megatron_ext.optim.schedule import global_batch_size_at, learning_rate, samples_after, total_samples
from megatron_ext.parallel.topology import Topology, layers_of_stage

_LONGEST_RANK_TABLE = 64


def describe(config: Config, *, world_size: int | None, notes: Sequence[str] = ()) -> str:
    """Describe a run: resolved configuration, sizes, memory, batches, learning rate, layout.

    Args:
        config: a sound configuration (`checks.check_config` has nothing to say).
        world_size: number of processes; None: one replica of the model, and a note that says so.
        notes: things to tell besides, such as files that are still missing.

    Returns:
        The report, several titled blocks of lines.

    Raises:
        LaunchError: the parallel sizes do not divide `world_size`.
    """
    if world_size is None:
        world_size = model_parallel_size(config.parallel)
        notes = [
            *notes,
            f"described for one replica of the model ({world_size}); --world_size N describes more",
        ]
    topology = Topology(
        world_size,
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        config.parallel.context_parallel_size,
    )
    uses = usage.estimate(config)
    notes = [*notes, *usage.warnings(uses), *usage.problems(config, uses)]
    blocks = [
        ("configuration (file, then command line, then defaults)", to_toml(config).rstrip().splitlines()),
        ("model", _model(config)),
        (
            "memory of one GPU, GiB (estimate: megatron_ext/model/memory.py; CUDA and NCCL add 3 to 6)",
            _memory(config, world_size),
        ),
        ("batches", _batches(config, topology)),
        (
            "data (by the files' sizes and data.split; ? is of files that are not there)",
            table(usage.rows(uses, seq_length=config.train.seq_length), usage.ALIGNMENT),
        ),
        ("learning rate", _learning_rates(config)),
        (f"layout of {world_size} {'rank' if world_size == 1 else 'ranks'}", _layout(config, topology)),
    ]
    if notes:
        blocks.append(("notes", notes))
    return "\n\n".join(f"{title}\n{_indented(lines)}" for title, lines in blocks)


def _model(config: Config) -> Iterator[str]:
    model, length = config.model, config.train.seq_length
    count, flops = parameter_count(model), flops_per_token(model, length)
    rows = padded_vocab_size(model)
    yield from table(
        [
            ("parameters", f"{count.total:,}"),
            *((f"  {part}", f"{number:,}") for part, number in count._asdict().items()),
        ],
        "<>",
    )
    yield f"vocabulary {model.vocab_size:,}, padded to {rows:,} rows"
    yield (
        f"training FLOPs per token at {length:,} tokens: {flops.total / 1e9:.3f} GF = "
        f"{flops.linear / 1e9:.3f} linear + {flops.attention / 1e9:.3f} causal attention"
    )


def _memory(config: Config, world_size: int) -> Iterator[str]:
    stages = config.parallel.pipeline_model_parallel_size
    rows = [["stage", "weights", "gradients", "optimizer", "activations", "total"]]
    for stage in range(stages):
        estimate = memory_of_stage(config, world_size=world_size, stage=stage)
        rows.append([str(stage), *(f"{part:.2f}" for part in (*estimate, estimate.total))])
    yield from table(rows, ">>>>>>")


def _batches(config: Config, topology: Topology) -> Iterator[str]:
    train = config.train
    samples, first = total_samples(train), global_batch_size_at(train, 0)
    micro_batches = train.global_batch_size // (train.micro_batch_size * topology.data_parallel_size)
    tokens = samples * train.seq_length
    flops = flops_per_token(config.model, train.seq_length).total * tokens
    rows = [
        ("data-parallel size", f"{topology.data_parallel_size:,}"),
        ("micro-batches per iteration and rank", f"{micro_batches:,}"),
        ("tokens per iteration", f"{train.global_batch_size * train.seq_length:,}"),
        ("iterations", f"{train.train_iters:,}"),
        ("total samples", f"{samples:,}"),
        ("total tokens", f"{tokens:,}"),
        ("total training FLOPs", f"{flops:.3e}"),
    ]
    if train.rampup_batch_size is not None:
        rows.insert(3, ("  at the start of the ramp-up", f"{first * train.seq_length:,}"))
    if train.exit_iters is not None:
        stopped = samples_after(train, train.exit_iters) * train.seq_length
        rows.append((f"tokens when it stops, after {train.exit_iters:,} iterations", f"{stopped:,}"))
    yield from table(rows, "<>")


def _learning_rates(config: Config) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    iterations = train.train_iters
    points = {1, iterations} | {max(1, iterations * quarter // 4) for quarter in (1, 2, 3)}
    for other in (optimizer.lr_warmup_iters, optimizer.lr_decay_iters, train.exit_iters):
        if other is not None and 1 <= other <= iterations:
            points.add(other)
    rows = [("iteration", "tokens before it", "learning rate")]
    for iteration in sorted(points):
        consumed = samples_after(train, iteration - 1)
        rate = learning_rate(optimizer, train, consumed)
        rows.append((f"{iteration:,}", f"{consumed * train.seq_length:,}", f"{rate:.4e}"))
    yield from table(rows, ">>>")


def _layout(config: Config, topology: Topology) -> Iterator[str]:
    stages = topology.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    yield (
        f"tensor {topology.tensor_model_parallel_size} x context {topology.context_parallel_size} x data "
        f"{topology.data_parallel_size} x pipeline {stages}; the first varies fastest"
    )
    per_stage = topology.world_size // stages
    rows = [("stage", "ranks", "layers")]
    for stage in range(stages):
        layers = layers_of_stage(config.model.num_layers, stages, chunks, stage)
        first = stage * per_stage
        rows.append((str(stage), _span(first, per_stage), ", ".join(_span(run.start, len(run)) for run in layers)))
    yield from table(rows, "><<")
    if topology.world_size > _LONGEST_RANK_TABLE:
        sharing = topology.tensor_model_parallel_size * topology.context_parallel_size
        yield (
            f"within a stage each {sharing} neighbouring ranks are one data-parallel replica: ranks "
            f"{_span(0, sharing)} are replica 0, and so on"
        )
        return
    ranks = [("rank", "tp", "cp", "dp", "pp")]
    for rank in range(topology.world_size):
        place = topology.coordinates(rank)
        ranks.append((str(rank), str(place.tp), str(place.cp), str(place.dp), str(place.pp)))
    yield from table(ranks, ">>>>>")


def _span(first: int, length: int) -> str:
    return str(first) if length == 1 else f"{first}-{first + length - 1}"


def table(rows: Sequence[Sequence[str]], alignment: str) -> Iterator[str]:
    """Lay out rows in columns, each aligned as Python's format does by `<` or `>`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, alignment, widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
