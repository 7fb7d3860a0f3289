"""The datasets: DUTS, any two folders of images and masks, and the embedded shapes.

A sample is an image, a `tv_tensors.Image`, uint8 [3, H, W], and its target, by default a mask, a
`tv_tensors.Mask`, uint8 [1, H, W] in 0…255 (255: the object), after `transforms(image, target)`.
Any other torch Dataset can be trained on as well: see `train_utils.prepare_data.AnyDataset`.

What one task alone needs lies in `tasks/<name>/data.py`.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from train_utils import shapes
from train_utils.data import collate
from train_utils.datasets import (
    JointTransform,
    PairDataset,
    Reader,
    as_tv_tensor,
    found_in,
    split_pairs,
)
from train_utils.errors import UserError
from train_utils.log import say_once
from train_utils.pairing import (
    UNMATCHED,
    Names,
    listed_pairs,
    pair_folders,
    refuse_shared,
)

_SHAPES_CACHE_BYTES = 512 * 2**20


class PairFolderDataset(PairDataset):
    """Images and masks of any two folders, paired by their path in the folder without the suffix.

    `images/city/a.jpg` belongs to `masks/city/a.png`. `names`: what the names of images and masks
    have around the part in common, as in `a_mask.png`. Masks without an image are left out and
    counted in `unmatched_masks`; the log says once what is left out. Raises UserError as
    `train_utils.pairing.pair_folders` does. `read_target` and `at_least`: see `PairDataset`.
    """

    def __init__(
        self,
        images: str | PathLike[str],
        masks: str | PathLike[str],
        transforms: JointTransform | None = None,
        read_target: Reader | None = None,
        at_least: int | None = None,
        names: tuple[Names, Names] | None = None,
    ) -> None:
        found = pair_folders(Path(images), Path(masks), names)
        super().__init__(found.pairs, found.stems, transforms, read_target, at_least)
        self.unmatched_masks = len(found.left_out.get(UNMATCHED, []))
        if found.line:
            say_once(found.line)


class DUTSDataset(PairFolderDataset):
    """DUTS (Wang et al., CVPR 2017), or any set in its layout.

    Below `root`, the training pairs lie in `DUTS-TR/DUTS-TR-Image` and `DUTS-TR/DUTS-TR-Mask`, the
    test pairs likewise with `TE`. Raises UserError if they do not.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        train: bool = True,
        transforms: JointTransform | None = None,
        at_least: int | None = None,
        read_target: Reader | None = None,
        names: tuple[Names, Names] | None = None,
    ) -> None:
        part = "DUTS-TR" if train else "DUTS-TE"
        images, masks = (Path(root, part, f"{part}-{kind}") for kind in ("Image", "Mask"))
        if not (images.is_dir() and masks.is_dir()):
            raise UserError(
                f"{root}: looked for {part}/{part}-Image and {part}/{part}-Mask, "
                f"{found_in(Path(root))}. Give the folder that holds {part}, or your own pairs by "
                "--images DIR --masks DIR."
            )
        super().__init__(images, masks, transforms, read_target, at_least, names)


class ShapesDataset(Dataset):
    """`count` scenes of the embedded data set, drawn on demand, from scene `first` on.

    Ranges that do not overlap share no scene, so one `seed` serves training and validation.
    `fields` names the parts of `shapes.Scene` that make an item, by default image and mask. All but
    scenes with a "mask" are `familiar` ones.

    Scenes never change, so each process (each worker of a loader, too) keeps those it has drawn, in
    at most 512 MiB: 4·size² bytes a scene with a mask, 400 kB at 320×320. What does not fit is
    drawn anew every time. Raises UserError for a size that is too small.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        size: int,
        seed: int,
        count: int,
        first: int = 0,
        transforms: Callable[..., tuple[Tensor, ...]] | None = None,
        fields: Sequence[str] = ("image", "mask"),
    ) -> None:
        if size < shapes.MIN_SIZE:
            raise UserError(f"size {size}: too small for a scene. Use {shapes.MIN_SIZE} or more.")
        self.size, self.seed, self.fields = size, seed, fields
        self.scenes = range(first, first + count)
        self.transforms = transforms
        self._drawn: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        # Clones, so that a transform which works in place leaves the kept scene alone.
        parts = [as_tv_tensor(part.clone()) for part in self._draw(self.scenes[index])]
        return self.transforms(*parts) if self.transforms else tuple(parts)

    def name(self, index: int) -> str:
        """The scene's number and the data set's seed."""
        return f"scene {self.scenes[index]} (seed {self.seed})"

    def _draw(self, number: int) -> tuple[Tensor, ...]:
        if number in self._drawn:
            return self._drawn[number]
        familiar = "mask" not in self.fields
        scene = shapes.render_scene(self.seed, number, self.size, familiar)
        drawn = tuple(getattr(scene, field) for field in self.fields)
        if (len(self._drawn) + 1) * sum(part.nbytes for part in drawn) <= _SHAPES_CACHE_BYTES:
            self._drawn[number] = drawn
        return drawn


def folder_pairs(
    data: Any,
    train: bool,
    transforms: JointTransform | None = None,
    read_target: Reader | None = None,
    all_pairs: bool = False,
    at_least: int | None = None,
) -> Dataset:
    """Training or validation pairs of the folders, or lists, that `data` (a `FolderData`) names.

    Without validation folders or a list of its own, `val_fraction` of the pairs is held out;
    `all_pairs` gives them all.
    """

    def pairs_in(images: str, masks: str, listed: str | None) -> PairDataset:
        if listed:
            pairs = PairDataset(*listed_pairs(Path(listed)), transforms, read_target, at_least)
        else:
            how = transforms, read_target, at_least, data.names
            pairs = PairFolderDataset(images, masks, *how)
        return pairs

    apart = data.val_images or data.val_list
    if data.val_list:
        refuse_shared(Path(data.list), Path(data.val_list))
    if apart and not train:
        return pairs_in(data.val_images, data.val_masks, data.val_list)
    pairs = pairs_in(data.images, data.masks, data.list)
    if all_pairs or apart:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])
