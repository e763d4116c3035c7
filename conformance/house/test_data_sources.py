# May import: standard library, numpy, pytest, zstandard, refswitch.
"""From files to a corpus: every format, every mistake in one line, the default corpus, cleaning, duplicates, the cache, bounded memory."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from refswitch.data import PYTHON_TEXT, DataConfig, cleaning, corpus, open_corpus, sources
from refswitch.data.cleaning import Seen, clean_page, sentences_of, without_duplicates
from refswitch.data.sources import Document, documents_of, find_sources
from refswitch.errors import InputError

TEXT = "Ærø is an island.\nA second line, of bytes and letters.\n\nA paragraph of its own.\n"


def config(*where: Path | str, **changes: object) -> DataConfig:
    """Return a configuration of some sources, nothing held out."""
    return dataclasses.replace(PYTHON_TEXT, sources=tuple(map(str, where)), **{"held_out": 0.0, **changes})


def texts(path: Path, field: str = "text", unit: str = "file") -> list[str]:
    """Return the texts of a file's documents."""
    return [document.text for document in documents_of(find_sources((str(path),))[0], field, unit)]  # type: ignore[arg-type]


def packed(content: bytes, suffix: str) -> bytes:
    """Return a content as a file with a suffix holds it; zstd in two frames, as parallel compressors write it."""
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        half = len(content) // 2
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents__of_each_format(tmp_path: Path, suffix: str) -> None:
    """A whole file, its lines, its paragraphs, JSON lines; compressed or not, with carriage returns and a byte order mark."""
    plain, rows = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    plain.write_bytes(packed(b"\xef\xbb\xbf" + TEXT.encode(), suffix))
    assert texts(plain) == [TEXT]
    assert texts(plain, unit="line") == [line for line in TEXT.split("\n") if line]
    assert texts(plain, unit="paragraph") == TEXT.split("\n\n")
    plain.write_bytes(packed(TEXT.replace("\n", "\r\n").encode(), suffix))
    assert texts(plain, unit="line") == [line for line in TEXT.split("\n") if line]
    assert [part.replace("\r\n", "\n") for part in texts(plain, unit="paragraph")] == TEXT.split("\n\n")
    rows.write_bytes(packed("".join(json.dumps({"id": i, "body": f"{i} {TEXT}"}) + "\n\n" for i in range(3)).encode(), suffix))
    assert texts(rows, field="body") == [f"{i} {TEXT}" for i in range(3)]


def test_documents__long_ones_are_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, no piece is longer than allowed, and a cut falls behind a line's end where there is one."""
    monkeypatch.setattr(sources, "LONGEST", 50)
    monkeypatch.setattr(sources, "BLOCK", 7)  # letters of two bytes fall across blocks
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 20 + "æ" * 120, encoding="utf-8")
    found = texts(path)
    assert "".join(found) == TEXT * 20 + "æ" * 120
    assert max(map(len, found)) <= 50
    assert all(piece.endswith("\n") for piece in found if "æ" * 10 not in piece)


def test_sources__are_found_in_order_wherever_they_lie(tmp_path: Path) -> None:
    """Files, folders, globs; hidden ones left out, each once, the same names and digest after a move."""
    names = ["b/z.txt", "b/a.txt", "c.md", "b/.hidden/x.txt", ".git"]
    digests = []
    for root in (tmp_path / "one", tmp_path / "two"):
        for name in names if root.name == "one" else reversed(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"text of {name}")
        assert [source.name for source in find_sources((str(root),))] == ["b/a.txt", "b/z.txt", "c.md"]
        assert [source.name for source in find_sources((str(root / "**" / "*.txt"),))] == ["b/a.txt", "b/z.txt"]
        assert [source.name for source in find_sources((str(root / "c.md"), str(root)))] == ["c.md", "b/a.txt", "b/z.txt"]
        digests.append(open_corpus(config(root)).digest)
    assert digests[0] == digests[1]
    (tmp_path / "two/c.md").write_text("another text")
    assert open_corpus(config(tmp_path / "two")).digest != digests[0]


def broken(name: str, content: bytes) -> Callable[[Path], Path]:
    """Return what writes a broken file."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


LONG = gzip.compress(os.urandom(5000).hex().encode())
ZSTD = zstandard.ZstdCompressor().compress(os.urandom(5000).hex().encode())
MISTAKES = {
    "latin1": (broken("a.txt", b"fine \xe6 not"), "byte 5 is not UTF-8"),
    "latin1_far": (broken("a.txt", b"x" * ((1 << 20) - 1) + "æ".encode() + b"\xff"), f"byte {(1 << 20) + 1} is not UTF-8"),
    "cut_letter": (broken("a.txt", b"caf\xc3"), "byte 3 is not UTF-8"),
    "surrogate": (broken("a.txt", b"ab\xed\xa0\x80"), "byte 2 is not UTF-8"),
    "missing": (lambda folder: folder / "none.txt", "no such file"),
    "no_match": (lambda folder: folder / "*.txt", "matches no file"),
    "empty_folder": (lambda folder: folder, "holds no file"),
    "empty": (broken("a.txt", b""), "it is empty"),
    "blank": (broken("a.txt", b" \n\n\t"), "it is empty"),
    "gzip_cut": (broken("a.gz", LONG[:2000]), "is cut short"),
    "gzip_none": (broken("a.gz", b"plain text, no gzip"), "is no gzip file"),
    "gzip_damaged": (broken("a.gz", LONG[:30] + b"\0\0\0\0" + LONG[34:]), "gzip"),
    "zstd_cut": (broken("a.zst", ZSTD[:2000]), "is cut short"),
    "zstd_none": (broken("a.zst", b"plain text, no zstd"), "is no zstd file"),
    "json_none": (broken("a.jsonl", b'{"text": "a"}\nno json\n'), "line 2: is not JSON"),
    "json_list": (broken("a.jsonl", b"[1]\n"), "line 1: should be a JSON object"),
    "json_field": (broken("a.jsonl", b'{"body": "a"}\n'), "line 1: has no text 'text'; it has body"),
    "json_number": (broken("a.jsonl", b'{"text": 3}\n'), "line 1: has no text 'text'"),
    "json_deep": (broken("a.jsonl", b"[" * 100_000 + b"\n"), "line 1: is not JSON"),
    "json_surrogate": (broken("a.jsonl", b'{"text": "\\ud800"}\n'), "half of a surrogate pair"),
    "json_line": (broken("a.jsonl", b'{"text": "' + b"x" * (1 << 26)), "line 1: is longer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_corpus__refuses_in_one_line(name: str, tmp_path: Path) -> None:
    """Each mistake is an `InputError` of one line that says what and where."""
    write, message = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        open_corpus(config(write(tmp_path)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_corpus__a_held_out_part_that_is_asked_for_is_there(tmp_path: Path) -> None:
    """One document cannot be split; named files can be held out; a file cannot be both."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    with pytest.raises(InputError, match="held-out"):
        open_corpus(config(tmp_path / "a.txt", held_out=0.01))
    found = open_corpus(config(tmp_path / "a.txt", held_out_sources=(str(tmp_path / "b.txt"),)))
    assert found.vocabulary.decode(found.held_out.ids_N) == "text of b.txt"
    with pytest.raises(InputError, match="too"):
        open_corpus(config(tmp_path, held_out_sources=(str(tmp_path / "b.txt"),)))


def test_corpus__is_split_by_a_hash_of_names(tmp_path: Path) -> None:
    """By SHA-256 of the name, so that a document stays in its part when others come and go; both parts together are the whole."""
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>")
    found = open_corpus(config(tmp_path, held_out=0.25))
    held_out = {name for name in map(str, range(200)) if hashlib.sha256(f"{name}.txt".encode()).digest()[0] < 64}
    assert set(found.vocabulary.decode(found.held_out.ids_N).strip("<>").split("><")) == held_out
    assert set(found.vocabulary.decode(found.train.ids_N).strip("<>").split("><")) == set(map(str, range(200))) - held_out
    (tmp_path / "17.txt").unlink()
    again = open_corpus(config(tmp_path, held_out=0.25))
    assert set(again.vocabulary.decode(again.held_out.ids_N).strip("<>").split("><")) == held_out - {"17"}


def test_python_text__needs_no_download_and_no_package() -> None:
    """Source text of the standard library, sorted, nothing that was installed, both parts filled."""
    found = find_sources(())
    names = [source.name for source in found]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or name.startswith("test/")]
    root = Path(sysconfig.get_path("stdlib"))
    assert all(source.path == root / source.name for source in found)
    whole = open_corpus(PYTHON_TEXT)
    assert len(whole.held_out.end_I) > 0
    assert len(whole.train.end_I) + len(whole.held_out.end_I) == sum(bool(source.path.read_text(encoding="utf-8").strip()) for source in found)
    assert open_corpus(PYTHON_TEXT).digest == whole.digest


def test_cache__is_whole_or_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time no text is read; a cut file, a changed text or rule is noticed."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(f"Number {i}.")
    made = config(tmp_path / "text", held_out=0.2)
    first = open_corpus(made, tmp_path / "cache")

    def same(one: corpus.Corpus, other: corpus.Corpus) -> bool:
        parts = zip((one.train, one.held_out), (other.train, other.held_out), strict=True)
        return one.digest == other.digest and all(np.array_equal(a.ids_N, b.ids_N) and np.array_equal(a.end_I, b.end_I) for a, b in parts)

    reads: list[str] = []
    true = corpus.documents_of
    monkeypatch.setattr(corpus, "documents_of", lambda source, field, unit: reads.append(source.name) or true(source, field, unit))
    assert same(open_corpus(made, tmp_path / "cache"), first)
    assert reads == []
    (folder,) = (tmp_path / "cache").iterdir()
    ids = folder / "train.ids"
    ids.write_bytes(ids.read_bytes()[:-2])
    assert same(open_corpus(made, tmp_path / "cache"), open_corpus(made))
    (folder / "corpus.json").write_text("{")
    assert same(open_corpus(made, tmp_path / "cache"), open_corpus(made))
    (tmp_path / "text/3.txt").write_text("Another number.")
    assert open_corpus(made, tmp_path / "cache").digest != first.digest
    assert open_corpus(dataclasses.replace(made, documents="line"), tmp_path / "cache").vocabulary.size == 384
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")], "nothing half made is left"


def test_corpus__says_how_far_it_is(tmp_path: Path) -> None:
    """Inside one large file too, never backwards, never more than there is, and at last all of it."""
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(packed(b'{"text": "%s"}\n' % (b"x" * 2**16) * 50, Path(name).suffix))
    said: list[tuple[int, int]] = []
    open_corpus(config(tmp_path), progress=lambda done, total: said.append((done, total)))
    assert len(said) >= 4
    assert said == sorted(said)
    assert said[-1] == (said[0][1],) * 2


def test_cache__a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="cache"):
        open_corpus(config(tmp_path / "a.txt"), tmp_path / "cache")


def test_corpus__memory_does_not_grow_with_it(tmp_path: Path) -> None:
    """A corpus of 300 MiB, compressed, is read, split into batches and cached under a limit that does not hold it."""
    line = ("The quick brown fox jumps over the lazy dog; number {}.\n" * 400).encode()
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for i in range(300 * 2**20 // len(line)):
            file.write(line.replace(b"{}", str(i).encode()))
    program = f"""
import dataclasses, resource
from refswitch.data import PYTHON_TEXT, open_corpus, open_stream
import resource
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()  # data and stack
resource.setrlimit(resource.RLIMIT_DATA, (used + 200 * 2**20,) * 2)
config = dataclasses.replace(PYTHON_TEXT, sources=({str(tmp_path / "a.txt.gz")!r},), held_out=0.0)
corpus = open_corpus(config, __import__("pathlib").Path({str(tmp_path / "cache")!r}))
batch = open_stream(corpus, corpus.train, config, 1).batch(1000)
print(corpus.train.ids_N.size, batch.encoder_valid_BM.mean())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 290 * 2**20
    shutil.rmtree(tmp_path / "cache")


GOOD = "This is a line with enough words. And a second one, too! Is this a third sentence?"
PAGES = {
    GOOD: GOOD,
    "Home\nAbout us\n" + GOOD + "\nread more ...": GOOD,
    GOOD + "\nToo few words.": GOOD,
    GOOD + "\nPlease enable JavaScript to view this page.": GOOD,
    GOOD + "\nBy going on you accept our privacy policy, of course.": GOOD,
    GOOD + "\nThis line goes on and on and on...": GOOD,
    GOOD + "\n" + "x" * 1001 + " is a very long word here.": GOOD,
    "The isle[12] is in the sea.[edit] It is small. It is also green and flat.": "The isle is in the sea. It is small. It is also green and flat.",
    GOOD + "\nLorem ipsum dolor sit amet, said the designer.": "",
    GOOD + "\nfunction f() { return the answer to everything; } was the program.": "",
    "Only one sentence stands on this page.": "",
}


@pytest.mark.parametrize("page", PAGES, ids=range(len(PAGES)))
def test_clean_page__keeps_what_c4_keeps(page: str) -> None:
    """Each rule of T5's program, one page each; the expected text is written by hand."""
    assert clean_page(page) == PAGES[page]


def test_sentences__are_the_whole_text() -> None:
    """Cut behind a mark and its closing quotes, and nothing lost."""
    text = 'One. "Two!" Three? Four.5 is a number.\nFive'
    assert [text[a:b] for a, b in sentences_of(text)] == ["One. ", '"Two!" ', "Three? ", "Four.5 is a number.\n", "Five"]


def test_duplicates__spans_of_three_sentences_are_kept_once() -> None:
    """Across documents, inside one, whatever the case and space; two equal sentences between others are no duplicate."""
    a, b, c, d, e = (f"Sentence {name} stands here. " for name in "abcde")
    found = list(
        without_duplicates(
            Document(str(i), text)
            for i, text in enumerate((a + b + c + d, e + a + b + c, a + b + e, a.upper() + " " + b + c + d, d + e + a + d + e + a))
        )
    )
    assert [document.text for document in found] == [a + b + c + d, e, a + b + e, "", d + e + a]


def test_seen__finds_old_and_recent_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that were moved into the sorted array, and no others."""
    monkeypatch.setattr("refswitch.data.cleaning.RECENT", 4)
    seen = Seen()
    for number in (2**64 - 1, 0, 5, 2**63, 2**53 + 1, 9):
        seen.add(number)
    assert all(number in seen for number in (2**64 - 1, 0, 5, 2**63, 2**53 + 1, 9))
    assert not any(number in seen for number in (2**64 - 2, 1, 2**53, 2**63 + 1))
    assert len(seen.older) == 4


def test_corpus__cleaned_and_deduplicated(tmp_path: Path) -> None:
    """Both rules on the way into a corpus; a text that loses everything is said to."""
    (tmp_path / "a.txt").write_text("Menu\n" + GOOD)
    (tmp_path / "b.txt").write_text(GOOD + "\nBye")
    found = open_corpus(config(tmp_path, clean=True, deduplicate=True))
    assert found.vocabulary.decode(found.train.ids_N) == GOOD
    assert len(found.train.end_I) == 1
    (tmp_path / "c.txt").write_text("Menu")
    with pytest.raises(InputError, match=r"data\.clean"):
        open_corpus(config(tmp_path / "c.txt", clean=True))


def first_frame(path: Path) -> list[bytes]:
    """A zstd file ends with its first frame."""
    return [zstandard.ZstdDecompressor().decompress(path.read_bytes())] if path.suffix == ".zst" else [path.read_bytes()]


PLANTED = {
    "position": (sources, "not_utf8", lambda path, position: InputError(f"byte {position + 1} is not UTF-8"), "latin1_far"),
    "by_length": (corpus, "is_held_out", lambda name, share: len(name) * share < 1.5, test_corpus__is_split_by_a_hash_of_names),
    "two_sentences": (cleaning, "SPAN", 2, test_duplicates__spans_of_three_sentences_are_kept_once),
    "case": (cleaning, "span_hash", lambda sentences: hash("".join(sentences)), test_duplicates__spans_of_three_sentences_are_kept_once),
    "four_words": (cleaning, "LEAST_WORDS", 3, GOOD + "\nToo few words."),
    "one_sentence": (cleaning, "LEAST_SENTENCES", 1, "Only one sentence stands on this page."),
    "ellipsis": (cleaning, "ELLIPSIS", "....", GOOD + "\nThis line goes on and on and on..."),
    "first_frame": (sources, "byte_blocks", first_frame, ".zst"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_sources__a_planted_mistake_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the test that is there for it."""
    module, where, wrong, check = PLANTED[name]

    def run(folder: Path) -> None:
        folder.mkdir()
        if check in PAGES:
            test_clean_page__keeps_what_c4_keeps(check)
        elif check in MISTAKES:
            test_corpus__refuses_in_one_line(check, folder)
        elif check == ".zst":
            test_documents__of_each_format(folder, check)
        elif check is test_corpus__is_split_by_a_hash_of_names:
            check(folder)
        else:
            check()

    run(tmp_path / "true")
    monkeypatch.setattr(module, where, wrong)
    with pytest.raises((AssertionError, InputError)):
        run(tmp_path / "planted")
