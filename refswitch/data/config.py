# May import: standard library, refswitch.errors.
"""What a model is trained on, as a frozen record: which text, in which vocabulary, asked what, in rows of which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from refswitch.errors import InputError

Documents = Literal["file", "line", "paragraph"]
Chunks = Literal["all", "one"]
ObjectiveName = Literal["span_corruption", "iid", "prefix_lm", "lm"]


@dataclass(frozen=True)
class DataConfig:
    """One training text and what is made of it. `PYTHON_TEXT` has values that `dataclasses.replace` may start from."""

    sources: tuple[str, ...]  # files, folders, globs; empty: the source text of this Python's standard library
    field: str  # of a JSON line: where its text stands
    documents: Documents  # what one document of a plain text file is
    held_out: float  # share of the documents, chosen by a hash of their names, that are never trained on
    held_out_sources: tuple[str, ...]  # or: these are held out, and all of `sources` is trained on
    clean: bool  # the rules of C4 for pages of the web
    deduplicate: bool  # repeated spans of three sentences are kept once
    vocabulary: str  # "bytes", or the file of a tokenizer: `tokenizer.json` of Hugging Face, `*.model` of SentencePiece
    sentinels: int  # 0: as many as the vocabulary has room for, 100 where it has none
    objective: ObjectiveName
    density: float  # share of the tokens that are noise
    mean_span: float  # mean length of a run of noise
    inputs_length: int  # of a row, with its end-of-sequence
    targets_length: int  # 0: what the objective needs
    chunk: int  # a longer document is cut into chunks of so many tokens
    chunks: Chunks  # which of them an epoch reads: all, or one drawn at random (T5)
    concatenate: int  # chunks that are joined before they are cut into segments
    pack: bool  # several short examples in a row
    batch: int  # rows

    def __post_init__(self) -> None:
        """Refuse what describes no data."""
        for name, kind in (("documents", Documents), ("objective", ObjectiveName), ("chunks", Chunks)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"data.{name}={getattr(self, name)}: should be one of {', '.join(get_args(kind))}")
        for name, least in (("inputs_length", 3), ("targets_length", 0), ("sentinels", 0), ("chunk", 1), ("concatenate", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"data.{name}={getattr(self, name)}: should be at least {least}")
        if not 0.0 <= self.held_out < 1.0:
            raise InputError(f"data.held_out={self.held_out}: should be in [0, 1)")
        if not 0.0 <= self.density < 1.0:
            raise InputError(f"data.density={self.density}: should be in [0, 1)")
        if not self.mean_span >= 1.0:
            raise InputError(f"data.mean_span={self.mean_span}: should be at least 1")
        if self.held_out_sources and self.held_out:
            raise InputError("data.held_out_sources: needs data.held_out=0, as the held-out text is named, not drawn")
        if self.pack and self.objective == "iid":
            raise InputError("data.pack=true: needs examples whose length is known beforehand, which those of data.objective=iid are not")


@dataclass(frozen=True)
class TaskConfig:
    """One text-to-text task: pairs of inputs and targets, in JSON lines or in a table with tabs."""

    name: str
    train: tuple[str, ...]  # files, folders, globs
    validation: tuple[str, ...]
    prefix: str  # stands before every input: "sst2 sentence: "
    inputs: str  # the field or the column
    targets: str


@dataclass(frozen=True)
class MixtureConfig:
    """Tasks that are trained on together, each as often as its size, up to a limit, to a power."""

    tasks: tuple[TaskConfig, ...]
    limit: int  # a task counts as no larger (T5: 2**19; ST-MoE: 65536); 0: as large as it is
    exponent: float  # 1: in proportion; 0.3: mT5's languages; 0: all alike
    inputs_length: int  # of a row, with its end-of-sequence; longer inputs are cut
    targets_length: int
    pack: bool
    batch: int

    def __post_init__(self) -> None:
        """Refuse what describes no mixture."""
        if not self.tasks or len({task.name for task in self.tasks}) < len(self.tasks):
            raise InputError("tasks: should be at least one, of different names")
        for name, least in (("limit", 0), ("inputs_length", 1), ("targets_length", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: should be at least {least}")
        if not 0.0 <= self.exponent <= 1.0:
            raise InputError(f"exponent={self.exponent}: should be in [0, 1]")


PYTHON_TEXT = DataConfig(
    sources=(),
    field="text",
    documents="file",
    held_out=0.05,
    held_out_sources=(),
    clean=False,
    deduplicate=False,
    vocabulary="bytes",
    sentinels=0,
    objective="span_corruption",
    density=0.15,
    mean_span=3.0,
    inputs_length=128,
    targets_length=0,
    chunk=65536,
    chunks="all",
    concatenate=128,
    pack=False,
    batch=64,
)
