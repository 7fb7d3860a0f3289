"""Samples per second from JPEG and PNG files to batches: the usual way and ours.

    python -m benchmarks.loading
    python -m benchmarks.loading --data-path DUTS --workers 0 4 16 --cache disk --json loading.json

Every pass is over the first --count pairs: resized, cut at random, flipped, and collated to
batches. "share" is that of the ceiling, of decoding both files and nothing else, in one process.
"first" passes fill a new cache, "second" ones read it; both run without workers. Memory is what a
loader process shares with none, after the first and the last of some epochs.
Without --data-path, embedded scenes are written to a temporary folder (TMPDIR) at DUTS' size.
"""

import argparse
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import functional as F

from benchmarks.common import make_parser, positive, quietly, ratio, report, take_turns
from my_dataset import DUTSDataset
from train_utils import shapes
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.datasets import pairs_of
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD
from train_utils.prepare_data import cached
from train_utils.setup import clean_errors
from transforms import SaliencyTrain

CPU = torch.device("cpu")
MEMORY_EPOCHS = 4


class PlainDataset(Dataset):
    """The usual way: resized, cut and flipped by Pillow, then floats, normalised on the host."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], size: int, crop: int) -> None:
        self.pairs, self.size, self.crop = pairs, size, crop

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = self.pairs[index]
        image, mask = Image.open(first).convert("RGB"), Image.open(second).convert("L")
        image, mask = (F.resize(x, [self.size, self.size]) for x in (image, mask))
        top, left = (random.randint(0, self.size - self.crop) for _ in range(2))
        image, mask = (F.crop(x, top, left, self.crop, self.crop) for x in (image, mask))
        if random.random() < 0.5:
            image, mask = F.hflip(image), F.hflip(mask)
        return F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), F.to_tensor(mask)


def write_scenes(root: Path, count: int) -> None:
    """Embedded scenes as DUTS' training part: JPEGs of 400×300 pixels, PNG masks."""
    folders = [root / "DUTS-TR" / f"DUTS-TR-{kind}" for kind in ("Image", "Mask")]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(count):
        scene = shapes.render_scene(0, number, 400)
        image, mask = scene.image[:, 50:350].permute(1, 2, 0), scene.mask[0, 50:350]
        Image.fromarray(image.numpy()).save(folders[0] / f"{number}.jpg", quality=95)
        Image.fromarray(mask.numpy()).save(folders[1] / f"{number}.png")


def decode(pairs: Iterable[tuple[Path, Path]]) -> None:
    for image, mask in pairs:
        Image.open(image).convert("RGB")
        Image.open(mask).convert("L")


def passes(loader: DataLoader) -> Callable[[], None]:
    """One epoch of a loader."""

    def run() -> None:
        for _ in loader:
            pass

    return run


def memory(loader: DataLoader, epochs: int) -> list[float]:
    """MB that the loader's first worker has for itself after every epoch, by Linux' count."""
    sizes = []
    for _ in range(epochs):
        passes(loader)()
        iterator: Any = loader._iterator
        status = Path(f"/proc/{iterator._workers[0].pid}/smaps_rollup").read_text()
        (kilobytes,) = re.findall(r"^Private_Dirty:\s+(\d+)", status, re.M)
        sizes.append(1.024e-3 * int(kilobytes))
    return sizes


class Loaders:
    """Loaders of one folder, plain and ours."""

    def __init__(self, args: Any, root: Path, temporary: Path) -> None:
        self.args, self.root, self.temporary = args, root, temporary
        self.train = (root / "DUTS-TR").is_dir()
        self.pairs = list(pairs_of(self.dataset()))

    def dataset(self) -> Subset:
        transforms = SaliencyTrain(self.args.size, self.args.crop)
        whole = DUTSDataset(self.root, self.train, transforms)
        return Subset(whole, range(min(self.args.count, len(whole))))

    def plain(self, workers: int) -> DataLoader:
        dataset = PlainDataset(self.pairs, self.args.size, self.args.crop)
        return DataLoader(
            dataset,
            self.args.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def ours(self, workers: int, dataset: Dataset | None = None) -> DataLoader:
        sampler = GlobalBatchSampler(len(self.pairs), self.args.batch_size)
        return train_loader(dataset or self.dataset(), sampler, workers, CPU)

    def with_cache(self, kind: str) -> DataLoader:
        """With a cache in memory or in the temporary folder."""
        data = SimpleNamespace(cache=kind, cache_dir=self.temporary / "cache")
        return self.ours(0, cached(data, self.dataset()))


def measure(args: Any, loaders: Loaders) -> list[dict]:
    """The rows of the table."""
    count, rows = len(loaders.pairs), []
    for workers in args.workers:
        ways = {"plain": passes(loaders.plain(workers)), "ours": passes(loaders.ours(workers))}
        if not workers:
            ways["decode"] = lambda: decode(loaders.pairs)
        name = f"{workers} workers" if workers else "one process"
        rows.append(_row(name, take_turns(ways, args.rounds), count))
    plain = passes(loaders.plain(0))
    for kind in args.cache:

        def first(kind: str = kind) -> None:
            loader = loaders.with_cache(kind)
            passes(loader)()
            keyed: Any = loader.dataset
            keyed.dataset.dataset.cache.path.unlink()  # the next one is new, too

        ways = {"plain": plain, "ours": first}
        rows.append(_row(f"{kind} cache, first", take_turns(ways, args.rounds, warmup=0), count))
        ways["ours"] = passes(loaders.with_cache(kind))
        rows.append(_row(f"{kind} cache, second", take_turns(ways, args.rounds), count))
    if max(args.workers) and Path("/proc/self/smaps_rollup").exists():
        sizes = memory(loaders.ours(1), MEMORY_EPOCHS)
        rows.append({"work": "a worker", "epoch 1 MB": sizes[0], "last epoch MB": sizes[-1]})
    return rows


def _row(work: str, times: dict[str, list[float]], count: int) -> dict:
    times = {name: [value / count for value in values] for name, values in times.items()}
    rate = {name: sorted(1 / t for t in values)[len(values) // 2] for name, values in times.items()}
    row: dict[str, Any] = {"work": work, "plain /s": rate["plain"], "ours /s": rate["ours"]}
    row["ratio"] = ratio(times, "ours")
    if "decode" in times:
        row |= {"decode /s": rate["decode"], "share": 1 / ratio(times, "decode", "ours")}
    return row


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    add = parser.add_argument
    add("--data-path", type=Path, metavar="DIR", help="holds DUTS-TR or DUTS-TE")
    add("--count", type=positive, default=80, help="pairs of a pass")
    add("--size", type=positive, default=320)
    add("--crop", type=positive, default=288)
    add("-b", "--batch-size", type=positive, default=8)
    add("--workers", type=int, nargs="+", default=[0, 1, 2])
    add("--cache", nargs="*", choices=("ram", "disk"), default=["ram", "disk"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in loader processes
    try:
        with tempfile.TemporaryDirectory() as folder, quietly():
            root = args.data_path or Path(folder, "scenes")
            if not args.data_path:
                write_scenes(root, args.count)
            report(args, measure(args, Loaders(args, root, Path(folder))))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    with clean_errors():
        main()
