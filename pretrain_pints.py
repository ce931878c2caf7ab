#!/usr/bin/env python3
"""Pretrain a language model with Megatron-Core: on one CPU, on many GPUs, from one configuration.

    python pretrain_pints.py CONFIG [--section.field VALUE …]
    torchrun --nproc-per-node 8 pretrain_pints.py CONFIG
    mpiexec -n 8 python pretrain_pints.py CONFIG
    srun python pretrain_pints.py CONFIG

CONFIG is a TOML file, or the name of one in configs/. `--dry_run` shows what would run, and starts nothing.
This file is the table of contents; each step lives in megatron_ext/.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron_ext.config.checks import check_config, check_files
from megatron_ext.config.load import parse_command_line
from megatron_ext.config.tree import Config
from megatron_ext.errors import EXIT_CODE, ConfigError, MegapintsError
from megatron_ext.parallel.launch import (
    Launch,
    cuda_is_visible,
    find_job,
    find_launch,
    launched,
    set_runtime_environment,
)

if TYPE_CHECKING:
    from megatron_ext.training.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, check everything that can be checked without torch, then show or run."""
    launcher = None
    try:
        launcher = launched()
        arguments = sys.argv[1:] if argv is None else argv
        command = parse_command_line(arguments, prog="pretrain_pints.py", description=__doc__ or "")
        if command.dry_run:
            if launcher is None or launcher.rank == 0:
                dry_run(command.config, command.world_size or (launcher.world_size if launcher else None))
            return 0
        raise_problems(check_config(command.config, world_size=launcher.world_size if launcher else 1))
        deterministic = command.config.reliability.deterministic
        set_runtime_environment(cuda=cuda_is_visible(), deterministic=deterministic)
        run(command.config, find_launch())
    except MegapintsError as error:
        first_of_node = launcher is None or launcher.local_rank == 0
        if first_of_node:  # once per node: a file may be missing on one of them
            tell(error)
        if launcher is not None and launcher.rank != 0:
            let_rank_0_end_first()
        if not first_of_node and not error.everywhere:  # still here, so it was not the same on all ranks
            tell(error)
        return EXIT_CODE
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def tell(error: MegapintsError) -> None:
    """Print what a person has to mend."""
    print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)


def let_rank_0_end_first() -> None:
    """Wait for the launcher to end this rank, as it does when rank 0 fails; go on where only others failed.

    srun, torchrun and mpiexec end all ranks at the first that fails: were this the first, those that found the
    same a moment later would be ended before they could say so.
    """
    signal.signal(signal.SIGTERM, lambda *_: leave(EXIT_CODE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # a Stop blocks it
    time.sleep(10)


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter down.

    After a refusal the process groups' threads may still run, and an interpreter that ends around them aborts now
    and then ("terminate called without an active exception", torch 2.13 with gloo), with another exit code.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def raise_problems(problems: list[str]) -> None:
    """Stop on every problem of a configuration at once."""
    if problems:
        raise ConfigError(problems)


def dry_run(config: Config, world_size: int | None) -> None:
    """Print what would run. The data need not be there yet; what is missing is noted."""
    from megatron_ext.training.describe import describe

    raise_problems(check_config(config, world_size=world_size, files=False))
    print(describe(config, world_size=world_size, notes=check_files(config)))


def run(config: Config, launch: Launch) -> None:
    """Set up log and groups, train, and write down what went wrong where something did. Every rank calls it."""
    from megatron_ext.log import setup_logging
    from megatron_ext.parallel import device, groups
    from megatron_ext.training import restarts, run_dir
    from megatron_ext.training.watchdog import Watchdog

    directory = run_dir.run_directory(config)
    setup_logging(rank=launch.rank, world_size=launch.world_size, path=directory / "log.txt")
    with contextlib.ExitStack() as closing, restarts.failure_noted(directory, rank=launch.rank):
        device.choose_algorithms(deterministic=config.reliability.deterministic)
        place = groups.initialize(config.parallel, launch, seed=config.train.seed)
        with Watchdog(config, place, launch, directory) as watchdog:
            build_and_train(config, launch, watchdog, closing)
            groups.destroy()


def build_and_train(config: Config, launch: Launch, watchdog: Watchdog, closing: contextlib.ExitStack) -> None:
    """Build every part of the run, in order, and train. Every rank calls it; `closing` ends what must be ended."""
    from megatron_ext.checkpoint.layout import CHECKPOINTS
    from megatron_ext.checkpoint.save_load import Checkpoints
    from megatron_ext.data.blend import build_samples
    from megatron_ext.data.documents import find_document_end
    from megatron_ext.data.loader import Loader
    from megatron_ext.data.tokenizer import Tokenizer
    from megatron_ext.model.gpt import build_model, wrap_for_training
    from megatron_ext.model.transformer_config import uses_transformer_engine
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.parallel import groups
    from megatron_ext.training import preflight, run_dir
    from megatron_ext.training.bad_iterations import BadIterations
    from megatron_ext.training.loop import Run, train
    from megatron_ext.training.metrics import Metrics
    from megatron_ext.training.report import report_start
    from megatron_ext.training.samples_log import SamplesLog
    from megatron_ext.training.start import starting_state
    from megatron_ext.training.step import Machine, connect
    from megatron_ext.training.stop import Stop
    from megatron_ext.training.stragglers import Stragglers

    directory, job, place = run_dir.run_directory(config), find_job(), groups.where_am_i()
    stop = Stop(config.train, job)
    with groups.together():
        tokenizer = Tokenizer.load(config.data.tokenizer)
    data = build_samples(config, tokenizer)
    document_end = find_document_end(config, tokenizer)
    model = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, model.wrapped)
    connect(config, model, optimizer)
    checkpoints = Checkpoints(
        config,
        place,
        directory=directory / CHECKPOINTS,
        bare_chunks=model.bare,
        optimizer=optimizer,
        tokenizer_sha256=tokenizer.sha256,
        transformer_engine=uses_transformer_engine(config),
    )
    state = starting_state(config, checkpoints)
    report_start(config, place, data, state)
    preflight.check(config, launch, iteration=state.iteration)
    with groups.together():  # only now: a start that was refused leaves the run's description alone
        if place.rank == 0:
            run_dir.prepare(config, world_size=place.world_size)
    shape = {"micro_batch_size": config.train.micro_batch_size, "seq_length": config.train.seq_length}
    loader = Loader(data.train, place, **shape, document_end=document_end)
    valid_loader = Loader(data.valid, place, **shape, document_end=document_end) if data.valid else None
    machine = Machine(config=config, place=place, model=model, optimizer=optimizer, loader=loader)
    metrics = Metrics(config, directory, rank=place.rank, world_size=place.world_size, job=job)
    closing.callback(metrics.close)
    samples_log = SamplesLog(directory, loader, place, enabled=config.log.samples)
    closing.callback(samples_log.close)
    train(
        Run(
            config=config,
            machine=machine,
            valid_loader=valid_loader,
            checkpoints=checkpoints,
            bad_iterations=BadIterations(config, directory, data.train),
            samples_log=samples_log,
            metrics=metrics,
            stop=stop,
            watchdog=watchdog,
            stragglers=Stragglers(config, place, watchdog),
        ),
        state,
    )


if __name__ == "__main__":
    if code := main():
        leave(code)
