# May import: standard library, numpy, pytest, hypothesis, tokenizers, sentencepiece, refswitch.
"""Vocabularies: bytes as in ByT5, tokenizers of Hugging Face and SentencePiece, and files that are broken or lie."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from refswitch.data import Vocabulary, open_vocabulary
from refswitch.errors import InputError
from refswitch.model_config import preset

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a corpus of words", "words and more words of the dog", "quick foxes, lazy dogs"] * 20


def hugging_face(path: Path, special: list[str]) -> Path:
    """Train and write a small byte-pair tokenizer that adds an end on its own and cuts at 3 tokens: both must be switched off."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.train_from_iterator(SENTENCES, tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", *special]))
    if "</s>" in special:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))])
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(path))
    return path


def sentencepiece_model(path: Path, **options: int) -> Path:
    """Train and write a small unigram model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=36, minloglevel=2, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "plain": hugging_face(root / "plain.json", []),
        "t5": hugging_face(root / "t5.json", ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(9, -1, -1))]),
        "t5_model": sentencepiece_model(root / "t5.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        "default_model": sentencepiece_model(root / "default.model"),
    }


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes__are_those_of_byt5(text: str) -> None:
    """Byte b is b + 3, and every text comes back."""
    vocabulary = open_vocabulary("bytes")
    assert vocabulary.encode(text).tolist() == [byte + 3 for byte in text.encode()]
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_bytes__ids_and_sentinels() -> None:
    """The preset's 384 ids: 3 special, 256 bytes, 125 sentinels from the top; bytes that are no UTF-8 do not stop a text."""
    vocabulary = open_vocabulary("bytes")
    assert (vocabulary.pad, vocabulary.eos, vocabulary.unk, vocabulary.size) == (0, 1, 2, preset("byte_tiny").vocabulary)
    assert vocabulary.sentinels.tolist() == list(range(383, 258, -1))
    assert vocabulary.decode([383, 72 + 3, 382, 1, 0, 0]) == "<extra_id_0>H<extra_id_1>"
    assert vocabulary.decode([255 + 3, 2, 65 + 3]) == "\ufffd\ufffdA"
    assert vocabulary.decode([10_000, 65 + 3]) == "A"  # an id that the model has and the vocabulary not
    assert open_vocabulary("bytes", 2).sentinels.tolist() == [260, 259]
    assert open_vocabulary("bytes", 2).digest != vocabulary.digest


@pytest.mark.parametrize("name", ["plain", "t5", "t5_model", "default_model"])
def test_tokenizers__add_nothing_and_cut_nothing(files: dict[str, Path], name: str) -> None:
    """Only the text's own ids, whole; they come back as the text; special ids and sentinels are different, below size, none of the text's."""
    vocabulary = open_vocabulary(str(files[name]))
    text = "the lazy fox and the quick dogs of the corpus"
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids).strip() == text
    special = [vocabulary.pad, vocabulary.eos, *vocabulary.sentinels.tolist()]
    assert len(set(special)) == len(special)
    assert not set(special) & set(ids.tolist())
    assert 0 <= min(special) <= max(special) < vocabulary.size
    assert vocabulary.decode([*ids, vocabulary.eos, vocabulary.pad, vocabulary.sentinels[1]]).strip() == text + "<extra_id_1>"


def test_tokenizers__sentinels_are_from_the_top(files: dict[str, Path]) -> None:
    """T5's: <extra_id_0> is the last id. A file that has them keeps them, whatever is asked for; else they are added."""
    t5 = open_vocabulary(str(files["t5"]), 50)
    assert t5.sentinels.tolist() == [tokenizers.Tokenizer.from_file(str(files["t5"])).token_to_id(f"<extra_id_{i}>") for i in range(10)]
    plain, own = open_vocabulary(str(files["plain"])), tokenizers.Tokenizer.from_file(str(files["plain"])).get_vocab_size()
    assert plain.size == own + 2 + 100
    assert plain.sentinels.tolist() == list(range(plain.size - 1, own + 1, -1))
    model = open_vocabulary(str(files["t5_model"]))
    assert (model.pad, model.eos, model.unk, model.size) == (0, 1, 2, 36 + 100)
    assert model.sentinels[0] == 135
    assert open_vocabulary(str(files["default_model"])).pad == 36  # that file has no padding


def test_tokenizers__a_text_cannot_spell_what_is_reserved(files: dict[str, Path], tmp_path: Path) -> None:
    """A page about T5 has no sentinels in it, nor an end in its middle, also where the file does not call them special."""

    def plain(content: dict) -> None:
        for token in content["added_tokens"]:
            token["special"] = False

    for path in (str(files["t5"]), edited(files["t5"], tmp_path / "plain.json", plain)):
        vocabulary = open_vocabulary(path)
        ids = vocabulary.encode("the </s> fox <extra_id_0> and <pad> dog")
        assert ids.size
        assert not set(ids.tolist()) & {vocabulary.pad, vocabulary.eos, *vocabulary.sentinels.tolist()}


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with some bytes changed, cut out or repeated."""
    kind, at = rng.integers(3), int(rng.integers(len(content)))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.bytes(int(rng.integers(1, 30))) + content[at + 5 :]
    return content[:at] + content[at // 2 : at // 2 + 200] + content[at:]


@pytest.mark.parametrize("name", ["t5", "t5_model"])
def test_tokenizers__a_damaged_file_is_refused_in_one_line_or_works(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    """200 damaged copies: nothing but an `InputError` comes out, or a vocabulary whose ids are below its size."""
    content, rng = files[name].read_bytes(), np.random.default_rng(5)
    refused: list[str] = []
    for _ in range(200):
        path = tmp_path / files[name].name
        path.write_bytes(mutated(content, rng))
        try:
            vocabulary = open_vocabulary(str(path))
            ids = vocabulary.encode("the lazy fox \u00e6\x00")
            vocabulary.decode(ids)
        except InputError as error:
            refused.append(str(error))
        else:
            assert not ids.size or ids.max() < vocabulary.size
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)


def edited(path: Path, to: Path, change: object) -> str:
    """Write a copy of a tokenizer's file with its content changed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)  # type: ignore[operator]
    to.write_text(json.dumps(content), encoding="utf-8")
    return str(to)


def test_tokenizers__wrong_files_say_why(files: dict[str, Path], tmp_path: Path) -> None:
    """Missing, empty, another kind of JSON, sentinels with a gap, a model without an end."""
    with pytest.raises(InputError, match="say bytes"):
        open_vocabulary(str(tmp_path / "none.json"))
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(InputError, match="is no tokenizer"):
        open_vocabulary(str(tmp_path / "empty.model"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is no tokenizer"):
        open_vocabulary(str(tmp_path / "other.json"))

    def drop_one(content: dict) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<extra_id_4>"]
        content["model"]["vocab"]["<extra_id_14>"] = content["model"]["vocab"].pop("<extra_id_4>")

    with pytest.raises(InputError, match="not numbered from 0"):
        open_vocabulary(edited(files["t5"], tmp_path / "gap.json", drop_one))
    without_end = sentencepiece_model(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(InputError, match="no end-of-sequence"):
        open_vocabulary(str(without_end))


def test_tokenizers__an_id_outside_is_refused() -> None:
    """The check itself: a tokenizer that returns an id that it does not have."""
    from refswitch.data.vocabulary import checked_ids

    assert checked_ids([0, 4], 5, "file").tolist() == [0, 4]
    for wrong in ([5], [-1], [2**40]):
        with pytest.raises(InputError, match="gives the id"):
            checked_ids(wrong, 5, "file")


def test_guarded__a_panic_is_one_line_and_an_interrupt_is_not() -> None:
    """Rust's panics are no `Exception`; Ctrl-C goes through."""
    from refswitch.data.vocabulary import guarded

    class Panic(BaseException):
        """As pyo3's."""

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(InputError, match="index out of"):
        guarded("file", fail, Panic("index out of\nbounds"))
    with pytest.raises(KeyboardInterrupt):
        guarded("file", fail, KeyboardInterrupt())


def test_vocabulary__is_a_record() -> None:
    """What a trainer reads of it."""
    assert {"size", "pad", "eos", "sentinels", "digest", "encode", "decode"} <= set(Vocabulary.__dataclass_fields__)
