"""docs/CONFIG.md is what the configuration tree says."""

import importlib.util
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

from megatron_ext.config.tree import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_config_docs", ROOT / "tools/generate_config_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_docs_in_the_repository_are_current(generator: ModuleType) -> None:
    assert generator.main(["--check"]) == 0


def test_config_docs_name_every_field_once_in_its_section() -> None:
    sections = (ROOT / "docs/CONFIG.md").read_text(encoding="utf-8").split("\n## ")
    for name, section in get_type_hints(Config).items():
        if is_dataclass(section):
            (text,) = [part for part in sections if part.startswith(f"[{name}]")]
            for field in fields(section):
                assert text.count(f"\n| `{field.name}` |") == 1, field.name


def test_config_docs_stale_file_fails_the_check(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "CONFIG.md"
    generator.main(["--output", str(target)])
    assert generator.main(["--check", "--output", str(target)]) == 0
    target.write_text(target.read_text(encoding="utf-8").replace("`128`", "`64`"), encoding="utf-8")
    assert generator.main(["--check", "--output", str(target)]) == 1
    assert f"{target} is stale; run python tools/generate_config_docs.py" in capsys.readouterr().err


def test_config_docs_unwritable_target_gives_one_line(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator.main(["--output", str(tmp_path / "no" / "CONFIG.md")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/no/CONFIG.md: cannot be written:")
