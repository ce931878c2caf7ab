"""The run directory: what a run leaves of itself besides checkpoints.

RUN/config.toml        the resolved configuration of the newest start
RUN/environment.json   code revision, versions, machine of the newest start
RUN/tokenizer/         the tokenizer that the data was made with
RUN/log.txt  metrics.jsonl  tensorboard/  checkpoints/  preflight.json  skipped.json  samples/  hang-*
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ext.config.load import to_toml
from megatron_ext.config.tree import Config
from megatron_ext.durable import write_whole
from megatron_ext.errors import ConfigError
from megatron_ext.training.provenance import code_revision, environment_report

TOKENIZER = "tokenizer"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ROOT = Path(__file__).resolve().parents[2]


def run_directory(config: Config) -> Path:
    """Where a run keeps everything."""
    return Path(config.run_dir) if config.run_dir else Path("runs") / config.name


def prepare(config: Config, *, world_size: int) -> None:
    """Make the run directory and describe the run in it. One rank calls it.

    Raises:
        ConfigError: it cannot be written.
    """
    directory = run_directory(config)
    try:
        (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
        write_whole(directory / "config.toml", to_toml(config))
        environment = {"code_revision": code_revision(_ROOT), "world_size": world_size, **environment_report()}
        write_whole(directory / "environment.json", json.dumps(environment, indent=1) + "\n")
        source = Path(config.data.tokenizer)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file() and source.resolve() != (directory / TOKENIZER).resolve():
                write_whole(directory / TOKENIZER / name, (source / name).read_bytes())
    except OSError as error:
        raise ConfigError(f"run_dir ({directory}): cannot be written ({error.strerror}); name another.") from None
