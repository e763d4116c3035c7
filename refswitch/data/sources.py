# May import: standard library, zstandard, refswitch.data (config), refswitch.errors.
"""From files to documents, as a stream: nothing is held but the document at hand.

Plain text (whatever is no JSON), JSON lines (`.jsonl`, `.ndjson`, `.json`), each as it is, gzipped (`.gz`) or in zstd (`.zst`). Text is UTF-8;
anything else is refused with the byte where it stops being so. Files come in the order of their paths relative to what was named, so that a corpus
is the same wherever it lies. A document of more than `LONGEST` characters is cut at the end of a line.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from refswitch.data.config import Documents
from refswitch.errors import InputError

BLOCK = 1 << 20  # bytes read at a time
ZSTD_BLOCK = 1 << 12  # a byte of zstd may stand for 32 KiB of text: few at a time keep a hostile file from filling the memory
LONGEST = 1 << 22  # characters of one document; a longer one is cut
LONGEST_LINE = 1 << 26  # characters of a line that is a document, which is not
JSON_LINES = (".jsonl", ".ndjson", ".json")
# What not every installation carries (tests are a package of their own on many systems), or is no text to learn from (tables of character codes).
NOT_PYTHON_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib-dynload"}


class Source(NamedTuple):
    """One file: where it is, and the name that does not depend on where."""

    path: Path
    name: str


class Document(NamedTuple):
    """One document."""

    name: str
    text: str
    held_out: bool = False


def python_text() -> list[Source]:
    """Return the standard library's source files: the corpus that needs no download, without tests, installed packages and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not NOT_PYTHON_TEXT.intersection(inner.parts) and not inner.name.startswith("_sysconfigdata") and is_utf8(path):
            found.append(Source(path, inner.as_posix()))
    if not found:
        raise InputError(f"data.sources: this Python has no source text under {root}; name a file or folder of your own")
    return sorted(found, key=lambda source: source.name)


def is_utf8(path: Path) -> bool:
    """Return whether a file of the default corpus is text; one that is not is left out, wherever it lies."""
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def find_sources(sources: tuple[str, ...]) -> list[Source]:
    """Return the files that are meant, each once, in the order of the given names and of the paths below them.

    Parameters
    ----------
    sources : tuple of str
        Files, folders (all their files but hidden ones) and globs; empty for `python_text`.

    Returns
    -------
    list
        The files with the names by which they are split and digested.

    Raises
    ------
    InputError
        Where a name matches no file.
    """
    if not sources:
        return python_text()
    found: dict[str, Source] = {}
    for given in sources:
        path = Path(given).expanduser()
        if path.is_file():
            matches = [Source(path, path.name)]
        elif path.is_dir():
            matches = under(path, [inner for inner in path.rglob("*") if inner.is_file()])
        else:
            root = Path(*path.parts[: next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))])
            matches = under(root, [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()])
        if not matches:
            kind = "holds no file" if path.is_dir() else "matches no file" if glob.has_magic(given) else "there is no such file or folder"
            raise InputError(f"data.sources: {given}: {kind}")
        for match in matches:
            found.setdefault(str(match.path.resolve()), match)
    return list(found.values())


def under(root: Path, paths: list[Path]) -> list[Source]:
    """Return the files below a folder by their relative paths, without hidden ones."""
    named = [Source(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted((one for one in named if not any(part.startswith(".") for part in Path(one.name).parts)), key=lambda source: source.name)


def zstd_blocks(path: Path) -> Iterator[bytes]:
    """Yield a zstd file's content, frame after frame; the library's own reader takes a file that is cut short for one that ends."""
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: reading zstd needs the package zstandard: pip install 'refswitch[text]'") from None
    with path.open("rb") as file:
        frame = zstandard.ZstdDecompressor().decompressobj()
        fresh = True
        while block := file.read(ZSTD_BLOCK):
            while block:
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path}: is no zstd file, or damaged: {error}") from None
                fresh, block = False, b""
                if frame.eof:
                    block, fresh = frame.unused_data, True
                    frame = zstandard.ZstdDecompressor().decompressobj()
        if not fresh:
            raise InputError(f"{path}: is cut short")


def byte_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's content in blocks, decompressed."""
    if path.suffix == ".zst":
        yield from zstd_blocks(path)
        return
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except EOFError:
        raise InputError(f"{path}: is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: is no gzip file, or damaged: {error}") from None


def text_blocks(path: Path) -> Iterator[str]:
    """Yield a file's text in blocks; a byte order mark is no text.

    Raises
    ------
    InputError
        With the first byte that is not UTF-8, counted from 0 in the decompressed text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    seen = 0
    try:
        for block in byte_blocks(path):
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, seen - pending + error.start) from None
            yield text.removeprefix("\ufeff") if seen == 0 else text
            seen += len(block)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if pending := len(decoder.getstate()[0]):
        raise not_utf8(path, seen - pending)


def not_utf8(path: Path, position: int) -> InputError:
    """Return the complaint about a wrong encoding."""
    return InputError(f"{path}: byte {position} is not UTF-8; leave the file out, or convert it: iconv -f latin1 -t utf-8")


def pieces(path: Path, break_at: str) -> Iterator[str]:
    """Yield a file's text in pieces of at most `LONGEST` characters.

    The whole of it, or cut behind the last break that fits, a line's end, or anywhere.
    """
    held = ""
    for block in text_blocks(path):
        held += block
        while len(held) > LONGEST:
            ends = (held.rfind(mark, 0, LONGEST) + len(mark) for mark in (break_at, "\n") if mark in held[:LONGEST])
            cut = next(ends, LONGEST)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def lines(path: Path) -> Iterator[str]:
    """Yield a file's lines without their ends.

    Raises
    ------
    InputError
        Where a line is longer than `LONGEST_LINE`: no line of text is, and it would have to be held.
    """
    held: list[str] = []  # of the line that is not at its end
    size = number = 0
    for block in text_blocks(path):
        first, *whole = block.split("\n")
        held.append(first)
        size += len(first)
        if size > LONGEST_LINE:
            raise InputError(f"{path}, line {number + 1}: is longer than {LONGEST_LINE} characters")
        if whole:
            number += len(whole)
            yield "".join(held).removesuffix("\r")
            yield from (line.removesuffix("\r") for line in whole[:-1])
            held, size = [whole[-1]], len(whole[-1])
    if size:
        yield "".join(held)


def json_records(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the named texts of each JSON line; blank lines are skipped.

    Raises
    ------
    InputError
        With the first line that is no JSON object with these texts.
    """
    for number, line in enumerate(lines(path), 1):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: is not JSON") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: should be a JSON object")
        for field in fields:
            text = record.get(field)
            if not isinstance(text, str):
                known = ", ".join(key for key in record if isinstance(record[key], str))
                raise InputError(f"{path}, line {number}: has no text {field!r}" + (f"; it has {known}" if known else ""))
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise InputError(f"{path}, line {number}: {field!r} holds half of a surrogate pair, which is no character")
        yield tuple(record[field] for field in fields)


def is_json_lines(path: Path) -> bool:
    """Return whether a file's name says that it holds JSON lines, compressed or not."""
    return Path(path.stem if path.suffix in (".gz", ".zst") else path.name).suffix in JSON_LINES


def documents_of(source: Source, field: str, unit: Documents) -> Iterator[Document]:
    """Yield one file's documents: JSON lines are one each, a plain file is one, or its lines are, or its paragraphs.

    Parameters
    ----------
    source : Source
        The file.
    field : str
        Where a JSON line's text stands.
    unit : str
        What one document of a plain file is; blank ones are skipped.

    Yields
    ------
    Document
        In the file's order. The first of a whole file is named like the file, any other by its number too.
    """
    texts: Iterator[str]
    if is_json_lines(source.path):
        texts = (text for (text,) in json_records(source.path, (field,)))
    elif unit == "line":
        texts = lines(source.path)
    elif unit == "paragraph":
        texts = (part for piece in pieces(source.path, "\n\n") for part in re.split(r"\r?\n(?:[ \t]*\r?\n)+", piece))
    else:
        texts = pieces(source.path, "\n")
    for number, text in enumerate(text for text in texts if text and not text.isspace()):
        yield Document(source.name if number == 0 else f"{source.name}:{number}", text)
