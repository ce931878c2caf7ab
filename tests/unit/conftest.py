"""Fixtures of the unit tests: process groups of one process, and the tiny run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.tree import Config, ParallelConfig
from megatron_ext.parallel.groups import Place
from megatron_ext.parallel.launch import single_process
from tests.conftest import TINY_TOML


@pytest.fixture(scope="module")
def one_process() -> Iterator[Place]:
    """Megatron's groups over this process alone, on the CPU or the GPU; left again after the module."""
    from megatron_ext.parallel import groups

    place = groups.initialize(ParallelConfig(), single_process(), seed=1)
    try:
        yield place
    finally:
        groups.destroy()


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Load the tiny configuration with command-line words, its run directory in this test's folder."""

    def load(*overrides: str) -> Config:
        path = tmp_path / "tiny.toml"
        path.write_text(TINY_TOML.format(run_dir=tmp_path / "run", data=tiny_data))
        return load_config(path, overrides)

    return load
