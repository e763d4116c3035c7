# May import: refswitch.data (config, corpus, stream, tasks, vocabulary).
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

    tasks = open_mixture(mixture_config, corpus.vocabulary, seed)               # a Stream too: fine-tuning
    pairs = open_pairs(task_config, task_config.validation, corpus.vocabulary)  # for validation_batches(pairs, vocabulary, mixture_config)
    texts = read_pairs(task_config, task_config.validation)                     # the same as text, for the metrics

Reading order: `config`; `sources`, `cleaning`, `vocabulary`, `corpus` (from files to tokens); `spans`, `objective` (from tokens to inputs and
targets); `shuffle`, `segments`, `examples`, `stream` (which of them, in which order, in which row); `tasks` (fine-tuning).
"""

from refswitch.data.config import PYTHON_TEXT, DataConfig, MixtureConfig, TaskConfig
from refswitch.data.corpus import Corpus, Tokens, open_corpus
from refswitch.data.stream import Stream, open_stream, unigram_entropy
from refswitch.data.tasks import Pair, Pairs, mixture_of, open_mixture, open_pairs, read_pairs, validation_batches
from refswitch.data.vocabulary import Vocabulary, open_vocabulary

__all__ = [
    "PYTHON_TEXT",
    "Corpus",
    "DataConfig",
    "MixtureConfig",
    "Pair",
    "Pairs",
    "Stream",
    "TaskConfig",
    "Tokens",
    "Vocabulary",
    "mixture_of",
    "open_corpus",
    "open_mixture",
    "open_pairs",
    "open_stream",
    "open_vocabulary",
    "read_pairs",
    "unigram_entropy",
    "validation_batches",
]
