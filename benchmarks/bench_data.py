# May import: standard library, numpy, refswitch.
"""How many tokens a second the data pipeline gives, against what trainers take: first checked, then timed.

The pipeline must give 20 times what the model consumes. Its limit in the same run is a plain copy of the same tokens out of the mapped file and into
rows (NumPy's gather), which no pipeline that makes batches of arrays can beat. Run: python benchmarks/bench_data.py [--seconds S]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from refswitch.data import PYTHON_TEXT, Corpus, DataConfig, open_corpus, open_stream

CASES = {
    "spans, 64 x 512": {"inputs_length": 512},
    "spans, 64 x 128": {},
    "spans, 16 x 128": {"batch": 16},
    "spans, 8 x 64": {"inputs_length": 64, "batch": 8},
    "iid, 64 x 128": {"objective": "iid"},
    "prefix-LM, 64 x 128": {"objective": "prefix_lm"},
    "LM, 64 x 128": {"objective": "lm"},
    "spans of lines, packed, 64 x 512": {"inputs_length": 512, "documents": "line", "concatenate": 1, "pack": True},
}


def rate_of(work: Callable[[int], int], seconds: float) -> float:
    """Return tokens a second: the best of three runs of at least a third of the time."""
    best, n = 0.0, 0
    for _ in range(3):
        start, tokens = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds / 3:
            tokens += work(n)
            n += 1
        best = max(best, tokens / spent)
    return best


def measured(corpus: Corpus, config: DataConfig, seconds: float) -> tuple[float, float]:
    """Return the rates of the stream and of a plain gather of as many tokens."""
    stream = open_stream(corpus, corpus.train, config, 1)
    again = open_stream(corpus, corpus.train, config, 1)
    for n in (3, 0):
        assert all(np.array_equal(a, b) for a, b in zip(stream.batch(n), again.batch(n), strict=True)), "a batch depends on what was asked before"

    def of_stream(n: int) -> int:
        batch = stream.batch(n)
        return int(batch.encoder_valid_BM.sum() + batch.decoder_valid_BL.sum())

    ids, size = corpus.train.ids_N, config.batch * (stream.inputs_length + stream.targets_length)
    places = (np.arange(size).reshape(config.batch, -1) * 7) % (len(ids) - size)

    def of_gather(n: int) -> int:
        return np.asarray(ids[places + n % size], np.int64).size

    return rate_of(of_stream, seconds), rate_of(of_gather, seconds)


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case and its limit")
    seconds = parser.parse_args().seconds
    corpora: dict[str, Corpus] = {}
    for documents in ("file", "line"):
        start = time.perf_counter()
        corpora[documents] = open_corpus(dataclasses.replace(PYTHON_TEXT, documents=documents))
        found = corpora[documents]
        tokens, spent = found.train.ids_N.size + found.held_out.ids_N.size, time.perf_counter() - start
        print(f"corpus {found.digest}, documents={documents}: {len(found.train.end_I)} documents, {tokens / 1e6:.1f} M bytes read in {spent:.2f} s")
    print(f"{'case':34} {'M tokens/s':>10} {'gather':>8} {'of it':>6}   consumer that it feeds 20 times over")
    for name, changes in CASES.items():
        config = dataclasses.replace(PYTHON_TEXT, **changes)
        rate, limit = measured(corpora[config.documents], config, seconds)
        print(f"{name:34} {rate / 1e6:10.2f} {limit / 1e6:8.1f} {rate / limit:6.1%}   {rate / 20:,.0f} tokens/s")


if __name__ == "__main__":
    main()
