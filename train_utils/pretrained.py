"""ImageNet weights for encoders: torchvision's, downloaded once, or a local file."""

import hashlib
import socket
from http.client import HTTPException
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor
from torchvision import models

from train_utils.checkpoint import load_weights, named_alike
from train_utils.errors import UserError
from train_utils.log import get_logger

TIMEOUT = 30  # seconds of silence after which a download has failed

Arch = Literal["vgg16", "vgg16_bn", "resnet50"]


def backbone_state(spec: str, arch: Arch) -> dict[str, Tensor]:
    """Read the whole state_dict of torchvision's network `arch`.

    `spec` is "DEFAULT", torchvision's recommended weights, kept in torch hub's cache and downloaded
    if not there, or the path of a file. Raises UserError if they cannot be had or are damaged.
    """
    if spec == "DEFAULT":
        weights = models.get_model_weights(arch).DEFAULT
        path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        if not path.is_file():  # what else lies there, such as a pipe, is replaced
            _download(weights.url, path)
        return load_weights(path, lambda file: _check_hash(file, path, weights.url))[0]
    with torch.device("meta"):
        own = models.get_model(arch, weights=None).state_dict()
    encoder = [key for key in own if not key.startswith(("classifier.", "fc."))]
    return named_alike(encoder, load_weights(spec)[0], spec)


def _download(url: str, path: Path) -> None:
    # torch hub sets none, and behind a firewall that swallows packets each address takes minutes.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        get_logger().info(f"Downloading {url} to {path}")
        torch.hub.download_url_to_file(url, str(path), _hash_prefix(path))
    # URLError and timeouts are OSErrors too; a wrong hash is a RuntimeError.
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"model.weights: {url} could not be downloaded ({error}). Fetch it elsewhere and place "
            f"it as {path}, or name a local file of weights, or set model.weights to null to train "
            "from random weights."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _check_hash(file: IO[bytes], path: Path, url: str) -> None:
    # torch hub checks downloads only, not what lies in its cache.
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    file.seek(0)
    if not digest.hexdigest().startswith(_hash_prefix(path)):
        raise UserError(
            f"{path}: damaged or another file, its checksum is wrong. Delete it, so that {url} is "
            "downloaded again, or set model.weights to another file or null."
        )


def _hash_prefix(path: Path) -> str:
    """The first digits of the file's SHA-256, with which torchvision's file names end."""
    return path.stem.rpartition("-")[2]
