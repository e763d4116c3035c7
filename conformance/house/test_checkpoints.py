# May import: standard library, numpy, safetensors, pytest, torch, transformers, refswitch.
"""Hugging Face folders: whole, sharded and in narrow formats they load to the same values; broken each is refused in a line with its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch

from conformance.house import hf_model
from conformance.test_model_peer import SHAPES
from refswitch.checkpoints.folder import read_folder
from refswitch.checkpoints.hugging_face import check_tensors, params_from, tensors_from
from refswitch.checkpoints.hugging_face_config import config_from, read_config
from refswitch.errors import InputError


@pytest.mark.parametrize("number", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_read_folder__returns_what_was_saved(tmp_path: Path, number: int, dtype: torch.dtype) -> None:
    """Every format, in one file and in shards; the tree and back is the identity."""
    shape = SHAPES[number]
    peer = hf_model.peer_of(shape).to(dtype)
    for size in ("1GB", "1KB"):
        folder = tmp_path / size
        peer.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == (size == "1KB")
        params = params_from(read_folder(folder), hf_model.config_of(shape, peer))
        saved = {name: tensor.double().numpy() for name, tensor in peer.state_dict().items()}
        for name, tensor in tensors_from(params).items():
            assert np.array_equal(tensor, saved[name]), name


def test_read_folder__rejects_what_is_cut_short(tmp_path: Path) -> None:
    """A file that ends early, an absent file, an index that leaves the folder."""
    hf_model.peer_of(SHAPES[0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: cut short"):
        read_folder(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"shared.weight": "../other.safetensors"}}')
    with pytest.raises(InputError, match="same folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize("fault", ["is missing", "has no place", "has shape", "not finite", "should be a copy"])
def test_check_tensors__rejects_by_name(fault: str) -> None:
    """Each kind of fault names its tensor."""
    shape = SHAPES[3]
    peer = hf_model.peer_of(shape)
    config, tensors = hf_model.config_of(shape, peer), hf_model.tensors_of(peer)
    check_tensors(tensors, config)
    name = "decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight"
    if fault == "is missing":
        del tensors[name]
    elif fault == "has no place":
        name = name.replace("expert_3", "expert_4")
        tensors[name] = np.zeros((10, 7))
    elif fault == "has shape":
        tensors[name] = tensors[name].T
    elif fault == "not finite":
        tensors[name][0, 0] = np.nan
    else:
        name = "encoder.embed_tokens.weight"
        tensors[name] = tensors[name] + 1.0
    with pytest.raises(InputError, match=fault) as caught:
        check_tensors(tensors, config)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}-{shape.seed}")
def test_read_config__says_what_the_peer_is(tmp_path: Path, shape: hf_model.Shape) -> None:
    """Sizes, placement of the sparse layers and form, from the file that the peer writes."""
    peer = hf_model.peer_of(shape)
    peer.save_pretrained(tmp_path)
    told = dataclasses.replace(read_config(tmp_path), name="random", expert_dropout=0.0)
    assert told == hf_model.config_of(shape, peer)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "t5", "d_model": "512"}, "d_model is '512'"),
        ({"model_type": "t5", "d_model": -1}, "d_model is -1"),
        ({"model_type": "t5", "feed_forward_proj": "swish"}, "activation is 'swish'"),
    ],
)
def test_config_from__rejects(content: dict[str, object], says: str) -> None:
    """One line that names the field."""
    with pytest.raises(InputError, match=says):
        config_from(content, "made up")
