"""Checkpoints: written whole or not at all, read only when intact, and never executed."""

import copy
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from train_utils.config import saved_settings
from train_utils.device import pins_memory
from train_utils.errors import UserError, brief, shortened, typed
from train_utils.files import open_regular, written_whole
from train_utils.log import say_once
from train_utils.outline import WHOLE, Unread, read_outline
from train_utils.weight_files import is_safetensors, other_kind, read_safetensors

FORMAT = 1
# What training continues from, and what not every run or older version has saved.
_TRAINING_STATE: dict[str, type] = {
    **dict.fromkeys(("model", "optimizer", "lr_scheduler", "args"), dict),
    **dict.fromkeys(("ema_steps", "best_scores", "meters"), dict),
    **dict.fromkeys(("epoch", "next_epoch", "next_step"), int),
    **dict.fromkeys(("num_samples", "global_batch", "world_size"), int),
    "lr": float,
}
_OPTIONAL: dict[str, type] = {
    **{"ema": dict, "scaler": dict, "stale": int, "data": str, "forward_batch": int}
}
# The least that a count can be, and the most.
_RANGES = {
    **{"epoch": (-1, 2**40), "next_epoch": (0, 2**40), "next_step": (0, 2**40)},
    **{"num_samples": (0, 2**40), "stale": (0, 2**40)},
    **dict.fromkeys(("global_batch", "forward_batch", "world_size"), (1, 2**20)),
}


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 2**53


_NAMED: dict[str, Callable[[Any], bool]] = {  # what they hold by name
    "best_scores": lambda score: type(score) in (int, float),
    "ema_steps": _is_count,
    "meters": lambda sums: (
        isinstance(sums, list)
        and [type(each) in (int, float) for each in sums] == [True, True]
        and _is_count(sums[1])
    ),
}
# Settings of earlier versions, which changed neither samples nor steps.
_RETIRED = (("train", "bucket_mb"), ("train", "compress_gradients"))
# Keys under which other projects' files keep a network's state_dict: those of averaged weights go
# before all others, then these in this order, then any key that is the only one.
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|averaged?)([^a-z]|$)", re.IGNORECASE)
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "params", "weights")
# What torch puts into names where it wraps a part of a network, or all of it.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_COUNTER = ".num_batches_tracked"  # of batch norm, since torch 0.4.1


def save_checkpoint(state: Any, path: Path, links: tuple[Path, ...] = ()) -> None:
    """Write `state` (plain types and tensors only) to `path`, atomically.

    The file appears under its name only when it is complete and on the disk, so that a kill at any
    moment leaves the old file or the new one. `links` get the same file without a second copy
    where the file system can. Raises UserError if the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, links) as file:
            # To a file object: given a path, torch tells of a full disk without saying so.
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: the checkpoint could not be written ({_file_error(error)}). The earlier "
            "files are kept; free disk space, then continue with --resume auto, or elsewhere with "
            f"--resume {typed(path.parent)} --output-dir DIR."
        ) from error


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other, while training goes on.

    A save costs the caller a copy of the state into host memory, which is kept for the next save
    (pinned where the tensors are on a GPU), and the rest of the last write if that is not done.
    At the interpreter's end the thread finishes what it writes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None
        self._buffers: dict[tuple, Tensor] = {}

    def submit(
        self,
        state: Any,
        path: Path,
        links: tuple[Path, ...] = (),
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Start `save_checkpoint`, of `state` as it is now, and `done` after it.

        Waits for the last write first, and raises its error.
        """
        self.wait()
        kept, self._buffers = self._buffers, {}
        snapshot = self._copy(state, kept)

        def write() -> None:
            save_checkpoint(snapshot, path, links)
            done()

        self._write = self._thread.submit(write)

    def wait(self) -> None:
        """Return when the last write is on the disk; raises its error (UserError), once."""
        if self._write:
            wait_for([self._write])  # an interrupt here must not lose the write's error
            write, self._write = self._write, None
            write.result()

    def _copy(self, value: Any, kept: Mapping[tuple, Tensor], place: tuple = ()) -> Any:
        """`value` with all its dicts, lists and tensors copied, the latter into kept buffers."""
        if isinstance(value, Tensor):
            buffer = kept.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                pinned = pins_memory(value.device)
                buffer = torch.empty_like(
                    value, device="cpu", pin_memory=pinned, requires_grad=False
                )
            # A blocking copy: what comes from a GPU is there before training goes on.
            self._buffers[place] = buffer.copy_(value.detach())
            return buffer
        if isinstance(value, dict):
            copied = copy.copy(value)  # with the _metadata of a state_dict
            copied.update((k, self._copy(item, kept, (*place, k))) for k, item in value.items())
            return copied
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, kept, (*place, i)) for i, item in enumerate(value))
        return value


def _file_error(error: BaseException) -> str:
    """The system's reason: torch covers an error of the file by one of its archive's offsets."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return _first_line(error)


def load_file(
    path: str | Path,
    check: Callable[[IO[bytes]], None] | None = None,
    foreign: bool = False,
) -> Any:
    """Read a file written by torch.save on the CPU, after its checksums, without executing it.

    It is opened once, so that what was checked is what is read. check: of the open file, first.
    foreign: also read safetensors, and leave objects of other code unread, which a line names.
    Raises UserError for a missing, damaged or truncated file, for one that is none, for a pickle
    with code in it, and for one that would take more memory than it has bytes.
    """
    path = Path(path)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if check:
            check(file)
        if is_safetensors(file, size):
            if not foreign:
                start = "Start anew from them with --weights."
                raise UserError(f"{path}: holds weights only, as safetensors. {start}")
            return _safetensors(path, file, size)
        _check_intact(path, file)
        try:
            outline = read_outline(file, size)
            if outline.unread and not foreign:
                raise pickle.UnpicklingError(shortened(list(outline.unread)))
            file.seek(0)
            with outline.stand_ins():
                content = torch.load(file, map_location="cpu", weights_only=True)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: holds Python objects besides tensors and plain types, which could run "
                "code, so it was not loaded. Save its state_dict alone: "
                "torch.save(model.state_dict(), …)."
            ) from error
        except Exception as error:  # whatever damage makes of a pickle
            raise UserError(
                f"{path}: not a readable checkpoint ({_first_line(error)}). It may be cut off or "
                "of another kind; use another file."
            ) from error
    if outline.unread:
        names = shortened(sorted(outline.unread), 5)
        say_once(f"{path}: left unread, since they are objects of other code: {names}")
    return content


def _safetensors(path: Path, file: IO[bytes], size: int) -> dict[str, Tensor]:
    try:
        tensors, metadata = read_safetensors(file, size)
    except ValueError as error:
        fix = "Download it again, or use another file."
        raise UserError(f"{path}: not readable as safetensors ({error}). {fix}") from error
    if metadata:
        say_once(f"{path}: says of itself {brief(metadata)}")
    return tensors


def _opened(path: Path) -> IO[Any]:
    try:
        return open_regular(path, links=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a checkpoint (.pth).") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error


def _check_intact(path: Path, file: IO[bytes]) -> None:
    # torch.load skips the CRCs of the zip archive: a flipped bit would load as wrong weights.
    try:
        kind = other_kind(file, path)
        file.seek(0)
        head = file.read(2)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    if not head:
        raise UserError(f"{path}: the file is empty. Use an earlier checkpoint.")
    if kind:
        raise UserError(f"{path}: not a checkpoint but {kind}")
    if head[:1] == b"\x80":
        return  # a bare pickle, torch's old format, which has no checksums
    if head != b"PK":
        raise UserError(f"{path}: not a checkpoint. Give a file written by torch.save (.pth).")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch.save does not compress: a few bytes cannot stand for gigabytes, nor twice.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("compressed, which torch.save does not do")
            if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                raise ValueError("its parts are larger than the whole")
            damaged = archive.testzip()
    except Exception as error:  # a flipped bit may ask for a password or another compression
        raise UserError(
            f"{path}: damaged or cut off ({_first_line(error)}). Use an earlier checkpoint."
        ) from error
    if damaged:
        raise UserError(
            f"{path}: damaged, the checksum of {damaged[:80]} is wrong. Use an earlier checkpoint."
        )


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that training can continue from.

    Raises UserError for a damaged file, one that holds weights only, and a newer format; it names
    the newest good checkpoint of the same folder.
    """
    path = Path(path)
    try:
        return _training_state(path)
    except UserError as error:
        raise UserError(f"{error} {offer_another(path)}") from error


def _training_state(path: Path) -> dict[str, Any]:
    state = load_file(path)
    _check_training_state(state, path)
    state["args"] = _config(state["args"], path)
    return state


def _config(saved: Any, path: str | Path) -> dict[str, Any]:
    """A checkpoint's config, without the settings that there are no more."""
    config = saved_settings(saved, str(path))
    for section, key in _RETIRED:
        if isinstance(config.get(section), dict):
            config[section].pop(key, None)
    return config


def _check_training_state(state: Any, path: Path) -> None:
    state = state if isinstance(state, dict) else {}
    version = state.get("format", 0)
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{path}: written by a newer version of this project (format {version}, this one reads "
            f"up to {FORMAT}). Update the scripts."
        )
    missing = [key for key in _TRAINING_STATE if key not in state]
    wrong = [
        key
        for key, kind in {**_TRAINING_STATE, **_OPTIONAL}.items()
        if key in state and not isinstance(state[key], kind)
    ]
    odd: list[str] = []
    if not missing and not wrong:
        weights = [key for key in ("model", "ema") if key in state]
        wrong = [key for key in weights if not _is_state_dict(state[key])]
        wrong += [
            key
            for key, fits in _NAMED.items()
            if not all(type(name) is str and fits(item) for name, item in state[key].items())
        ]
        odd = [
            key
            for key, (least, most) in _RANGES.items()
            if key in state and not least <= state[key] <= most
        ]
    if missing or wrong or odd:
        problems = _counted({"missing": missing, "of a wrong type": wrong, "out of range": odd})
        raise UserError(
            f"{path}: holds no training state to continue from ({problems}). Start anew from its "
            "weights with --weights."
        )


def offer_another(refused: Path) -> str:
    """Name the newest file beside a refused one that training can continue from."""
    found = []
    for path in refused.parent.glob("*.pth"):
        with suppress(Exception), open_regular(path, links=True) as file:
            # Without the tensors of what may be many large files, damaged, or of another kind.
            state = read_outline(file, os.fstat(file.fileno()).st_size).content
            found.append((int(state["next_epoch"]), int(state["next_step"]), path))
    for epoch, step, path in sorted(found, reverse=True):
        if path.name != refused.name:
            with suppress(UserError):
                _training_state(path)
                return (
                    f"The newest good checkpoint in {refused.parent} continues at epoch {epoch}, "
                    f"step {step}: --resume {typed(path)}"
                )
    return f"There is no other good checkpoint in {refused.parent}."


def load_weights(
    path: str | Path, check: Callable[[IO[bytes]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a network's state_dict from any file that holds one, and the run's config if it is ours.

    Takes this project's checkpoints (their moving average, if one was kept), bare state_dicts, also
    as safetensors, and state_dicts under any key. Of several, averaged weights go first, then those
    of the usual keys; a line says which are taken, and what is left out. Prefixes of the names
    stay: see `named_alike`. check: as in `load_file`.
    """
    content = load_file(path, check, foreign=True)
    ours = isinstance(content, dict) and "next_epoch" in content
    config = content.get("args") if ours else None
    found = _unwrapped(_found_weights(content, path, ours))
    return found, _config(config, path) if isinstance(config, dict) else None


def _found_weights(content: Any, path: str | Path, ours: bool) -> dict[str, Tensor]:
    """The one state_dict of a file that is meant. Raises UserError if it holds none, or several."""
    holders, itself = _state_dicts(content), _tensors(content)
    if itself and all(len(itself) >= len(_tensors(inner)) for inner in holders.values()):
        holders = {"": content}
    if not holders:
        parts = dict.values(content) if isinstance(content, dict) else [content]
        if any(isinstance(part, Unread) for part in parts):
            raise UserError(f"{path}: {WHOLE}")
        raise UserError(
            f"{path}: holds no network weights (expected a state_dict, alone or under one of "
            f"{', '.join(_STATE_KEYS)}). Save one: torch.save(model.state_dict(), …)."
        )
    name = _meant(holders)
    if name is None:
        first = next(iter(holders))
        place = "".join(f"[{key!r}]" for key in first.split("."))
        load = f"torch.load({str(path)!r}, map_location='cpu'){place}"
        code = f"import torch; torch.save({load}, {f'{first}.pth'!r})"
        raise UserError(
            f"{path}: holds several networks' weights, {shortened(list(holders))}. Save the one "
            f"that is meant alone, e.g. the first: python -c {typed(code)}"
        )
    tensors, found = _tensors(holders[name]), holders[name]
    if holders.keys() - {name} and not ours:
        others = shortened([key for key in holders if key != name])
        say_once(f"{path}: the weights of {name} are taken, not those of {others}")
    elif name not in ("", "ema", *_STATE_KEYS):
        say_once(f"{path}: the weights of {name} are taken")
    if left := [key for key in dict.keys(found) if key not in tensors]:
        say_once(f"{path}: left out, since they are no tensors: {shortened(left)}")
    return tensors


def _meant(holders: Mapping[str, Any]) -> str | None:
    """The name of the state_dict that goes first; None where that is not said."""
    averaged = [name for name in holders if _AVERAGED.search(name)]
    known = [key for key in _STATE_KEYS if key in holders]
    for names in (averaged, known[:1], list(holders)):
        if names:
            return names[0] if len(names) == 1 else None
    return None


def _state_dicts(content: Any) -> dict[str, Any]:
    """The state_dicts under a file's keys, by name; `a.b` of one within another dict."""
    found: dict[str, Any] = {}
    for key, item in dict.items(content) if isinstance(content, dict) else ():
        if not isinstance(key, str) or key.endswith("_extra_state"):
            continue
        if _tensors(item):
            found[key] = item
        elif (inner := _state_dicts(item)) and (name := _meant(inner)):
            found[f"{key}.{name}"] = inner[name]
    return found


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict; none of what has other keys than text, or mostly other items."""
    items = dict(dict.items(value)) if isinstance(value, dict) else {}
    if not all(isinstance(key, str) for key in items):
        return {}
    tensors = {key: item for key, item in items.items() if isinstance(item, Tensor)}
    return tensors if 2 * len(tensors) > len(items) else {}


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) for key in value)
        and all(isinstance(item, Tensor) for item in value.values())
    )


def _unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without the names of torch's wrappers, unless two names would become one."""
    clean = {_WRAPPERS.sub("", key).lstrip("."): value for key, value in state_dict.items()}
    return clean if len(clean) == len(state_dict) else state_dict


def inner_parts(state_dict: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A state_dict, then what is under the first name of most of its keys, or of an average, …

    Each with the prefix that is taken off its names: where a network of unknown names may be.
    """
    prefix, inner = "", state_dict
    while True:
        yield prefix, inner
        heads = Counter(key.partition(".")[0] for key in inner if "." in key)
        names = [head for head in heads if _AVERAGED.search(head)]
        if len(names) != 1:
            names = [head for head, count in heads.items() if 2 * count > len(inner)]
        if not names:
            return
        prefix += f"{names[0]}."
        inner = _under(f"{names[0]}.", inner)


def _under(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def named_alike(
    own: Iterable[str], state_dict: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The part of a state_dict with a network's `own` names, without a prefix before all of them.

    A line names the prefix, such as Lightning's `model.`, and counts what lies beside it, such as a
    loss's weights. Where some of the names are missing under any prefix, the part with most of them
    is returned, for `check_fits` to say which. Raises UserError where several prefixes fit, of
    which none is an average's.
    """
    needed = [key for key in own if not key.endswith(_COUNTER)]
    names, prefixes = state_dict, _prefixes(needed, state_dict)
    if not prefixes:
        names = _without_parallel_parts(state_dict)
        prefixes = _prefixes(needed, names)
    if not prefixes:
        names, known = state_dict, set(needed)
        parts = {prefix: len(known & part.keys()) for prefix, part in inner_parts(state_dict)}
        prefixes = [max(parts, key=parts.__getitem__)]
    prefix = "" if "" in prefixes else _meant(dict.fromkeys(prefixes))
    if prefix is None:
        raise UserError(
            f"{source}: holds the network several times, under {shortened(prefixes)}. Save the one "
            "that is meant alone, without the prefix before its names."
        )
    if prefix:
        say_prefix(source, prefix, names)
    return _under(prefix, names)


def _prefixes(needed: list[str], state_dict: Mapping[str, Tensor]) -> list[str]:
    """The prefixes under which a state_dict has all the names that are needed."""
    last = max(needed, key=len, default="")  # which few others end with
    before = [key.removesuffix(last) for key in state_dict if f".{key}".endswith(f".{last}")]
    return [prefix for prefix in before if all(prefix + key in state_dict for key in needed)]


def say_prefix(source: str, prefix: str, state_dict: Mapping[str, Tensor]) -> None:
    """Say which prefix is removed from a network's names, and what is left out beside them."""
    beside = [key for key in state_dict if not key.startswith(prefix)]
    left = f"; left out beside them: {len(beside)} tensors, {shortened(beside, 5)}"
    say_once(f"{source}: {prefix} is removed from all names{left if beside else ''}")


def _without_parallel_parts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without DataParallel's `module.`, which may wrap a part of a network only."""
    clean = {f".{key}".replace(".module.", ".")[1:]: value for key, value in state_dict.items()}
    return clean if len(clean) == len(state_dict) else state_dict


def with_counters(
    own: Mapping[str, Tensor], state_dict: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """A state_dict with batch norm's counters at 0, if it was saved before torch had them."""
    missing = [key for key in own if key.endswith(_COUNTER) and key not in state_dict]
    if not missing or any(key.endswith(_COUNTER) for key in state_dict):
        return state_dict
    say_once(
        f"{source}: has no num_batches_tracked, as before torch 0.4.1; {len(missing)} start at 0"
    )
    return {**state_dict, **{key: torch.zeros((), dtype=torch.int64) for key in missing}}


def check_fits(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError that lists which weights are missing, unexpected and of another shape."""
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} ≠ {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        other_shapes = "of another shape (file ≠ network)"
        problems = {"missing": missing, "unexpected": unexpected, other_shapes: shapes}
        raise UserError(
            f"{source}: these weights do not fit {type(model).__name__}: {_counted(problems)}. "
            "Choose the network they were made for (--set model.name=…) or another file."
        )


def split_states(
    models: dict[str, nn.Module], state_dict: Mapping[str, Tensor], source: str
) -> None:
    """Copy the state_dict of `as_one_module` into its networks.

    Raises UserError as `check_fits` does; the networks are untouched then.
    """
    module = as_one_module(models)
    check_fits(module, state_dict, source)
    module.load_state_dict(state_dict)


def as_one_module(models: dict[str, nn.Module]) -> nn.Module:
    """A single network itself; of several, one whose state_dict has them under `<name>.`."""
    return models["model"] if list(models) == ["model"] else nn.ModuleDict(models)


def _counted(problems: Mapping[str, list[str]]) -> str:
    """How many items have each problem, and which."""
    return "; ".join(f"{len(x)} {what}: {shortened(x)}" for what, x in problems.items() if x)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
