"""Functions that read rows of data from JSONL files, folders of them, and whatever ``datasets.load_dataset`` reads.

Each row keeps its origin, so that an error can name the file and the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.config import ConfigError
from vpd.types import Messages

MAX_ROWS = 1_000_000
"""How many rows of a dataset are read: a stream may have no end."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data.

    Attributes:
        id: A name that is unique among the rows loaded together, such as ``train/12``.
        origin: The place where the row was read, for error messages.
        values: The row's values by column.
    """

    id: str
    origin: str
    values: Mapping[str, Any]


def read_jsonl(path: Path, name: str) -> list[Row]:
    """Read the rows of a JSONL file; blank lines are passed over. The rows' ids begin with ``name``.

    Raises:
        ConfigError: The file is missing or empty, or a line is not a JSON object (the message names its number).
    """
    try:
        # Editors and spreadsheets may put a byte order mark before the text.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"There is no data file {path}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from None
    rows = []
    # splitlines() would also split at other line separators, such as U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(Row(f"{name}/{number}", f"{path}, line {number}", _json_object(line, path, number)))
    if not rows:
        raise ConfigError(f"The data file {path} is empty.")
    return rows


def load_rows(path: str | Path, config: str | None = None) -> dict[str, list[Row]]:
    """Read rows by split: ``train``, and ``test`` where there is one.

    ``path`` is a JSONL file, a folder with ``train.jsonl`` and perhaps ``test.jsonl``, or anything that
    ``datasets.load_dataset`` takes (a hub id, a folder of parquet files). Such a dataset's splits ``train`` and
    ``test`` are used; a single split counts as ``train``. ``config`` names one of a hub dataset's configurations.

    Raises:
        ConfigError: There is nothing to read at ``path``, or it is malformed.
    """
    folder = Path(path)
    if folder.is_dir() and (folder / "train.jsonl").is_file():
        names = [name for name in ("train", "test") if (folder / f"{name}.jsonl").is_file()]
        return {name: read_jsonl(folder / f"{name}.jsonl", name) for name in names}
    if folder.is_file():
        return {"train": read_jsonl(folder, "train")}
    if folder.is_dir() or (HUB_ID.fullmatch(str(path)) and not str(path).endswith(".jsonl")):
        return _load_dataset(str(path), config)
    raise ConfigError(f"There is no data file or folder {path}, and it is not a Hugging Face dataset id either.")


def rows_of(dataset: Iterable[Any], name: str, origin: str | None = None) -> list[Row]:
    """Return the rows of a ``datasets.Dataset``, of a pandas ``DataFrame`` or of a list of dicts.

    Raises:
        ConfigError: It holds several data sets by name, something else than rows, or more rows than are read.
    """
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{origin or name} is a {type(dataset).__name__} with {', '.join(map(str, dataset))}: give one of them, "
            f"such as dataset[{next(iter(dataset), 'train')!r}]."
        )
    if type(dataset).__name__ == "DataFrame":
        dataset = dataset.to_dict("records")  # pyright: ignore[reportAttributeAccessIssue]
    rows = []
    for index, values in enumerate(dataset):
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{origin or name}, row {index} is a {type(values).__name__}: rows must be dicts by column."
            )
        if index == MAX_ROWS:
            raise ConfigError(
                f"{origin or name} has more than {MAX_ROWS:,} rows: take a part of it, as stream.take(N)."
            )
        rows.append(Row(f"{name}/{index}", f"{origin or name}, row {index}", values))
    return rows


def chat_prompt(row: Row) -> Messages:
    """Return the column ``prompt`` as chat messages; a plain text becomes one user message.

    Raises:
        ConfigError: The prompt is neither a text nor a chat that ends with a user message; the message names the row.
    """
    prompt = row.values.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
        raise ConfigError(
            f"{row.origin}: the column 'prompt' must be a text or chat messages (a list of role and content), "
            f"got {prompt!r}."
        )
    if prompt[-1]["role"] != "user":
        raise ConfigError(f"{row.origin}: the prompt's last message must be the user's, not {prompt[-1]['role']}.")
    return prompt


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_text_part, content)))


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _load_dataset(path: str, config: str | None) -> dict[str, list[Row]]:
    import datasets

    try:
        splits = datasets.load_dataset(path, config)
    except Exception as error:
        raise ConfigError(
            f"{path} is neither a JSONL file nor a folder with train.jsonl, and as a Hugging Face dataset it could "
            f"not be loaded: {error}"
        ) from error
    names = [str(name) for name in splits]
    if "train" not in names and len(names) > 1:
        raise ConfigError(f"The dataset {path} has the splits {', '.join(names)}, but none named train.")
    train = "train" if "train" in names else names[0]
    rows = {"train": rows_of(splits[train], "train", f"{path}, split {train}")}
    if "test" in names and train != "test":
        rows["test"] = rows_of(splits["test"], "test", f"{path}, split test")
    return rows


def _json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {number} must be a JSON object, not {type(value).__name__}.")
    return value
