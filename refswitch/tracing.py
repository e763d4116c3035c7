# May import: standard library, numpy, tokenizers (inside a function), refswitch.model_setup and what lies below it.
"""Where each token of a text goes: a model run over it once, and what every sparse layer of both stacks did with each token.

Paper: figure 3 for what is shown. The decoder reads the same text, shifted right. Tokens are bytes, or those of a `tokenizer.json` beside the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.model_setup import model_statics, no_noise
from refswitch.reference.switch import SwitchOutputs
from refswitch.reference.transformer import Batch, ModelParams, model_forward

BYTE_OFFSET = 3  # 0 is padding, 1 the end, 2 unknown


class Tokens(NamedTuple):
    """A text's tokens: their numbers and how they are shown."""

    number_L: np.ndarray
    shown: tuple[str, ...]


class LayerTrace(NamedTuple):
    """What one sparse layer did with each token, in the order of the text."""

    stack: str
    block: int
    capacity: int  # slots of one expert in one group
    groups: int
    expert_L: np.ndarray
    slot_L: np.ndarray
    kept_L: np.ndarray
    gate_L: np.ndarray
    probs_LE: np.ndarray

    @property
    def load_E(self) -> np.ndarray:
        """Tokens that each expert serves."""
        return np.bincount(self.expert_L[self.kept_L], minlength=self.probs_LE.shape[1])

    @property
    def dropped(self) -> int:
        """Tokens without a slot."""
        return int(np.sum(~self.kept_L))

    @property
    def entropy_L(self) -> np.ndarray:
        """Entropy of each token's probabilities in nats; log(E) is uniform."""
        probs_LE = np.where(self.probs_LE > 0.0, self.probs_LE, 1.0)
        return -np.sum(probs_LE * np.log(probs_LE), axis=-1)

    @property
    def balance(self) -> float:
        """E sum f P of eq. (4) without its coefficient, over the text: 1 where everything is uniform."""
        E = self.probs_LE.shape[1]
        f_E = np.bincount(self.expert_L, minlength=E) / len(self.expert_L)
        return float(E * np.sum(f_E * self.probs_LE.mean(axis=0)))


def tokens_of(text: str, folder: Path | None, vocabulary: int) -> Tokens:
    """Return the tokens of a text.

    Raises
    ------
    InputError
        Where the text has none, a tokenizer cannot be read, or the model's vocabulary has no place for a token.
    """
    file = folder / "tokenizer.json" if folder is not None else None
    if file is not None and file.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError(f"{file} needs the tokenizers library: pip install 'refswitch[text]'") from None
        try:
            encoded = Tokenizer.from_file(str(file)).encode(text)
        except Exception as error:  # noqa: BLE001 - the library raises its base class
            raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
        tokens = Tokens(np.array(encoded.ids, np.int64), tuple(encoded.tokens))
    else:
        data = text.encode("utf-8")
        tokens = Tokens(np.frombuffer(data, np.uint8).astype(np.int64) + BYTE_OFFSET, tuple(_shown_byte(byte) for byte in data))
    if not len(tokens.number_L):
        raise InputError("the text is empty")
    if tokens.number_L.max() >= vocabulary:
        raise InputError(f"token {tokens.number_L.max()} is not in the model's vocabulary of {vocabulary}")
    return tokens


def _shown_byte(byte: int) -> str:
    return chr(byte) if 33 <= byte < 127 else {32: "␣", 10: "⏎", 9: "⇥"}.get(byte, f"{byte:02x}")


def _layer_trace(stack: str, block: int, switch: SwitchOutputs, capacity: int) -> LayerTrace:
    G, _, E = switch.probs_GSE.shape
    route = switch.route
    parts = [part.reshape(-1) for part in (*route, switch.gate_GS)]
    return LayerTrace(stack, block, capacity, G, parts[0], parts[1], parts[2], parts[3], switch.probs_GSE.reshape(-1, E))


def trace_text(tokens: Tokens, config: ModelConfig, params: ModelParams) -> list[LayerTrace]:
    """Return what every sparse layer did, the encoder's first.

    Raises
    ------
    InputError
        Where the model has no sparse layer, or its dialect cannot cut so many tokens into groups.
    """
    if not config.experts:
        raise InputError(f"model {config.name} has no sparse layer: there is nothing to trace")
    token_BL = tokens.number_L[None]
    L = token_BL.shape[1]
    statics = model_statics(config, 1, L, L, train=False)
    ones_BL, here_L = np.ones_like(token_BL), np.arange(L)
    shifted_BL = np.concatenate([np.zeros((1, 1), np.int64), token_BL[:, :-1]], axis=1)
    batch = Batch(token_BL, ones_BL, ones_BL == 1, here_L, shifted_BL, ones_BL, ones_BL == 1, here_L, token_BL, 1.0 * ones_BL)
    outputs, _ = model_forward(batch, params, no_noise(params, statics, 1, L, L), statics)
    found = []
    for stack, sparse, switches, capacity in (
        ("encoder", config.encoder_sparse, outputs.encoder.switches, statics.encoder.capacity),
        ("decoder", config.decoder_sparse, outputs.decoder.switches, statics.decoder.capacity),
    ):
        found += [_layer_trace(stack, block, switch, capacity) for block, switch in zip(sparse, switches, strict=True)]
    return found
