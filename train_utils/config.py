"""YAML files and ``--set`` assignments into typed dataclasses; what does not fit is refused.

    file = load_yaml("configs/u2net.yaml")
    build(Config, file, "configs/u2net.yaml")  # alone first, so that its errors name the file
    config = build(Config, merge(file, parse_assignments(["optim.lr=1e-3"])), "command line")

Supported annotations: int, float, str, bool, ``X | None`` and other unions, list[X], tuple[X, Y],
tuple[X, ...], Literal and nested dataclasses. A dataclass checks ranges in ``__post_init__`` by
raising ``ValueError("key: cause. Fix.")``.
"""

import dataclasses
import difflib
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from train_utils.errors import UserError, brief, typed
from train_utils.files import open_regular, write_text

T = TypeVar("T")

_TAG = "tag:yaml.org,2002:"
# Groups: sign, whole, fraction, exponent sign, exponent. YAML 1.1 takes several such numbers for
# text: 1e-3 (no point), 1.0e5 (no sign in the exponent), -.5 (a sign, but no whole part).
_NUMBER = re.compile(r"([-+]?)(?=\.?\d)(\d*)(?:\.(\d*))?(?:[eE]([-+]?)(\d+))?\Z", re.ASCII)
# What YAML 1.1 reads otherwise than people do: 010 is 8, 1:30 is 90, 2024-01-31 is no text.
_TRAP = re.compile(r"[-+]?0([0-9_]|[bx]_*\Z)|.*:|\d{4}-")
_MAX_DIGITS = 1000  # Python itself refuses to print numbers of some thousands
_MAX_BYTES = 2**16  # a recipe has a few thousand; text of megabytes takes minutes to parse
_MAX_WRITTEN = 2**18  # characters of a recipe in which every alias is written out
_MAX_MERGED = 20_000  # keys that are copied
_MAX_DEPTH = 32
_MAX_TEXT = 4096  # no path is longer
# What no file name can hold: NUL, and lone surrogates other than U+DC80 to U+DCFF, which stand for
# bytes that are not UTF-8.
_UNUSABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
_TRAP_TAGS = (_TAG + "int", _TAG + "float", _TAG + "timestamp")
_SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
# YAML reads these words as booleans; a Literal field that offers one of them means the word.
_BOOLEAN_WORDS = {False: ("off", "no", "false"), True: ("on", "yes", "true")}


# Reading


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses tags, duplicate keys, keys that are not text, and traps.

    Aliases share what they stand for, which `build` counts; of merged (``<<``) sections copies are
    made, and counted here.
    """

    merged = 0  # keys

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if tag := getattr(event, "tag", None):
            raise ValueError(f"{line}: the tag {tag.replace(_TAG, '!!')} is refused. Remove it.")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        elif node.tag in _TRAP_TAGS and _TRAP.match(node.value):
            fix = "Put it in quotes if it is text, else write a plain decimal number."
            raise ValueError(f"{line}: YAML 1.1 does not read {node.value[:80]} as it looks. {fix}")
        elif node.tag == _TAG + "int" and len(node.value) > _MAX_DIGITS:
            fix = "Put it in quotes if it is text."
            raise ValueError(f"{line}: a number of {len(node.value)} digits. {fix}")
        elif isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_TEXT:
            raise ValueError(f"{line}: text of {len(node.value)} characters. Shorten it.")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge as YAML does, but keep each key once: ten merges of ten merges of … are no more."""
        for key, value in node.value:
            sections = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for section in sections if key.tag == _TAG + "merge" else []:
                if isinstance(section, yaml.MappingNode):
                    self.flatten_mapping(section)
                    self.merged += len(section.value)
                if self.merged > _MAX_MERGED:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: merges of too many keys. Write fewer.")
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())


class _List(list):
    """A list of a recipe, with its items as they are written: YAML takes no and 1 for no texts."""

    texts: Sequence[str | None] = ()


def _list_with_texts(loader: _Loader, node: yaml.SequenceNode) -> Iterator[_List]:
    items = _List()
    yield items
    items.extend(loader.construct_sequence(node))
    items.texts = [part.value if isinstance(part, yaml.ScalarNode) else None for part in node.value]


_Loader.add_constructor(_TAG + "seq", _list_with_texts)


class _CommandLineLoader(_Loader):
    """Reads 1e-3 as a number: on the command line no other YAML reader will disagree."""


_CommandLineLoader.add_implicit_resolver(_TAG + "float", _NUMBER, list("-+.0123456789"))


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (_TAG + "str", _TAG + "merge"):
            raise ValueError(f"line {line}: YAML does not read this key as text. Put it in quotes.")
        if key.value in lines:
            first = lines[key.value]
            raise ValueError(
                f"line {line}: duplicate key {key.value[:80]}, see line {first}. Keep one."
            )
        lines[key.value] = line


def check_size(value: Any, most: int = _MAX_WRITTEN, longest: int = _MAX_TEXT) -> None:
    """Raise ValueError for a value that is too large or too deep once written out in full.

    Shared parts, such as aliases of aliases, count each time they occur, but are measured once.
    most: characters of text, and others items, in all. longest: characters of one text.
    """
    known: dict[int, tuple[int, int]] = {}  # containers → their size and height

    def measured(item: Any, depth: int) -> tuple[int, int]:
        if isinstance(item, str) and len(item) > longest:
            raise ValueError(f"holds a text of {len(item):,} characters")
        if not isinstance(item, (dict, list, tuple)):
            return 1 + (len(item) if isinstance(item, (str, bytes)) else 0), 0
        size, height = known.get(id(item), (0, 0))
        if depth + height > _MAX_DEPTH:  # also what holds itself
            raise ValueError("nested too deeply")
        if not size:
            size = 1
            for part in chain(item, item.values()) if isinstance(item, dict) else item:
                inner = measured(part, depth + 1)
                size, height = size + inner[0], max(height, 1 + inner[1])
                if size > most:
                    raise ValueError(f"holds more than {most:,} values and characters")
            known[id(item)] = size, height
        return size, height

    measured(value, 0)


def _parse(content: str | bytes, loader: type[_Loader], source: str) -> Any:
    try:
        return yaml.load(content, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        cause = f"line {mark.line + 1}: {str(error.problem)[:200]}"
    except yaml.YAMLError as error:  # bytes that are not text
        cause = str(error).splitlines()[0]
    except ValueError as error:  # refused by _Loader, with its own fix
        raise UserError(f"{source}: {error}") from None
    except RecursionError:
        cause = "nested too deeply"
    fix = "Only plain YAML in UTF-8 is read; put text with special signs in quotes."
    raise UserError(f"{source}: {cause}. {fix}")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of sections, lists, numbers and text; an empty file gives ``{}``.

    Raises UserError, with the line, for tags (``!!python/...``), duplicate keys and bad syntax,
    for files that are too large for a recipe, and for a missing file with the names of those that
    are there.
    """
    path = Path(path)
    try:
        with open_regular(path, links=True) as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {_suggest_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Name a readable YAML file.") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: larger than {_MAX_BYTES:,} bytes. Name a recipe, a YAML file.")
    values = _parse(content, _Loader, str(path))
    if values is not None and not isinstance(values, dict):
        got = brief(values)
        raise UserError(f"{path}: not a mapping but {got}. Write lines such as `key: value`.")
    return values or {}


def _suggest_file(path: Path) -> str:
    files = {file.stem: str(file) for file in sorted(Path("configs").glob("*.yaml"))}
    files |= {file.stem: str(file) for file in sorted(path.parent.glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, files, n=3)
    if near:
        return f"Did you mean {' or '.join(files[stem] for stem in near)}?"
    return f"Name one of: {', '.join(files.values()) or 'no *.yaml file is near'}."


def parse_value(text: str, source: str = "command line") -> Any:
    """A YAML value of the command line. Raises UserError for text that is none."""
    return _parse(text, _CommandLineLoader, source)


def as_value(text: str) -> str:
    """A text as the command line takes it: as it is, or quoted where YAML would read another value.

    One with characters that YAML has no place for is quoted, too, and `parse_value` refuses it.
    """
    try:
        plain = parse_value(text) == text
    except UserError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def parse_assignments(items: list[str]) -> dict[str, Any]:
    """Turn ``["optim.lr=1e-3", "data.mean=[0, 0, 0]"]`` into a nested dict; later items win.

    Raises UserError for an item that is not ``key=value`` with a YAML value.
    """
    values: dict[str, Any] = {}
    for item in items:
        dotted, equals, text = item.partition("=")
        names = [name.strip() for name in dotted.split(".")]
        if not equals or not all(names):
            raise UserError(
                f"--set {typed(item)}: not section.key=value. Write for example --set "
                "optim.lr=1e-3."
            )
        value = parse_value(text, f"--set {dotted}")
        for name in reversed(names):
            value = {name: value}
        values = merge(values, value)
    return values


# Plain values -> dataclass. Every refusal is a ValueError that starts with the dotted key.


def build(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Make a ``cls`` of plain values, strictly and through nested dataclasses.

    Absent keys take the dataclass's defaults; an empty section is a section of defaults.
    Raises UserError, starting with `source` and the dotted key, for unknown and missing keys,
    wrong types, numbers that are not finite, what a ``__post_init__`` refuses, and values that are
    too large or too deep for settings.
    """
    try:
        check_size(values)
    except ValueError as error:
        few = "Settings are a few sections of plain values: write those only."
        raise UserError(f"{source}: {error}. {few}") from None
    try:
        return _section(cls, values, "", list(_dotted_keys(cls)))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _field_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls if isinstance(cls, type) else type(cls))
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dotted_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in _field_types(cls).items():
        yield prefix + name
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _dotted_keys(part, f"{prefix}{name}.")


def _section(cls: Any, values: Any, key: str, known: list[str]) -> Any:
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise _wrong(key or "config", "a section of `key: value` lines", values)
    prefix = f"{key}." if key else ""
    hints = _field_types(cls)
    for name in values:
        if name not in hints:
            fix = _suggest_key(prefix, name, list(hints), known)
            raise ValueError(f"{prefix}{name[:80]}: unknown key. {fix}")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise ValueError(f"{prefix}{field.name}: missing. Give it a value.")
    arguments = {n: _convert(hints[n], v, prefix + n, known) for n, v in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        names_key = str(error).partition(":")[0] in hints
        raise ValueError(f"{prefix if names_key or not key else key + ': '}{error}") from None


def _suggest_key(prefix: str, name: str, siblings: list[str], known: list[str]) -> str:
    if prefix + name in known:  # a literal `optim.lr:` in a file
        section, _, leaf = name.rpartition(".")
        return f"Nest it: write `{leaf}:` indented under `{section}:`."
    # Of keys with the same last part the one in this section counts, else the first of all.
    keys = {key.rpartition(".")[2]: key for key in reversed(known)}
    keys |= {sibling: prefix + sibling for sibling in siblings}
    near = difflib.get_close_matches(name.lower(), keys, n=1)
    return f"Did you mean {keys[near[0]]}?" if near else f"Keys here: {', '.join(siblings)}."


def _convert(hint: Any, value: Any, key: str, known: list[str]) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, key, known)
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, key, known)
    if origin in (list, tuple):
        return _sequence(hint, value, key, known)
    if origin is Literal:
        return _choice(get_args(hint), value, key)
    if hint in (int, float):
        return _number(hint, value, key)
    if hint not in (str, bool):
        raise TypeError(f"{key}: the annotation {hint} is not supported")
    if isinstance(value, str) and (unusable := _UNUSABLE.search(value)):
        raise ValueError(f"{key}: holds the character {unusable[0]!a}, which no file has. Drop it.")
    if isinstance(value, hint):
        return value
    fix = "Write true or false." if hint is bool else ""
    if hint is str and isinstance(value, (bool, int, float)) and not key.endswith("]"):
        word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        quoted = f'"{word}"'
        fix = f"Put it in quotes ({key}: {quoted}, or --set {typed(f'{key}={quoted}')})."
        fix = fix.replace("it in quotes (", "the word in quotes (e.g. ") if word != value else fix
    raise _wrong(key, _SCALARS[hint], value, fix)


def _union(members: tuple[Any, ...], value: Any, key: str, known: list[str]) -> Any:
    """The first member that accepts the value wins."""
    if value is None and types.NoneType in members:
        return None
    if float in members and isinstance(value, str) and _NUMBER.match(value):
        return _number(float, value, key)  # else `float | str` would keep 1e-3 as text
    errors = []
    for member in members:
        if member is not types.NoneType:
            try:
                return _convert(member, value, key, known)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError(" Or ".join(errors))


def _sequence(hint: Any, value: Any, key: str, known: list[str]) -> Any:
    kind, parts = get_origin(hint), list(get_args(hint))
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, "a list such as [1, 2]", value)
    if kind is list or parts[1:] == [...]:
        parts = parts[:1] * len(value)
    if len(value) != len(parts):
        raise _wrong(key, f"a list of {len(parts)} values", value, f"It has {len(value)}.")
    texts = getattr(value, "texts", ()) or [None] * len(value)
    return kind(
        _convert(part, (part is str and text) or item, f"{key}[{i}]", known)
        for i, (part, item, text) in enumerate(zip(parts, value, texts, strict=True))
    )


def _choice(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    words = _BOOLEAN_WORDS[value] if isinstance(value, bool) else ()
    for accepted in (value, *words):
        for choice in choices:
            if type(accepted) is type(choice) and accepted == choice:
                return choice
    names = [str(choice) for choice in choices]
    shown = brief(value)
    names.sort(key=lambda n: difflib.SequenceMatcher(None, n, shown).ratio(), reverse=True)
    raise _wrong(key, f"one of {', '.join(names)}", value)


def _number(kind: Any, value: Any, key: str) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # also nan
            raise _wrong(key, "a finite number", value)
        if kind is float or isinstance(value, int):
            return kind(value)
    fix = ""
    match = _NUMBER.match(value) if isinstance(value, str) and len(value) <= 40 else None
    if match and kind is float:
        sign, whole, fraction, exponent_sign, exponent = match.groups()
        fix = f"{sign}{whole.lstrip('0') or 0}.{fraction or 0}"
        fix += f"e{exponent_sign or '+'}{exponent}" if exponent else ""
        fix = f"{value} is a string in YAML 1.1: write {fix} (without quotes)."
    elif (match or isinstance(value, float)) and float(value).is_integer():
        fix = f"Write {int(float(value))} (without point, exponent or quotes)."
    raise _wrong(key, _SCALARS[kind], value, fix)


def _wrong(key: str, expected: str, value: Any, fix: str = "") -> ValueError:
    kind = "list" if isinstance(value, list) else type(value).__name__
    got = "nothing (null)" if value is None else f"{brief(value)} ({kind})"
    return ValueError(f"{key}: expected {expected}, got {got}. {fix}".rstrip())


# Combining, comparing, writing


def merge(base: dict[str, Any], *overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dicts into a new one; later values win, sections are merged key by key."""
    merged = dict(base)
    for override in overrides:
        for key, value in override.items():
            old = merged.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                value = merge(old, value)
            merged[key] = value
    return merged


def to_dict(config: Any) -> Any:
    """Reduce a dataclass to dicts, lists, text, numbers, booleans and None; tuples become lists.

    The result passes ``torch.load(weights_only=True)`` and, through `build`, gives an equal config.
    """
    if dataclasses.is_dataclass(config):
        return {name: to_dict(getattr(config, name)) for name in _field_types(config)}
    if isinstance(config, dict):
        if odd := next((key for key in config if not isinstance(key, str)), None):
            raise TypeError(f"the key {brief(odd)} is not text")
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if config is not None and type(config) not in _SCALARS:
        raise TypeError(f"{brief(config)} is not a plain value")
    return config


def saved_settings(values: Any, source: str) -> dict[str, Any]:
    """The plain values of a config that a file brings; UserError for what no recipe could say."""
    try:
        check_size(values)
        settings = to_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: its settings (args) are none of a recipe: {error}. Use another file."
        ) from None
    return settings


def diff(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """List (dotted key, value in `a`, value in `b`) where they differ; an absent key is None."""
    flat_a, flat_b = _flatten(a), _flatten(b)
    rows = [(key, flat_a.get(key), flat_b.get(key)) for key in flat_a | flat_b]
    return [row for row in rows if row[1] != row[2]]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class _Dumper(yaml.SafeDumper):
    """Writes sections as blocks and lists in brackets."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True)
)


def dump_yaml(config: Any, path: str | Path) -> None:
    """Write a dataclass or dict as YAML that `load_yaml` reads back; the file appears whole.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Choose a folder that can be written.") from None
