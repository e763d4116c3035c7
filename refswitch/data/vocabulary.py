# May import: standard library, numpy, tokenizers, sentencepiece, refswitch.errors.
"""From text to numbers and back: bytes, or what a tokenizer's file says.

The byte vocabulary is ByT5's: pad 0, end-of-sequence 1, unknown 2, byte b is b + 3, and 125 sentinels fill the 384 ids. Sentinel i is the i-th from
the top, as in T5. A tokenizer's file is somebody else's: what it does wrong is an `InputError`, and every id that it returns is checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refswitch.errors import InputError

PAD, EOS, UNK, FIRST_BYTE = 0, 1, 2, 3
BYTE_SENTINELS = 125  # 3 + 256 + 125 = 384, a multiple of 128
SENTINELS = 100  # T5's
NAMES_OF = {"pad": ("<pad>", "[PAD]", "<|padding|>"), "eos": ("</s>", "<|endoftext|>", "<eos>", "[SEP]"), "unk": ("<unk>", "[UNK]")}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary. `encode` returns int32 ids without an end-of-sequence; `decode` leaves out padding and end, and spells sentinels <extra_id_i>."""

    name: str
    size: int  # ids are below it; a model's vocabulary may be larger
    pad: int
    eos: int
    unk: int
    sentinels: np.ndarray  # id of sentinel i
    digest: str  # twelve hexadecimal digits of what it computes
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Any], str]


def digest_of(*parts: bytes) -> str:
    """Return twelve hexadecimal digits of the parts, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:12]


def runs(ids: np.ndarray, special: dict[int, str], plain: Callable[[list[int]], str]) -> str:
    """Return the text of ids: runs of ordinary ones by `plain`, special ones by their spelling."""
    text = ""
    held: list[int] = []
    for number in np.asarray(ids).reshape(-1).tolist():
        if number in special:
            text += (plain(held) if held else "") + special[number]
            held = []
        else:
            held.append(number)
    return text + (plain(held) if held else "")


def spellings(sentinels: np.ndarray, pad: int, eos: int) -> dict[int, str]:
    """Return how special ids are spelled."""
    return {pad: "", eos: ""} | {int(number): f"<extra_id_{i}>" for i, number in enumerate(sentinels)}


def byte_vocabulary(sentinels: int = 0) -> Vocabulary:
    """Return ByT5's vocabulary, with 125 sentinels where 0 are asked for."""
    size = FIRST_BYTE + 256 + (sentinels or BYTE_SENTINELS)
    ids = np.arange(size - 1, FIRST_BYTE + 255, -1)
    special = spellings(ids, PAD, EOS) | {UNK: "\ufffd"}

    def encode(text: str) -> np.ndarray:
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        ids += FIRST_BYTE
        return ids

    def decode(numbers: Any) -> str:
        return runs(numbers, special, lambda held: bytes(number - FIRST_BYTE for number in held if number < size).decode("utf-8", "replace"))

    return Vocabulary("bytes", size, PAD, EOS, UNK, ids, digest_of(b"bytes", str(size).encode()), encode, decode)


def checked_ids(numbers: list[int], size: int, where: str) -> np.ndarray:
    """Return a foreign tokenizer's ids, all of them in its vocabulary."""
    ids = np.array(numbers, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise InputError(f"{where}: gives the id {ids.max() if ids.max() >= size else ids.min()}, and has {size}")
    return ids.astype(np.int32)


def guarded(where: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a foreign library returns; whatever it raises becomes one line.

    A Rust panic is no `Exception`, yet no reason to die with a traceback.
    """
    try:
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit, MemoryError, InputError):
        raise
    except BaseException as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: is no tokenizer that can be read: {reason}") from None


def hugging_face_vocabulary(path: Path, content: bytes, sentinels: int) -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json`, read by the library tokenizers.

    Its own <extra_id_i> are the sentinels where it has them; else they, and a padding or end-of-sequence that it lacks, get ids above its own.
    """
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{path}: reading it needs the package tokenizers: pip install 'refswitch[text]'") from None
    tokenizer = guarded(str(path), tokenizers.Tokenizer.from_str, content.decode("utf-8", "replace"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that says </s> does not end there
    known: dict[str, int] = guarded(str(path), lambda: tokenizer.get_vocab(with_added_tokens=True))
    if not known:
        raise InputError(f"{path}: has no tokens")
    size = own_size = max(known.values()) + 1
    special: dict[str, int] = {}
    for role, names in NAMES_OF.items():
        special[role] = next((known[name] for name in names if name in known), -1)
        if special[role] < 0 and role != "unk":
            special[role], size = size, size + 1
    numbered = {int(match[1]): number for name, number in known.items() if (match := re.fullmatch(r"<extra_id_(\d{1,6})>", name))}
    if numbered and sorted(numbered) != list(range(len(numbered))):
        raise InputError(f"{path}: has {len(numbered)} sentinels <extra_id_i>, not numbered from 0")
    if numbered:
        ids = np.array([numbered[i] for i in range(len(numbered))])
    else:
        size += sentinels or SENTINELS
        ids = np.arange(size - 1, size - 1 - (sentinels or SENTINELS), -1)
    spelled = spellings(ids, special["pad"], special["eos"])
    reserved = np.array([special["pad"], special["eos"], *ids])

    def encode(text: str) -> np.ndarray:
        encoded = guarded(str(path), lambda: tokenizer.encode(text, add_special_tokens=False))
        found = checked_ids(encoded.ids, own_size, str(path))
        return found[~np.isin(found, reserved)]  # tokens that a file adds without calling them special are found in texts

    def decode(numbers: Any) -> str:
        return runs(numbers, spelled, lambda held: guarded(str(path), tokenizer.decode, [number for number in held if number < own_size]))

    unk = special["unk"] if special["unk"] >= 0 else special["pad"]
    return Vocabulary(path.name, size, special["pad"], special["eos"], unk, ids, digest_of(content, str(size).encode()), encode, decode)


def sentencepiece_vocabulary(path: Path, content: bytes, sentinels: int) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model with sentinels above its pieces, as T5 has them; below those, a padding that it lacks."""
    try:
        import sentencepiece
    except ImportError:
        raise InputError(f"{path}: reading it needs the package sentencepiece: pip install 'refswitch[text]'") from None
    processor = sentencepiece.SentencePieceProcessor()
    guarded(str(path), lambda: processor.LoadFromSerializedProto(content))
    size = own_size = int(processor.get_piece_size())
    pad, eos, unk = processor.pad_id(), processor.eos_id(), processor.unk_id()
    if eos < 0:
        raise InputError(f"{path}: has no end-of-sequence piece")
    if pad < 0:
        pad, size = size, size + 1
    size += sentinels or SENTINELS
    ids = np.arange(size - 1, size - 1 - (sentinels or SENTINELS), -1)
    spelled = spellings(ids, pad, eos)

    def encode(text: str) -> np.ndarray:
        return checked_ids(guarded(str(path), lambda: processor.encode(text)), own_size, str(path))

    def decode(numbers: Any) -> str:
        return runs(numbers, spelled, lambda held: guarded(str(path), processor.decode, [number for number in held if number < own_size]))

    return Vocabulary(path.name, size, pad, eos, unk, ids, digest_of(content, str(size).encode()), encode, decode)


def open_vocabulary(name: str, sentinels: int = 0) -> Vocabulary:
    """Return a vocabulary by name.

    Parameters
    ----------
    name : str
        "bytes", or a tokenizer's file: JSON is read as Hugging Face's, anything else as SentencePiece's.
    sentinels : int
        How many; 0 for the usual number. A file that brings its own keeps those.

    Returns
    -------
    Vocabulary
        The vocabulary.

    Raises
    ------
    InputError
        Where the file cannot be read, is broken, or the package that reads it is missing.
    """
    if name == "bytes":
        return byte_vocabulary(sentinels)
    path = Path(name).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data.vocabulary: {name}: {error.strerror}; say bytes, or the file of a tokenizer") from None
    reader = hugging_face_vocabulary if content.lstrip()[:1] == b"{" else sentencepiece_vocabulary
    return reader(path, content, sentinels)
