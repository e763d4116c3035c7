# May import: standard library, numpy, refswitch.data (config, cleaning, sources, vocabulary), refswitch.errors.
"""A corpus: its documents as tokens in two files, training and held-out, which are mapped and never loaded.

The text is read once, as a stream; a corpus may be larger than the memory. What stays in memory is nothing but the mapping. A folder for the tokens
(`cache`) lets a later run, or another rank, begin at once; it is complete or absent, and belongs to exactly these files, rules and this vocabulary.
The digest says which text it was: of the documents' names and texts in order, so that it does not depend on where they lay, nor on the vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from refswitch.data.cleaning import clean_page, without_duplicates
from refswitch.data.config import DataConfig
from refswitch.data.sources import Document, Source, documents_of, find_sources
from refswitch.data.vocabulary import Vocabulary, digest_of, open_vocabulary
from refswitch.errors import InputError

VERSION = 1  # of the cache's files; counts up with whatever changes the tokens of a text
TEXT_FIELDS = ("field", "documents", "held_out", "clean", "deduplicate")  # the fields of the configuration that decide which text it is
HASH_BITS = 64
PROGRESS_EVERY = 1 << 20  # bytes
PARTS = ("train", "held_out")
RECORD = "corpus.json"

Progress = Callable[[int, int], None]


class Tokens(NamedTuple):
    """One part's tokens, all documents one after the other."""

    ids_N: np.ndarray  # uint16 or uint32, mapped from a file
    end_I: np.ndarray  # int64, behind the last token of each document
    digest: str  # of text and vocabulary together


class Corpus(NamedTuple):
    """A text in a vocabulary, in two parts."""

    train: Tokens
    held_out: Tokens
    vocabulary: Vocabulary
    digest: str  # of the text


class Part:
    """Two files that grow by documents."""

    def __init__(self, ids: IO[bytes], ends: IO[bytes], dtype: str) -> None:
        self.ids, self.ends, self.dtype = ids, ends, dtype
        self.tokens = self.documents = 0
        self.hash = hashlib.sha256()

    def add(self, ids: np.ndarray) -> None:
        """Append one document."""
        self.tokens += ids.size
        self.documents += 1
        for file, content in ((self.ids, ids.astype(self.dtype).tobytes()), (self.ends, np.int64(self.tokens).tobytes())):
            file.write(content)
            self.hash.update(content)

    def finish(self) -> Tokens:
        """Return the files as mapped arrays; a mapping outlives the file's name."""
        arrays = []
        for file, dtype in ((self.ids, self.dtype), (self.ends, "<i8")):
            file.flush()
            arrays.append(np.memmap(file, dtype, "r") if file.tell() else np.empty(0, dtype))
        return Tokens(arrays[0], arrays[1], self.hash.hexdigest()[:12])


def is_held_out(name: str, share: float) -> bool:
    """Return whether a document is held out: a hash of its name, as a fraction, is below the share."""
    fraction = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[: HASH_BITS // 8], "big")
    return fraction < int(share * 2**HASH_BITS)


def cleaned(documents: Iterable[Document], config: DataConfig) -> Iterator[Document]:
    """Yield the documents as the configuration wants them: cleaned, without what stood before in either part, without empty ones."""
    if config.clean:
        documents = (document._replace(text=clean_page(document.text)) for document in documents)
    if config.deduplicate:
        documents = without_duplicates(documents)
    yield from (document for document in documents if document.text)


def named_files(config: DataConfig) -> list[tuple[bool, Source]]:
    """Return the files, each with whether it is held out as a whole."""
    files = [(False, source) for source in find_sources(config.sources)]
    if config.held_out_sources:
        files += [(True, source) for source in find_sources(config.held_out_sources)]
        if len({source.path.resolve() for _, source in files}) < len(files):
            raise InputError("data.held_out_sources: names a file that data.sources names too")
    return files


def read_documents(config: DataConfig, files: list[tuple[bool, Source]], progress: Progress) -> Iterator[Document]:
    """Yield every file's documents, each in its part."""
    sizes = [source.path.stat().st_size for _, source in files]
    done = said = 0
    for (named, source), size in zip(files, sizes, strict=True):
        inside = 0  # characters of the file so far: about its bytes, and more than those where it is compressed
        for document in documents_of(source, config.field, config.documents):
            yield document._replace(held_out=named or is_held_out(document.name, config.held_out))
            inside += len(document.text)
            if done + min(inside, size) >= said + PROGRESS_EVERY:
                said = done + min(inside, size)
                progress(said, sum(sizes))
        done += size
    progress(done, done)


def build(config: DataConfig, files: list[tuple[bool, Source]], vocabulary: Vocabulary, parts: list[Part], progress: Progress) -> str:
    """Read every document into its part and return the text's digest."""
    whole = hashlib.sha256()
    for name, text, held_out in cleaned(read_documents(config, files, progress), config):
        content = text.encode("utf-8")
        whole.update(f"{name}\0{held_out:d}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
        if (ids := vocabulary.encode(text)).size:
            parts[held_out].add(ids)
    return whole.hexdigest()[:12]


def no_progress(done: int, total: int) -> None:
    """Say nothing."""


def fingerprint_of(config: DataConfig, files: list[tuple[bool, Source]], vocabulary: Vocabulary) -> str:
    """Return what the tokens depend on, short: the rules, the vocabulary, and of each file its name, size and time."""
    stamps = [(fixed, source.name, source.path.stat().st_size, source.path.stat().st_mtime_ns) for fixed, source in files]
    rules = [getattr(config, name) for name in TEXT_FIELDS]
    return digest_of(json.dumps([VERSION, rules, vocabulary.digest, stamps]).encode())


def read_cache(folder: Path, vocabulary: Vocabulary, dtype: str) -> Corpus | None:
    """Return the corpus of a folder, or None where it is not there or not whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts = []
        for name in PARTS:
            tokens, documents, digest = record[name]
            ids, ends = folder / f"{name}.ids", folder / f"{name}.ends"
            if (ids.stat().st_size, ends.stat().st_size) != (tokens * np.dtype(dtype).itemsize, documents * 8):
                return None
            arrays = [np.memmap(file, kind, "r") if tokens else np.empty(0, kind) for file, kind in ((ids, dtype), (ends, "<i8"))]
            parts.append(Tokens(arrays[0], arrays[1], digest))
        return Corpus(parts[0], parts[1], vocabulary, record["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Let `fill` write beside the folder, then move it there: complete or absent, and where another rank was first, its copy stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        record = fill(beside)
        (beside / RECORD).write_text(json.dumps(record), encoding="utf-8")
        if folder.exists() and not (folder / RECORD).exists():
            shutil.rmtree(folder)
        try:
            os.rename(beside, folder)
        except OSError:
            if not (folder / RECORD).exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def filled(
    config: DataConfig, files: list[tuple[bool, Source]], vocabulary: Vocabulary, dtype: str, folder: Path | None, progress: Progress
) -> Corpus:
    """Read the text into files of a folder, or into files without a name that end with the process."""

    def new(name: str) -> IO[bytes]:
        return open(folder / name, "w+b") if folder else tempfile.TemporaryFile()

    opened = [(new(f"{name}.ids"), new(f"{name}.ends")) for name in PARTS]
    try:
        parts = [Part(ids, ends, dtype) for ids, ends in opened]
        digest = build(config, files, vocabulary, parts, progress)
        return Corpus(parts[0].finish(), parts[1].finish(), vocabulary, digest)
    finally:
        for pair in opened:
            for file in pair:
                file.close()


def open_corpus(config: DataConfig, cache: Path | None = None, progress: Progress = no_progress) -> Corpus:
    """Return the corpus that a configuration describes, tokenized.

    Parameters
    ----------
    config : DataConfig
        Which text, which vocabulary.
    cache : Path
        Folder under which the tokens are kept for the next time; None: in files that end with the process.
    progress : callable
        Called with the bytes that are read and those there are, at each MiB and at the end.

    Returns
    -------
    Corpus
        Two parts, the vocabulary, the text's digest.

    Raises
    ------
    InputError
        Where a source is missing, empty, damaged or not UTF-8, a vocabulary cannot be read, or a part that is asked for has no document.
    """
    vocabulary = open_vocabulary(config.vocabulary, config.sentinels)
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    files = named_files(config)
    try:
        if cache is None:
            corpus = filled(config, files, vocabulary, dtype, None, progress)
        else:
            corpus = cached(config, files, vocabulary, dtype, cache, progress)
    except OSError as error:
        raise InputError(f"data: {error.filename or cache or tempfile.gettempdir()}: {error.strerror or error}") from None
    if not corpus.train.end_I.size:
        raise InputError("data: the corpus has no document to train on" + (" that the rules of data.clean keep" if config.clean else ": it is empty"))
    if (config.held_out or config.held_out_sources) and not corpus.held_out.end_I.size:
        count = corpus.train.end_I.size
        raise InputError(
            f"data.held_out: none of {count} document{'s' * (count > 1)} fell to the held-out part; "
            "name some by data.held_out_sources, or make more documents by data.documents=paragraph"
        )
    return corpus


def cached(config: DataConfig, files: list[tuple[bool, Source]], vocabulary: Vocabulary, dtype: str, cache: Path, progress: Progress) -> Corpus:
    """Return the corpus from its folder, which is made where it is not there."""
    folder = Path(cache) / fingerprint_of(config, files, vocabulary)
    if (found := read_cache(folder, vocabulary, dtype)) is not None:
        return found
    if folder.exists():
        shutil.rmtree(folder)  # damaged: what it was made of is still there

    def fill(beside: Path) -> dict[str, Any]:
        corpus = filled(config, files, vocabulary, dtype, beside, progress)
        sizes = {name: (part.ids_N.size, part.end_I.size, part.digest) for name, part in zip(PARTS, (corpus.train, corpus.held_out), strict=True)}
        return {"digest": corpus.digest, **sizes, "config": dataclasses.asdict(config)}

    write_cache(folder, fill)
    found = read_cache(folder, vocabulary, dtype)
    if found is None:
        raise InputError(f"data: {folder}: was written and cannot be read")
    return found
