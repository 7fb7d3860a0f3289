"""Checkpoints: written whole or not at all, read only when intact, and never executed."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train_utils.errors import UserError

FORMAT = 1
_PREFIXES = ("module.", "_orig_mod.")
# Keys under which other projects' files keep a network's state_dict.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "net")


def save_checkpoint(state: Any, path: Path, links: tuple[Path, ...] = ()) -> None:
    """Write `state` (plain types and tensors only) to `path`, atomically.

    The file appears under its name only when it is complete and on the disk, so that a kill at any
    moment leaves the old file or the new one. `links` get the same file without a second copy
    where the file system can.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        for link in links:
            _link(temporary, link)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # a full disk surfaces as either
        for unfinished in (path, *links):
            unfinished.with_name(f".{unfinished.name}.tmp").unlink(missing_ok=True)
        raise UserError(
            f"{path}: the checkpoint could not be written ({error}). The earlier files are kept; "
            "free disk space or choose another --output-dir, then continue with --resume auto."
        ) from error


def _link(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without links
        with temporary.open("wb") as file:
            file.write(source.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(target)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # makes the rename itself survive a power cut
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_file(path: str | Path) -> Any:
    """Read a file written by torch.save on the CPU, after its checksums, without executing it.

    Raises UserError for a missing, damaged or truncated file and for a pickle with code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of a checkpoint (.pth).")
    _check_intact(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects besides tensors and plain types, which could run code, "
            "so it was not loaded. Save its state_dict alone: torch.save(model.state_dict(), …)."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({_first_line(error)}). It may be cut off or of "
            "another kind; use another file."
        ) from error


def _check_intact(path: Path) -> None:
    # torch.load skips the CRCs of the zip archive: a flipped bit would load as wrong weights.
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    if not head:
        raise UserError(f"{path}: the file is empty. Use an earlier checkpoint.")
    if head[:1] == b"\x80":
        return  # a bare pickle, torch's old format, which has no checksums
    if head != b"PK":
        raise UserError(f"{path}: not a checkpoint. Give a file written by torch.save (.pth).")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{path}: damaged or cut off ({_first_line(error)}). Use an earlier checkpoint."
        ) from error
    if damaged:
        raise UserError(
            f"{path}: damaged, the checksum of {damaged} is wrong. Use an earlier checkpoint."
        )


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that training can continue from.

    Raises UserError for files that hold weights only, and for a newer format.
    """
    state = load_file(path)
    needed = {"model", "optimizer", "lr_scheduler", "epoch", "args", "next_epoch", "next_step"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise UserError(
            f"{path}: holds no training state to continue from. Start anew from its weights with "
            "--weights."
        )
    if state.get("format", 0) > FORMAT:
        raise UserError(
            f"{path}: written by a newer version of this project (format {state['format']}, this "
            f"one reads up to {FORMAT}). Update the scripts."
        )
    return state


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a network's state_dict from any file that holds one, and the run's config if it is ours.

    Takes this project's checkpoints (their moving average, if one was kept), bare state_dicts, and
    state_dicts under the usual keys; `module.` and `_orig_mod.` prefixes are removed.
    """
    content = load_file(path)
    ours = isinstance(content, dict) and "next_epoch" in content
    config = content.get("args") if ours else None
    found = content
    if isinstance(content, dict) and not _is_state_dict(content):
        keys = ("ema", *_STATE_KEYS)
        found = next((content[key] for key in keys if _is_state_dict(content.get(key))), None)
    if not _is_state_dict(found):
        raise UserError(
            f"{path}: holds no network weights (expected a state_dict, alone or under one of "
            f"{', '.join(_STATE_KEYS)})."
        )
    return strip_prefixes(found), config if isinstance(config, dict) else None


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) for key in value)
        and all(isinstance(item, Tensor) for item in value.values())
    )


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DistributedDataParallel and torch.compile put before every name."""
    clean = dict(state_dict)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in clean)), None):
        clean = {key.removeprefix(prefix): value for key, value in clean.items()}
    return clean


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network after checking that every name and shape fits.

    Raises UserError that lists what is missing, unexpected and of another shape; the network is
    untouched then.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} ≠ {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape (file ≠ network)", shapes),
        ]
        raise UserError(
            f"{source}: these weights do not fit {type(model).__name__}: "
            f"{'; '.join(part for part in parts if part)}. Choose the network they were made for "
            "(--set model.name=…) or another file."
        )
    model.load_state_dict(state_dict)


def join_states(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """One flat state_dict: a single network's own, or several under `<name>.` prefixes."""
    return _whole(models).state_dict()


def split_states(
    models: dict[str, nn.Module], state_dict: Mapping[str, Tensor], source: str
) -> None:
    """Copy a joined state_dict into its networks: all of them, or none (see `load_into`)."""
    load_into(_whole(models), state_dict, source)


def _whole(models: dict[str, nn.Module]) -> nn.Module:
    return models["model"] if list(models) == ["model"] else nn.ModuleDict(models)


def _listed(what: str, items: list[str], limit: int = 8) -> str:
    if not items:
        return ""
    more = f" … and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {what}: {', '.join(items[:limit])}{more}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
