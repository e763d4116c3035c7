# May import: standard library, huggingface_hub (inside a function), refswitch.reference, refswitch.checkpoints (below), refswitch.errors.
"""A model by its name: a folder of ours, a Hugging Face folder, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from refswitch.checkpoints.folder import INDEX, read_folder
from refswitch.checkpoints.hugging_face import params_from
from refswitch.checkpoints.hugging_face_config import config_from, read_content, shares_table
from refswitch.checkpoints.own import CONFIG, read_own
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.reference.transformer import ModelParams

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve_folder(source: str) -> Path:
    """Return the folder of a model: the folder itself, or the local copy of a hub name (OWNER/NAME or OWNER/NAME@REVISION).

    Raises
    ------
    InputError
        Where there is neither, or the hub cannot be asked.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not HUB_NAME.fullmatch(source):
        raise InputError(f"{source!r} is neither a folder nor a name on the hub (OWNER/NAME)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"there is no folder {source!r}, and for a hub name huggingface_hub is needed: pip install 'refswitch[hub]'") from None
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["config.json", "*.safetensors", INDEX]))
    except Exception as error:  # noqa: BLE001 - the library's own kinds, httpx's and the system's alike mean that it is not to be had
        reason = " ".join(str(error).split())
        raise InputError(f"there is no folder {source!r}, and the hub does not give it: {reason[:200]}") from None


def is_own(folder: Path) -> bool:
    """Whether a folder is in our own format."""
    return (folder / CONFIG).is_file()


def read_model(source: str) -> tuple[ModelConfig, ModelParams]:
    """Return a model's config and its parameters in float64.

    Raises
    ------
    InputError
        In one line, whatever is wrong with it.
    """
    folder = resolve_folder(source)
    if is_own(folder):
        return read_own(folder)
    content = read_content(folder)
    config, tensors = config_from(content, folder.name), read_folder(folder)
    if not config.tied and shares_table(content) and "shared.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    return config, params_from(tensors, config)
