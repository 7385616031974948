"""Documents of a folder: .txt, .md, .jsonl, and Hugging Face datasets (.arrow as save_to_disk writes it, .parquet)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_lsa.errors import LsaError

SUFFIXES = (".txt", ".md", ".jsonl", ".arrow", ".parquet")


@dataclass(frozen=True)
class Document:
    """One document. `name` is its file's path within the folder, with ":" and the line or row if it has several."""

    name: str
    text: str


def find_files(folder: Path) -> list[Path]:
    """Files that hold documents, in subfolders too, sorted by path; hidden ones and caches of `datasets` are not."""
    found = []
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts) or path.name.startswith("cache-")
        if path.suffix in SUFFIXES and not hidden and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents of `folder`, always in the same order; those without text are left out.

    A .txt or .md file is one document, a line of a .jsonl file is one with its text in the field "text", as is a row
    of a table.

    Raises
    ------
    LsaError
        No such folder, no documents in it, a file that is not UTF-8 or not what its name says, a line or table without
        "text", or a table while pyarrow is not installed. The first is raised when the first document is asked for.
    """
    if not folder.is_dir():
        raise LsaError(f"text: {folder} is not a folder")
    empty = True
    for path in find_files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            documents = _lines(path, name)
        elif path.suffix in (".arrow", ".parquet"):
            documents = _rows(path, name)
        else:
            documents = iter([Document(name, _decode(path))])
        for document in documents:
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise LsaError(f"text: no documents in {folder}; it should hold .txt, .md or .jsonl files or a saved dataset")


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LsaError(f"text: {path} is not UTF-8 at byte {error.start}; convert it or take it out") from None


def _lines(path: Path, name: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no ends of lines here.
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise LsaError(f"text: {path}, line {number} is not JSON: {error.msg}") from None
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise LsaError(f'text: {path}, line {number} has no string field "text"')
        yield Document(f"{name}:{number}", text)


def _rows(path: Path, name: str) -> Iterator[Document]:
    try:
        pa: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise LsaError(f"text: {path} is read with pyarrow, which is not here: pip install pyarrow") from None

    def batches() -> Iterator[Any]:
        if path.suffix == ".parquet":
            yield from parquet.ParquetFile(path).iter_batches(batch_size=64)
            return
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_stream(source)  # what `datasets` writes
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                yield from (file.get_batch(i) for i in range(file.num_record_batches))
                return
            yield from reader

    row = 0
    try:
        for batch in batches():
            if "text" not in batch.schema.names:
                raise LsaError(f'text: {path} has no column "text" but {", ".join(batch.schema.names)}')
            for text in batch.column("text").to_pylist():
                row += 1
                if text is not None and not isinstance(text, str):
                    raise LsaError(f'text: {path}, row {row}: "text" is not a string')
                yield Document(f"{name}:{row}", text or "")
    except (pa.ArrowException, OSError) as error:
        raise LsaError(f"text: {path} cannot be read: {str(error).splitlines()[0]}") from None
