"""Folders of images and masks at random: every file is in a pair, or counted, or refused by name.

    python tests/soak_inputs.py --count 300
    python tests/soak_inputs.py --count 0 --files 10000        damaged files instead
    python tests/soak_inputs.py --count 1 --seed 7 --keep trial

Every trial makes two folders, one, or a list, with links, sub-folders, names of all kinds, prefixes
and suffixes, other files, masks of other sizes, empty files, and builds the datasets of train.py
and the plan of predict.py on them. A trial is wrong if pairs and what is said to be left out are
not all files that another walk finds, if what was laid in the way is neither said nor refused, if
something is refused that is sound, if a proposed setting does not work, or if it raises another
error or takes more than 20 seconds. Of damaged files every reader gives pixels of the size that the
header says, or names the file. Exit code 1 if there was anything wrong.
"""

import argparse
import io
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from PIL import Image  # noqa: E402
from test_fuzz_loaders import DAMAGES, ENCODED, NAMED, try_damaged  # noqa: E402

import tasks  # noqa: E402
from train_utils.arguments import parse_args  # noqa: E402
from train_utils.data import unwrap_subset  # noqa: E402
from train_utils.errors import UserError  # noqa: E402
from train_utils.listing import (  # noqa: E402
    AGAIN,
    BROKEN,
    HIDDEN,
    OTHER,
    UNREAD,
    VIDEO,
)
from train_utils.log import say_once  # noqa: E402
from train_utils.pairing import UNMATCHED, UNNAMED, UNREAD_MASK  # noqa: E402
from train_utils.prediction_files import plan  # noqa: E402
from train_utils.prepare_data import prepare_datasets  # noqa: E402

SECONDS = 20
FORMATS = {
    **{".jpg": "JPEG", ".JPG": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG"},
    **{".png": "PNG", ".PNG": "PNG", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".webp": "WEBP"},
}
LOSSLESS = [".png", ".PNG", ".bmp", ".gif", ".tif"]
STEMS = [
    *("a", "B", "b.v2", "photo 1", "photo 10", "x,y", "(1)", "日本", "-d", "no$HOME", "100%"),
    *("line\nbreak", "Äpfel", "café", "\udcff\udce9", "it's", "mask", "a_b-c d", "tab\there"),
]
AFFIXES = {  # (prefix and suffix of images, of masks)
    "plain": (("", ""), ("", "")),
    "mask suffix": (("", ""), ("", "_mask")),
    "dash": (("", ""), ("", "-gt")),
    "both": (("", "_leftImg8bit"), ("", "_gtFine_labelIds")),
    "prefix": (("img_", ""), ("seg_", "")),
}
COUNTED = (UNREAD, UNREAD_MASK, BROKEN, HIDDEN, OTHER, VIDEO, UNMATCHED, UNNAMED)


class Wrong(Exception):
    """What is wrong with the outcome of a trial."""


class Tree:
    """A random tree, the arguments to train on it, and what is to be expected of it."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.images, self.masks = root / "in", root / "truth"
        self.scheme = rng.choice(list(AFFIXES))
        if rng.random() < 0.2 and self.scheme != "plain":
            self.masks = self.images  # one folder of both
        elif rng.random() < 0.15:
            self.masks = self.images / "truth"
        self.faults: set[str] = set()  # what must be refused
        self.skipped = self.unequal = 0
        self.pairs: list[tuple[Path, Path]] = []
        self.argv: list[str] = []
        self._make_pairs()
        self._make_links()
        for place in {self.images, self.masks}:
            self._litter(place)

    def _make_pairs(self) -> None:
        rng = self.rng
        deep = ["", "", "day", "day/far", "n ight"]
        stems = rng.sample(STEMS, rng.randrange(3, 9))
        before = [f"{prefix}*{suffix}" for prefix, suffix in AFFIXES[self.scheme]]
        for stem in stems:
            folder, forms = rng.choice(deep), ["NFC", "NFC"]
            if rng.random() < 0.3:
                forms[rng.randrange(2)] = "NFD"
            names = [
                unicodedata.normalize(form, name.replace("*", stem))
                for form, name in zip(forms, before, strict=True)
            ]
            ends = rng.choice(list(FORMATS)), rng.choice(LOSSLESS)
            if self.images == self.masks:  # as both are told apart by their names, not by these
                ends = rng.choice(LOSSLESS), rng.choice(LOSSLESS)
            image, mask = (
                place / folder / (name + end)
                for place, name, end in zip((self.images, self.masks), names, ends, strict=True)
            )
            size = (12, 9)
            if rng.random() < 0.08:
                size, self.unequal = (16, 12), self.unequal + 1
            draw(image, (12, 9), 0)
            draw(mask, size, 255)
            self.pairs.append((image, mask))

    def _make_links(self) -> None:
        """Move some files and folders elsewhere, and put links in their places."""
        rng, store = self.rng, self.root / "store"
        movable = [path for pair in self.pairs for path in pair if rng.random() < 0.15]
        folders = {p.parent for pair in self.pairs for p in pair} - {self.images, self.masks}
        movable += [path for path in sorted(folders) if path.name == "n ight"]
        for number, path in enumerate(movable):
            if path.exists() and not path.is_symlink() and rng.random() < 0.6:
                target = store / str(number) / path.name
                target.parent.mkdir(parents=True)
                path.rename(target)
                far = path.parent in movable or rng.random() < 0.5  # else it moves with its folder
                to = target if far else os.path.relpath(target, path.parent)
                path.symlink_to(to, target_is_directory=target.is_dir())

    def _litter(self, place: Path) -> None:
        rng = self.rng

        def at(*names: str) -> Path:
            inner = [path for path in place.rglob("*") if path.is_dir() and not path.is_symlink()]
            folder = rng.choice([place, *inner])
            return folder / rng.choice(names)

        for kind in rng.sample(
            ["unread", "other", "hidden", "mac", "video", "gone", "loop", "again", "pipe"], 4
        ):
            if rng.random() < 0.5:
                continue
            path = at(f"zz_{kind}{rng.randrange(10**6)}")
            if kind == "unread":
                path.with_name(f"{path.name}{rng.choice(['.HEIC', '.avif', '.cr2'])}").touch()
            elif kind == "other":
                path.with_name(path.name + rng.choice([".txt", "", ".npy", ".jpg.bak"])).touch()
            elif kind == "hidden":
                path.with_name(f".{path.name}.png").touch()
            elif kind == "mac":
                path.with_name(f"._{path.name}.jpg").touch()
                path.with_name(".DS_Store").touch()
            elif kind == "video":
                path.with_name(f"{path.name}.mp4").touch()
            elif kind == "gone":
                path.symlink_to(self.root / "nowhere")
            elif kind == "loop":
                path.symlink_to(rng.choice([".", "..", str(self.root), path.name, str(place)]))
            elif kind == "again":
                path.symlink_to(path.parent, target_is_directory=True)
            elif kind == "pipe":
                os.mkfifo(path)
        if place == self.masks and rng.random() < 0.3:
            before, behind = AFFIXES[self.scheme][1]
            draw(place / f"{before}zz alone{behind}.png", (12, 9), 255)

    def lay_faults(self) -> None:
        """Put something in the way that must be refused, or left out where settings say so."""
        rng = self.rng
        image, mask = rng.choice(self.pairs)
        kind = rng.choice(["", "", "", "", "no mask", "twice", "empty", "empty", "gone", "own"])
        if kind == "no mask":
            mask.unlink()
        elif kind == "twice":
            other = ".png" if image.suffix.lower() != ".png" else ".bmp"
            draw(image.with_name(image.name[: -len(image.suffix)] + other), (12, 9), 0)
        elif kind == "empty":
            image.unlink()
            image.touch()
            if rng.random() < 0.5:
                self.argv += ["--set", "data.skip_unreadable=true"]
                self.skipped += 1
                kind = ""
        elif kind == "gone":
            image.unlink()
            image.symlink_to(rng.choice(["nowhere", image.name]))
        elif kind == "own":
            mask.unlink()
            mask.symlink_to(image)
        self.faults |= {kind} if kind else set()
        how = rng.choice(["refuse", "skip", "resize", "skip"])
        self.argv += ["--set", f"data.unequal={how}"]
        if self.unequal and how == "refuse":
            self.faults.add("unequal")
        # An image that is empty, or whose mask is none, is not compared any more.
        self.may_skip = self.unequal if how == "skip" else 0


def draw(path: Path, size: tuple[int, int], value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("L", size, 0)
    picture.paste(value, (3, 2, 8, 6))
    picture.save(path, FORMATS[path.suffix])


def census(place: Path, apart: Path) -> int:
    """The files of a folder, by another walk than the one that is tried."""
    seen, queue, count = {str(p) for p in place.resolve().parents}, [place], 0
    while queue:
        folder = queue.pop()
        real = os.path.realpath(folder)
        if real in seen or (real == os.path.realpath(apart) and folder != place):
            continue
        seen.add(real)
        for path in folder.iterdir():
            if path.name.startswith("."):
                count += path.suffix == ".png" and not path.name.startswith("._")
            elif path.is_dir():
                queue.append(path)
            else:
                count += 1
    return count


def build(argv: Sequence[str]) -> tuple[list[Any], str]:
    """The datasets that train.py makes, and what it prints."""
    say_once.cache_clear()
    recipe = ["--config", str(REPO / "configs" / "shapes.yaml"), "--set", "data.image_size=16"]
    args = parse_args([*recipe, *argv], flags=tasks.train_flags())
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        task, _, _ = tasks.configure(args)
        _, *sets = prepare_datasets(task, *task.build_datasets())
    return sets, said.getvalue()


def counted(text: str) -> int:
    """How many files a text says to be left out."""
    kinds = "|".join(re.escape(word) for kind in COUNTED for word in kind[:2])
    numbers = re.findall(rf"([\d,]+) (?:{kinds}) \(", text)
    return sum(int(number.replace(",", "")) for number in numbers)


def check(condition: bool, problem: str) -> None:
    if not condition:
        raise Wrong(problem)


def refusal(argv: Sequence[str]) -> str:
    """The line with which train.py refuses the data, which says what to do; "" if it does not."""
    try:
        build(argv)
    except UserError as error:
        text = str(error)
        check(text.isprintable() and text.count(". ") + text.count("; ") > 0, f"unclear: {text}")
        return text
    return ""


def try_pairs(tree: Tree) -> None:
    """Train on the folders of a tree, with settings as the errors propose them."""
    argv = [*tree.argv, "--images", str(tree.images), "--masks", str(tree.masks)]
    if tree.scheme != "plain":
        text = refusal(argv)
        if "twice" in tree.faults:
            check(bool(text), "two files of one name: not refused")
            return
        check("--set data." in text, f"no setting is proposed for {tree.scheme}: {text}")
        if "no mask" in tree.faults:
            return  # then no setting pairs all
        flags = shlex.split(text[text.index("--set data.") :].split(", or ")[0])
        check("data.list=FILE." not in flags, f"no names are proposed for {tree.scheme}: {text}")
        argv += flags
    if tree.faults:
        check(bool(refusal(argv)), f"{tree.faults}: not refused")
        return
    try:
        sets, said = build(argv)
    except UserError as error:
        part_is_gone = tree.may_skip + tree.skipped and "nothing is left" in str(error)
        check(bool(part_is_gone), f"refused: {error}")
        return
    found = len(unwrap_subset(sets[0])[0].pairs)
    check(found == len(tree.pairs), f"{found} pairs of {len(tree.pairs)}")
    files = census(tree.images, tree.masks)
    files += census(tree.masks, tree.images) if tree.masks != tree.images else 0
    total = 2 * found + counted(said)
    check(total == files, f"{total} files in pairs or counted, {files} there: {said}")
    used = sum(map(len, sets))
    check(found - used in range(tree.skipped, tree.skipped + tree.may_skip + 1), f"{used} used")
    check((found == used) == ("left out (data.unequal" not in said and not tree.skipped), said)


def try_list(tree: Tree) -> None:
    """Train on a list of the pairs of a tree."""
    rows = [[os.path.relpath(path, tree.root) for path in pair] for pair in tree.pairs]
    mark, end = tree.rng.choice(["", "\ufeff"]), tree.rng.choice(["\n", "\r\n", "\r"])
    lines = ["# image\tmask", "", *("\t".join(row) for row in rows)]
    text = (mark + end.join(lines)).encode(errors="surrogateescape")
    (tree.root / "pairs.txt").write_bytes(text)
    argv = [*tree.argv, "--set", f"data.list={tree.root / 'pairs.txt'}"]
    broken = any("\n" in name or "\t" in name or "\r" in name for row in rows for name in row)
    if tree.faults - {"twice"} or broken:
        check(bool(refusal(argv)), f"{tree.faults or 'a line break in a name'}: not refused")
        return
    try:
        sets, _ = build(argv)
    except UserError as error:
        check("nothing is left" in str(error), f"refused: {error}")
        return
    found = len(unwrap_subset(sets[0])[0].pairs)
    check(found == len(tree.pairs), f"{found} pairs of {len(tree.pairs)} in the list")


def try_prediction(tree: Tree) -> None:
    """Plan the predictions of all images of a tree."""
    left_out: dict[Any, list[Path]] = {}
    try:
        jobs = plan([str(tree.images)], tree.root / "out", ["map"], left_out=left_out)
    except UserError as error:
        check("would both be written there" in str(error), f"not planned: {error}")
        return
    failing = {BROKEN, UNREAD}
    rest = sum(len(p) for kind, p in left_out.items() if kind != AGAIN and kind not in failing)
    files = census(tree.images, tree.root / "out")
    check(len(jobs) + rest == files, f"{len(jobs)} planned, {rest} left out, {files} there")


def trial(seed: int, root: Path) -> str:
    """What is wrong with the trial of a number; "" for nothing."""
    tree = Tree(root, random.Random(seed))
    tree.lay_faults()

    def hangs(*_: Any) -> None:
        raise Wrong(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        try_pairs(tree)
        try_list(tree)
        try_prediction(tree)
    except Wrong as wrong:
        return f"{wrong} (names: {tree.scheme})"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return ""


def damaged_files(count: int, seed: int) -> int:
    """The number of damaged files, of so many, that a reader did not take or refuse rightly."""
    wrong = 0
    folder = Path(tempfile.mkdtemp())
    warnings.simplefilter("ignore")  # Pillow warns of much that it finds in damaged metadata
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        how = rng.randrange(len(ENCODED)), rng.choice(DAMAGES), rng.getrandbits(32)
        try:
            try_damaged(folder, *how, rng.choice(NAMED))
        except Exception:
            wrong += 1
            print(f"wrong: file {number}: {how}: {traceback.format_exc()}", flush=True)
    shutil.rmtree(folder)
    print(f"done: {count} damaged files, {wrong} wrong")
    return wrong


def main(args: argparse.Namespace) -> int:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    wrong = 0
    for seed in range(args.seed, args.seed + args.count):
        root = Path(args.keep or tempfile.mkdtemp()).absolute()
        if problem := trial(seed, root):
            wrong += 1
            print(f"wrong: trial {seed}: {problem}", flush=True)
        if not args.keep:
            shutil.rmtree(root)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    print(f"done: {args.count} trials, {wrong} wrong")
    return wrong + (damaged_files(args.files, args.seed) if args.files else 0)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--files", type=int, default=0, help="damaged files, after the folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="of one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(1 if main(parsed()) else 0)
