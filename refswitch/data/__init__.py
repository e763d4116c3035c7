# May import: refswitch.data (config, corpus, stream, vocabulary).
"""The text that a model is trained on: from files to batches, by address.

    config = dataclasses.replace(PYTHON_TEXT, batch=16)          # or `records.validate(tree, DataConfig, where)`
    corpus = open_corpus(config, cache=run_dir / "tokens")       # Corpus: train, held_out, vocabulary, digest
    stream = open_stream(corpus, corpus.train, config, seed)     # Stream: inputs_length, targets_length, rows
    batch = stream.batch(n)                                      # reference.transformer.Batch; n = 0, 1, 2, ... without end
    mine = stream.batch(n, rows=range(4, 8))                     # a rank's share: that slice of the same batch
    text = corpus.vocabulary.decode(batch.targets_BL[0])         # Vocabulary: size, pad, eos, sentinels, encode, decode

Batch n is a function of (seed, corpus, n): the only state of a run is n. The model's vocabulary must be at least `corpus.vocabulary.size`.
`corpus.digest` says which text it is, `corpus.train.digest` which tokens: a run that resumes compares them. `unigram_entropy(stream.batch(n) for n
in range(k))` is the loss to beat. Everything that a user can do wrong is an `InputError` of one line.

Reading order: `config`; `sources`, `cleaning`, `vocabulary`, `corpus` (from files to tokens); `spans`, `objective` (from tokens to inputs and
targets); `shuffle`, `segments`, `examples`, `stream` (which of them, in which order, in which row).
"""

from refswitch.data.config import PYTHON_TEXT, DataConfig
from refswitch.data.corpus import Corpus, Tokens, open_corpus
from refswitch.data.stream import Stream, open_stream, unigram_entropy
from refswitch.data.vocabulary import Vocabulary, open_vocabulary

__all__ = [
    "PYTHON_TEXT",
    "Corpus",
    "DataConfig",
    "Stream",
    "Tokens",
    "Vocabulary",
    "open_corpus",
    "open_stream",
    "open_vocabulary",
    "unigram_entropy",
]
