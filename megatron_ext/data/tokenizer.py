"""Layer 4: the tokenizer of a run: exactly what `tokenizer.json` says, by the `tokenizers` library alone.

A folder as Hugging Face writes it: tokenizer.json, tokenizer_config.json, special_tokens_map.json. Classes
of `transformers` are never used to make ids: version 5 rebuilds tokenizers that are declared as Llama-class
from their vocabulary and so changes ids ("user" after `<|im_start|>` becomes 1838 where tokenizer.json gives
2188). For the same reason `export_tokenizer` declares `PreTrainedTokenizerFast`, which keeps the file's own
behaviour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ext.durable import write_whole
from megatron_ext.errors import DataError

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

UNLIMITED_LENGTH = int(1e30)
"""`model_max_length` of a tokenizer that belongs to no model yet, in Hugging Face's spelling."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] in ['user', 'system'] %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as 1.5-Pints writes it, but for one thing: its published template ends a conversation whose last
turn is the assistant's with a second end token, after the newline, which no training text has. This one does
not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A loaded tokenizer with the ids of its special roles."""

    folder: Path
    vocab_size: int
    """Highest id + 1, added tokens included."""
    eod: int
    """Id of eos_token: ends every document."""
    bos: int | None
    pad: int | None
    sha256: str
    """SHA-256 of tokenizer.json, in hexadecimal."""
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load a tokenizer folder.

        Special roles come from tokenizer_config.json, and from special_tokens_map.json for those that it
        leaves out.

        Raises:
            DataError: the folder or tokenizer.json is missing or damaged, or no eos_token has an id.
        """
        folder = Path(folder)
        content = _read_bytes(folder / "tokenizer.json")
        backend = _parse(content, folder / "tokenizer.json")
        # Both would change ids without a word: cut long texts, lengthen short ones.
        backend.no_truncation()
        backend.no_padding()
        roles = special_roles(folder)
        ids: dict[str, int] = {}
        for role, token in roles.items():
            number = backend.token_to_id(token)
            if number is None:
                raise DataError(
                    f"{folder}: {role} is {token!r}, which tokenizer.json does not have; make the two agree."
                )
            ids[role] = number
        if "eos_token" not in ids:
            raise DataError(
                f"{folder}: names no eos_token, which ends every document; "
                "add it to tokenizer_config.json (a token of tokenizer.json)."
            )
        return cls(
            folder=folder,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            eod=ids["eos_token"],
            bos=ids.get("bos_token"),
            pad=ids.get("pad_token"),
            sha256=hashlib.sha256(content).hexdigest(),
            backend=backend,
        )

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids: adds no special token, but one spelt out in the text gets its id."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into ids as `encode` does, on all cores (one text: on one core)."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelt out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def special_roles(folder: Path) -> dict[str, str]:
    """Read which token has which role (`bos_token`, `eos_token`, `unk_token`, `pad_token`); only those named.

    Raises:
        DataError: a file is not a JSON object, or a role is neither a string nor an object with a `content`.
    """
    config = _read_object(folder / "tokenizer_config.json")
    fallback = _read_object(folder / "special_tokens_map.json")
    roles = {}
    for role in ROLES:
        value = config.get(role)
        if value is None:
            value = fallback.get(role)
        if isinstance(value, Mapping):
            value = value.get("content")
            if not isinstance(value, str):
                raise DataError(f"{folder}: {role} is an object without a 'content' string.")
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{folder}: {role} is {value!r}, must be a string or an object with a 'content'.")
        roles[role] = value
    return roles


def read_chat_template(folder: Path) -> Any:
    """Read a folder's chat template: from chat_template.jinja if there, else from tokenizer_config.json.

    That is the order of transformers. Returns a string, or the list of named templates that
    tokenizer_config.json may hold, or None.
    """
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        return _read_object(folder / "tokenizer_config.json").get("chat_template")


def export_tokenizer(
    source_folder: str | Path,
    target_folder: str | Path,
    *,
    model_max_length: int,
    chat_template: str | None = None,
) -> None:
    """Write a tokenizer folder from which `AutoTokenizer` gives exactly the ids of `Tokenizer`.

    Args:
        source_folder: any folder that `Tokenizer.load` takes; its tokenizer.json is copied byte for byte.
        target_folder: made if need be; files of the same names are replaced.
        model_max_length: longest sequence of the model, in tokens.
        chat_template: default the source's own, if it has one.

    Raises:
        DataError: the source is not a whole tokenizer.
    """
    source = Path(source_folder)
    Tokenizer.load(source)
    write_tokenizer_folder(
        Path(target_folder),
        _read_bytes(source / "tokenizer.json"),
        roles=special_roles(source),
        model_max_length=model_max_length,
        chat_template=read_chat_template(source) if chat_template is None else chat_template,
    )


def write_tokenizer_folder(
    folder: Path,
    tokenizer_json: bytes,
    *,
    roles: Mapping[str, str],
    model_max_length: int,
    chat_template: Any = None,
) -> None:
    """Write a tokenizer folder's three files, tokenizer.json last: without it a folder is no tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        **roles,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        # The class would give token_type_ids too, which a Llama model's generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    # A jinja file left from before would win over the configuration's template.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_whole(folder / "tokenizer_config.json", _json_bytes(config))
    write_whole(folder / "special_tokens_map.json", _json_bytes(dict(roles)))
    write_whole(folder / "tokenizer.json", tokenizer_json)


def _json_bytes(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read_bytes(path: Path) -> bytes:
    """Read tokenizer.json, or say what the folder lacks."""
    try:
        return path.read_bytes()
    except OSError as error:
        if not path.parent.is_dir():
            problem = f"{path.parent}: no such folder; must be a tokenizer folder (with a tokenizer.json)."
        elif isinstance(error, FileNotFoundError):
            problem = f"{path}: missing; a tokenizer folder must hold one (tokenizer.model alone will not do)."
        else:
            problem = f"{path}: cannot be read ({error.strerror})."
        raise DataError(problem) from error


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare `Exception` or `ValueError`
        raise DataError(f"{path}: is not a tokenizer of the `tokenizers` library ({error}).") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object, is a {type(content).__name__}.")
    return content
