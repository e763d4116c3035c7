# May import: standard library, refswitch.data, refswitch.model_config, refswitch.records.
"""Runs by name: `tiny` for two minutes of two cores, `small` for twenty. Both read bytes of the Python installation's own text."""

from __future__ import annotations

from dataclasses import asdict, replace

from refswitch.data import PYTHON_TEXT
from refswitch.model_config import ModelConfig, preset
from refswitch.records import Tree

# customized: small enough for a laptop; the released models' capacity rule and losses, ReLU, tied, no dropout in pre-training
_TINY_MODEL = replace(
    preset("byte_tiny"),
    name="train_tiny",
    d_model=128,
    d_kv=32,
    heads=4,
    d_ff=512,
    encoder_sparse=(1,),
    decoder_sparse=(1,),
    experts=8,
)
_SMALL_MODEL = replace(
    _TINY_MODEL, name="train_small", d_model=256, d_kv=64, d_ff=1024, encoder_layers=4, decoder_layers=4,
    encoder_sparse=(1, 3), decoder_sparse=(1, 3), experts=16,
)  # fmt: skip


def _run(model: ModelConfig, steps: int, batch: int, inputs_length: int, every: int) -> Tree:
    return {
        "run_dir": "",  # runs/NAME
        "seed": 0,
        "steps": steps,
        "backend": "cpu",
        "layout": "data=1,expert=1,model=1",
        "threads": 0,
        "precision": "float32",
        "init": "mesh_0.1",
        "start": "",
        "model": asdict(model),
        "data": asdict(replace(PYTHON_TEXT, batch=batch, inputs_length=inputs_length)),
        "tasks": None,
        "best": "loss",
        "optimizer": {
            "name": "adafactor",
            "schedule": "inverse_square_root",
            "rate": 1.0,
            "warm_up": 10_000,
            "expert_rule": "mesh",
            "weight_decay": 0.01,
            "clip_norm": 0.0,
        },
        "loss": {"denominator": "weights", "label_smoothing": 0.0, "logits_z_coef": 1e-4},
        "distill": None,
        "microbatches": 1,
        "recompute": False,
        "checkpoint_every": every,
        "keep": 3,
        "eval_every": every,
        "eval_batches": 8,
        "tensorboard": False,
    }


PRESETS: dict[str, Tree] = {
    "tiny": _run(_TINY_MODEL, steps=250, batch=64, inputs_length=128, every=50),
    "small": _run(_SMALL_MODEL, steps=1000, batch=32, inputs_length=256, every=200),
}
