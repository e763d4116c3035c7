# May import: standard library, numpy, refswitch.worlds, refswitch.reference (records).
"""What a step tells of its sparse layers: load, drops, gates, entropy; as sums, which microbatches and ranks add. Next: `step`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.switch import SwitchOutputs
from refswitch.reference.transformer import Batch, ModelOutputs
from refswitch.worlds.world import World


class LayerMetrics(NamedTuple):
    """One sparse layer over one batch; padding is not in it."""

    load_E: np.ndarray  # share of the tokens that chose each expert
    dropped: float  # share of the tokens without a slot
    gate: float  # mean gate of the kept tokens
    entropy: float  # mean entropy of the router's probabilities, nats


def _sums(switch: SwitchOutputs, valid_BL: np.ndarray) -> np.ndarray:
    """Return the counts of each expert, then kept tokens, the sum of their gates and of all tokens' entropies."""
    (expert_GS, _, kept_GS), E = switch.route, switch.probs_GSE.shape[-1]
    valid_GS = valid_BL.reshape(expert_GS.shape)
    count_E = np.bincount(expert_GS[valid_GS], minlength=E)
    probs_TE = switch.probs_GSE[valid_GS]
    information_TE = np.log(np.maximum(probs_TE, np.finfo(probs_TE.dtype).tiny))
    entropy = -np.einsum("te,te->", probs_TE, information_TE, dtype=np.float64)
    served_GS = valid_GS & kept_GS
    return np.array([*count_E, served_GS.sum(), switch.gate_GS[served_GS].sum(dtype=np.float64), entropy])


def layer_sums(outputs: ModelOutputs, batch: Batch) -> np.ndarray:
    """Return one row of sums for each sparse layer, the encoder's first."""
    rows = [_sums(switch, batch.encoder_valid_BM) for switch in outputs.encoder.switches]
    rows += [_sums(switch, batch.decoder_valid_BL) for switch in outputs.decoder.switches]
    return np.array(rows).reshape(len(rows), -1 if rows else 0)


def layer_metrics(sums: np.ndarray, world: World) -> tuple[LayerMetrics, ...]:
    """Return the metrics of all ranks' sums."""
    found = []
    for row in world.all_reduce(sums):
        count_E, (served, gate, entropy) = row[:-3], row[-3:]
        tokens = max(count_E.sum(), 1.0)
        found.append(LayerMetrics(count_E / tokens, 1.0 - served / tokens, gate / max(served, 1.0), entropy / tokens))
    return tuple(found)
