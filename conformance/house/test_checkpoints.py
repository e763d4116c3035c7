# May import: standard library, numpy, safetensors, pytest, torch, transformers, refswitch.
"""Hugging Face folders: whole, sharded and in narrow formats they load to the same values; broken each is refused in a line with its name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch
import transformers
from typer.testing import CliRunner

from conformance.house import hf_model
from conformance.test_model_peer import LOGITS, SHAPES, distance
from refswitch.checkpoints.folder import read_folder, storage_of
from refswitch.checkpoints.hugging_face import check_tensors, params_from, tensors_from
from refswitch.checkpoints.hugging_face_config import config_from, content_of, read_config
from refswitch.checkpoints.models import read_model
from refswitch.checkpoints.own import write_own
from refswitch.checkpoints.template import template_of
from refswitch.cli.main import app
from refswitch.errors import InputError
from refswitch.model_config import PRESETS
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.planning.counts import parameter_count
from refswitch.tree import leaves


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


RUNNER = CliRunner()


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("storage", ["float64", "float32"])
def test_convert__there_and_back(tmp_path: Path, number: int, storage: str) -> None:
    """Hugging Face to ours and back: `transformers` loads the last folder whole and computes what it computed from the first."""
    shape = SHAPES[number]
    peer = hf_model.peer_of(shape)
    peer.save_pretrained(tmp_path / "theirs")
    if shape.kind == "t5" and not shape.tied:  # as T5 1.1 was saved before transformers 5
        text = (tmp_path / "theirs" / "config.json").read_text(encoding="utf-8")
        (tmp_path / "theirs" / "config.json").write_text(
            text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'), encoding="utf-8"
        )
    ours, again = tmp_path / "ours", tmp_path / "again"
    for source, dest in (("theirs", ours), ("ours", again)):
        result = RUNNER.invoke(app, ["convert", str(tmp_path / source), str(dest), "--storage", storage])
        assert result.exit_code == 0, result.output
    config, params = read_model(str(ours))
    assert dataclasses.replace(config, name="random", expert_dropout=0.0) == hf_model.config_of(shape, peer)
    assert storage_of(ours) == storage_of(again) == storage
    loaded, info = type(peer).from_pretrained(again, output_loading_info=True, dtype=torch.float64)
    assert {key: value for key, value in info.items() if value and key != "error_msgs"} == {}
    original = type(peer).from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    if shape.kind == "switch":  # an untied one that was saved lacks the two copies of its table, and is read with random ones in their place
        original.load_state_dict(peer.state_dict())
    batch = hf_model.batch_of(shape)
    before, after = (
        model.eval()(
            input_ids=torch.tensor(batch.encoder_tokens_BM), attention_mask=torch.tensor(batch.encoder_valid_BM.astype(int)),
            decoder_input_ids=torch.tensor(batch.decoder_tokens_BL),
        ).logits
        for model in (original, loaded)
    )  # fmt: skip
    if storage == "float64":
        assert distance(after.detach().numpy(), before.detach().numpy()) <= LOGITS  # where arrays lie in memory changes bits
    for path, leaf in leaves(params).items():
        rounded = round_to(leaves(params_from(hf_model.tensors_of(peer), config))[path], FORMATS[storage])
        assert np.array_equal(leaf, rounded), path


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16", "float16"])
def test_write_own__shards_hold_the_same(tmp_path: Path, storage: str) -> None:
    """Small shards, one file and back: equal bits in the storage format."""
    shape = SHAPES[4]
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    params = hf_model.params_of(peer, config)
    for name, shard_bytes in (("shards", 2000), ("one", 10**9)):
        write_own(tmp_path / name, config, params, storage, shard_bytes)
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (name == "shards")
        told, again = read_model(str(tmp_path / name))
        assert told == config
        for path, leaf in leaves(again).items():
            assert np.array_equal(leaf, round_to(leaves(params)[path], FORMATS[storage])), path


def test_new_folder__keeps_what_is_there(tmp_path: Path) -> None:
    """A folder with something in it is refused; a failure while writing leaves nothing behind."""
    shape = SHAPES[0]
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    params = hf_model.params_of(peer, config)
    write_own(tmp_path / "model", config, params, "float32", 10**9)
    with pytest.raises(InputError, match="exists already"):
        write_own(tmp_path / "model", config, params, "float32", 10**9)
    huge = params._replace(embedding_VD=params.embedding_VD * 1e6)
    with pytest.raises(InputError, match="embedding_VD has values that float16 cannot hold"):
        write_own(tmp_path / "other", config, huge, "float16", 10**9)
    with pytest.raises(InputError, match="cannot be written"):
        write_own(tmp_path / "no" / "where", config, params, "float32", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version: 1", "version: 2", "is of version 2, and this program reads version 1"),
        ("format: refswitch-model", "format: other", "should say format: refswitch-model"),
        ("  heads: 2", "  heads: two", "heads"),
        ("  heads: 2", "  haeds: 2", "haeds, heads"),
        ("  d_ff: 7", "  d_ff: 8", "encoder.blocks.0.feed_forward.feed_forward.w_in_DF has shape"),
        ("  encoder_layers: 1", "  encoder_layers: 2", "encoder.blocks.1.self_attention.norm_D of shape"),
    ],
)
def test_read_own__rejects(tmp_path: Path, old: str, new: str, says: str) -> None:
    """A config of another kind, or one that contradicts the tensors, in one line with the name."""
    shape = SHAPES[0]
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    write_own(tmp_path / "model", config, hf_model.params_of(peer, config), "float32", 10**9)
    path = tmp_path / "model" / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    result = RUNNER.invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "dest")])
    assert result.exit_code == 2
    assert says in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gated": True, "activation": "gelu_tanh"}, "no Switch with experts or layers of gated gelu_tanh"),
        ({"encoder_sparse": (0,)}, r"cannot place sparse layers \(0,\) in the encoder, of 2 layers"),
    ],
)
def test_content_of__rejects(change: dict[str, object], says: str) -> None:
    """What Hugging Face's classes cannot be told."""
    with pytest.raises(InputError, match=says):
        content_of(dataclasses.replace(PRESETS["tiny_switch"], **change))


def test_convert__hub_name_from_a_cache(tmp_path: Path) -> None:
    """A hub name is found in the cache without a network; another is refused in one line."""
    snapshot = tmp_path / "hub" / "models--google--switch-base-8" / "snapshots" / "0123abc"
    hf_model.peer_of(SHAPES[3]).save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc", encoding="utf-8")
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def call(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "refswitch", "convert", name, str(tmp_path / "dest")]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    done = call("google/switch-base-8")
    assert done.returncode == 0, done.stderr
    assert read_model(str(tmp_path / "dest"))[0].experts == SHAPES[3].experts
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "d_model": 10, "d_kv": 3, "d_ff": 7, "num_heads": 2, "num_layers": 2}
    small = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**sizes))
    small.save_pretrained(tmp_path / "hub" / "models--google--mt5-small" / "snapshots" / "4567def")
    refs = tmp_path / "hub" / "models--google--mt5-small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("4567def", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "refswitch", "compare-model", "google/mt5-small"], env=env, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert "AGREES" in done.stdout, done.stderr
    missing = call("google/mt5-base")
    assert missing.returncode == 2
    assert "hub does not give it" in missing.stderr
    assert missing.stderr.count("\n") == 1


@pytest.mark.parametrize("name", PRESETS)
def test_template__has_the_counted_size(name: str) -> None:
    """Every preset's tree has as many numbers as the formula counts, and none is allocated; its tensors have distinct names."""
    config = PRESETS[name]
    template = leaves(template_of(config))
    biases = sum(leaf.size for path, leaf in template.items() if path.rsplit(".", 1)[-1].startswith("b_"))
    assert sum(leaf.size for leaf in template.values()) - biases == parameter_count(config).total
    assert not any(any(leaf.strides) for leaf in template.values())
