"""Rows of named fields from JSON Lines, CSV and parquet files, from folders of them, and from the Hugging Face hub."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drpo.errors import InputError, nearest, nearest_path
from drpo.lazily import lazily
from drpo.spec import import_named

datasets = lazily("datasets")
Row = Mapping[str, Any]
_HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def is_file(source: str) -> bool:
    """Whether `source` is one file: by its suffix, unless a folder has it, or because such a file exists.

    Example:
        >>> is_file("train.jsonl"), is_file("openai/gsm8k")
        (True, False)
    """
    return Path(source).is_file() or (source.endswith(_SUFFIXES) and not Path(source).is_dir())


def read_rows(source: str, split: str, config: str | None = None) -> list[Row]:
    """Read the rows of a file, of one split of a folder, or of one split of a hub dataset.

    Args:
        source: a .jsonl, .json (one object a line, or one array), .csv (whose first line names the fields) or .parquet
            file; a folder with files named `split.jsonl` or `split-00000-of-00002.parquet`; or a hub id, "owner/name".
        split: the part of a folder or hub dataset; unused for a file.
        config: the configuration of a hub dataset; unused otherwise.

    Returns:
        The rows, in order.

    Raises:
        InputError: the source does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    if is_file(source):
        return _read_file(path)
    if path.is_dir():
        return [row for file in _split_files(path, split) for row in _read_file(file)]
    if path.exists():  # a pipe, such as /dev/fd/63
        raise InputError(f"{source}: neither a file nor a folder; write the data to a file, which a run reads again")
    if source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder{nearest_path(path)}")
    return _read_hub(source, split, config)


def reach(row: Row, name: str, where: str) -> Any:
    """Return a field of a row; a dotted name reaches into nested fields and, by number, into lists.

    Args:
        row: the row.
        name: "answer", "reward_model.ground_truth", "prompt.0.content".
        where: the row, for the error message.

    Returns:
        The field's value.

    Raises:
        InputError: no such field.

    Example:
        >>> reach({"prompt": [{"role": "user", "content": "Hello"}]}, "prompt.0.content", "row 1")
        'Hello'
    """
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise InputError(f"{where}: no field {name!r}; {_fields(value, part)}")
    return value


def _fields(value: Any, part: str) -> str:
    if isinstance(value, list):
        return f"{part!r} is looked up in a list of {len(value)}"
    if not isinstance(value, Mapping):
        return f"{part!r} is looked up in {repr(value)[:60]}"
    hint = nearest(part, value)
    return f"the fields are {', '.join(value)}" + (hint if "did you mean" in hint else "")


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if not files:
        raise InputError(f"{folder}: no .jsonl, .json, .csv or .parquet file in this folder")
    splits = {file: file.name.split(".")[0].split("-")[0] for file in files}
    if split not in splits.values():
        raise InputError(f"{folder}: no split {split!r}{nearest(split, sorted(set(splits.values())))}")
    return [file for file in files if splits[file] == split]


def _read_file(path: Path) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            rows: list[Row] = import_named("drpo.tasks.parquet", "read_parquet", "reader")(path)
            return rows
        if path.suffix == ".csv":
            return list(_parse_csv(path, path.read_text(encoding="utf-8-sig")))
        return list(_parse_json(path, path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{nearest_path(path)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}; convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}") from None


def _parse_json(path: Path, text: str) -> Iterator[Row]:
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from (_named(row, f"{path} item {number}") for number, row in enumerate(_decode(text, str(path)), 1))
        return
    if path.suffix == ".json" and text.split("\n")[0].strip() == "{":
        raise InputError(f"{path}: one object over several lines; write an array of objects, or one object a line")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may contain U+2028
        if line.strip():
            yield _named(_decode(line, f"{path} line {number}"), f"{path} line {number}")


def _parse_csv(path: Path, text: str) -> Iterator[Row]:
    """Yield the lines of a table, all values as text; the first line names the fields, an empty value is none."""
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(table, [])]
        if len(names) == 1 and re.search(r"[;\t|]", names[0]):
            raise InputError(f"{path} line 1: one field, {names[0]!r}; separate the values by commas")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{path} line 1: two fields are named {twice!r}")
        for values in table:
            if values and len(values) != len(names):
                wrong = f"{len(values)} values, where line 1 names {len(names)} fields ({', '.join(names)})"
                raise InputError(f"{path} line {table.line_num}: {wrong}; put quotes around a value that holds commas")
            if values:
                yield {name: value or None for name, value in zip(names, values, strict=True)}
    except csv.Error as error:
        raise InputError(f"{path} line {table.line_num}: not CSV: {error}") from None


def _named(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {repr(row)[:60]} is not an object with named fields")
    return row


def _decode(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if _HALF.search(text):  # usually one of a valid pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(f"{where}: {half!a} is half a character, which no text has; repair the data") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    except ValueError as error:  # an integer with more digits than Python parses
        raise InputError(f"{where}: not JSON that can be read: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON: nested too deeply") from None


def _read_hub(source: str, split: str, config: str | None) -> list[Row]:
    try:
        rows: list[Row] = list(datasets.load_dataset(source, config, split=split, trust_remote_code=False))
        return rows
    except Exception as error:  # the hub's client passes on any exception of its transport
        raise InputError(
            f"{source!r} is neither a file or folder here nor a hub dataset that can be loaded "
            f"(config {config!r}, split {split!r}): {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
