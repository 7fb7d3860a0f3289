"""Joint transforms of image and mask, uint8 in and uint8 out.

Pixels stay 8-bit until they are on the device, where `train_utils.normalize` makes network input of
them. All randomness is drawn from torch's default generator; a transform keeps no state.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train_utils.datasets import IGNORE, TwoParts
from train_utils.errors import UserError

BACKGROUND, UNKNOWN, FOREGROUND = 0, 128, 255  # the values of a trimap


def predict_input(image: Tensor, image_size: int) -> Tensor:
    """Resize an image, uint8 [3, H, W], to the square that the network sees, [3, S, S].

    Bilinear with antialiasing, the aspect ratio not kept. Training, evaluation and prediction all
    prepare their images by this one function.
    """
    return F.resize(image, [image_size, image_size], antialias=True)


class SaliencyTrain(TwoParts):
    """The U²-Net recipe: resize to a square, crop at random, flip with probability `hflip`.

    Takes an image [3, H, W] and a mask [1, H, W] of the same size, both uint8; gives both in
    `crop_size` × `crop_size`. Raises UserError if the crop is larger than the resized image.
    """

    def __init__(self, image_size: int = 320, crop_size: int = 288, hflip: float = 0.5) -> None:
        _require_room(crop_size, image_size)
        self.image_size, self.crop_size, self.hflip = image_size, crop_size, hflip

    def prepare(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both in `image_size` × `image_size`.

        The mask is resized as its image is, bilinearly with antialiasing: it is a quantity, not a
        label. Along edges it becomes grey, the share of the new pixel that is salient, which is the
        very value that cross-entropy teaches. torchvision resizes a `Mask` by nearest neighbour,
        which suits labels but shifts edges and breaks thin parts.
        """
        image, mask = image.as_subclass(Tensor), mask.as_subclass(Tensor)
        if (both := _beside(image, mask)) is None:
            return predict_input(image, self.image_size), predict_input(mask, self.image_size)
        both = predict_input(both, self.image_size)
        return both[:3], both[3:]

    def augment(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The random part, of what `prepare` gives."""
        image, mask = _crop_and_flip((image, mask), self.image_size, self.crop_size, self.hflip)
        return super().augment(image, mask)

    def preparation(self) -> str:
        return f"resize to {self.image_size}"


class SaliencyEval(TwoParts):
    """Resize the image only; the mask keeps its own size and values, at which it is scored."""

    def __init__(self, image_size: int = 320) -> None:
        self.image_size = image_size

    def prepare(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return predict_input(image, self.image_size), mask

    def preparation(self) -> str:
        return f"resize image to {self.image_size}"


def _require_room(crop: int, side: int) -> None:
    if not 1 <= crop <= side:
        raise UserError(
            f"crops of {crop} pixels do not fit into images of {side}. Use 1 to {side} pixels."
        )


def _crop_and_flip(
    planes: Sequence[Tensor], side: int, crop: int, hflip: float
) -> Iterator[Tensor]:
    """The same random window of [C, side, side] planes, mirrored with probability `hflip`."""
    # Every call draws the same three numbers, whatever their values lead to.
    top, left = torch.randint(side - crop + 1, (2,)).tolist()
    flip = torch.rand(()).item() < hflip
    for plane in planes:
        window = plane[:, top : top + crop, left : left + crop]
        if plane.stride(-1) > len(plane):  # beside another
            yield _by_pixels(window, flip)
        else:
            yield window.flip(-1) if flip else window


def _beside(image: Tensor, mask: Tensor) -> Tensor | None:
    """Image and mask as one tensor [4, H, W], without a copy; None unless they lie that way."""
    height, width = image.shape[-2:]
    strides = (1, 4 * width, 4)
    if (
        len(image) != 3
        or mask.shape != (1, height, width)
        or not image.stride() == mask.stride() == strides
        or mask.data_ptr() != image.data_ptr() + 3
        or mask.untyped_storage().data_ptr() != image.untyped_storage().data_ptr()
    ):
        return None
    return image.as_strided((4, height, width), strides)


def _by_pixels(window: Tensor, flip: bool) -> Tensor:
    """A copy of [C, H, W], mirrored by `flip`, whose memory holds C values per pixel, not more."""
    source = window.numpy()[..., :: -1 if flip else 1]
    pixels = np.empty((*source.shape[1:], len(source)), source.dtype)
    for channel, plane in enumerate(source):  # far quicker than a few bytes at a time
        pixels[..., channel] = plane
    return torch.from_numpy(pixels).permute(2, 0, 1)


# --- image translation --------------------------------------------------------------------------


class TranslationTrain(TwoParts):
    """The jitter of pix2pix: resize both to `load_size`, crop at random, flip with `hflip`.

    Isola et al., CVPR 2017, appendix 6.2. Takes the images A and B of a pair, uint8 [3, H, W] of
    one size; gives (source, target) by `direction`, both `image_size` × `image_size`. Raises
    UserError if the crop is larger than the resized images.
    """

    def __init__(
        self,
        image_size: int = 256,
        load_size: int = 286,
        hflip: float = 0.5,
        direction: str = "AtoB",
    ) -> None:
        _require_room(image_size, load_size)
        self.image_size, self.load_size, self.hflip = image_size, load_size, hflip
        self.direction = direction

    def prepare(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(source, target), both `load_size` × `load_size`."""
        source, target = _directed(a, b, self.direction)
        source, target = source.as_subclass(Tensor), target.as_subclass(Tensor)
        return predict_input(source, self.load_size), predict_input(target, self.load_size)

    def augment(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The random part, of what `prepare` gives."""
        source, target = _crop_and_flip(
            (source, target), self.load_size, self.image_size, self.hflip
        )
        return super().augment(source, target)

    def preparation(self) -> str:
        return f"{self.direction}, resize to {self.load_size}"


class TranslationEval(TwoParts):
    """(source, target) of a pair A, B: the source resized, the target at its own size."""

    def __init__(self, image_size: int = 256, direction: str = "AtoB") -> None:
        self.image_size, self.direction = image_size, direction

    def prepare(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        source, target = _directed(a, b, self.direction)
        return predict_input(source, self.image_size), target

    def preparation(self) -> str:
        return f"{self.direction}, resize source to {self.image_size}"


def _directed(a: Tensor, b: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    return (a, b) if direction == "AtoB" else (b, a)


# --- image matting ------------------------------------------------------------------------------


def make_trimap(alpha: Tensor, erode: int, dilate: int) -> Tensor:
    """The trimap that an alpha matte, uint8 [1, H, W], implies; of the same shape.

    FOREGROUND where alpha is 255 within `erode` pixels, BACKGROUND where it is 0 within `dilate`
    pixels, UNKNOWN between. Distances are those of a square element of side 2·radius + 1; what lies
    beyond the border is taken to agree.
    """
    not_opaque = _dilate(alpha < 255, erode)
    not_clear = _dilate(alpha > 0, dilate)
    trimap = torch.full_like(alpha, UNKNOWN)
    return trimap.masked_fill_(~not_opaque, FOREGROUND).masked_fill_(~not_clear, BACKGROUND)


def composite(foreground: Tensor, background: Tensor, alpha: Tensor) -> Tensor:
    """(alpha · F + (255 − alpha) · B + 127) // 255 in integers, as in `shapes.Scene`; all uint8."""
    foreground, background, alpha = (x.int() for x in (foreground, background, alpha))
    return ((alpha * (foreground - background) + 255 * background + 127) // 255).to(torch.uint8)


def cover(image: Tensor, size: Sequence[int], place: Sequence[float] = (0.5, 0.5)) -> Tensor:
    """A window of `size` = (H, W) of an image that is first enlarged where it does not cover it.

    The aspect ratio is kept. `place`: where the window lies, from 0 (top, left) to 1.
    """
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    if scale > 1:
        height, width = max(size[0], round(scale * height)), max(size[1], round(scale * width))
        image = F.resize(image, [height, width], antialias=True)
    top, left = (
        round(share * (length - wanted))
        for share, length, wanted in zip(place, (height, width), size, strict=True)
    )
    return F.crop(image, top, left, *size)


def matting_input(image: Tensor, trimap: Tensor, eval_size: int | None = None) -> Tensor:
    """What the network sees of an image [3, H, W] and its trimap [1, H, W]: uint8 [4, h, w].

    Whole; if the longer side has more than `eval_size` pixels, both are scaled down to that, the
    trimap by nearest neighbour, so that it keeps its three values. Evaluation and prediction both
    prepare their images by this one function.
    """
    image, trimap = image.as_subclass(Tensor), trimap.as_subclass(Tensor)
    sides = image.shape[-2:]
    if eval_size and max(sides) > eval_size:
        size = [max(1, round(side * eval_size / max(sides))) for side in sides]
        image = F.resize(image, size, antialias=True)
        trimap = F.resize(trimap, size, interpolation=F.InterpolationMode.NEAREST_EXACT)
    return torch.cat([image, trimap])


class MattingTrain:
    """The recipe of Deep Image Matting (Xu et al., CVPR 2017, section 4.1).

    A square of one of `crop_sizes` is cut out around a random unknown pixel, resized to
    `image_size`, flipped with probability `hflip`, and its colours are changed. Where the square
    leaves the picture, the picture is mirrored: a plain filling would end its objects there.
    Trimaps are made from alpha by two random radii from 1 to `max_radius`, one to choose the place
    and one of the result.

    Takes an image [3, H, W] and its alpha [1, H, W] and gives (input [4, S, S], target [2, S, S]):
    RGB and trimap, alpha and trimap. With a background of the same size, the image is the
    foreground; the colours of both are changed alike, the result is their composite, and
    foreground and background [3, S, S] follow it. Everything is uint8.

    jitter: largest relative change of brightness, contrast and saturation, and of the hue in turns.
    """

    def __init__(
        self,
        image_size: int = 320,
        crop_sizes: Sequence[int] = (320, 480, 640),
        max_radius: int = 25,
        hflip: float = 0.5,
        jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
    ) -> None:
        self.image_size, self.crop_sizes, self.max_radius = image_size, crop_sizes, max_radius
        self.hflip, self.jitter = hflip, jitter

    def __call__(
        self, image: Tensor, alpha: Tensor, background: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        # Every call draws the same nine numbers, whatever their values lead to.
        radii = torch.randint(1, self.max_radius + 1, (2,)).tolist()
        side = self.crop_sizes[int(torch.randint(len(self.crop_sizes), ()))]
        place, flip, *changes = torch.rand(6, dtype=torch.float64).tolist()

        row, column = _unknown_pixel(make_trimap(alpha.as_subclass(Tensor), *radii), place)
        planes = [image, alpha] if background is None else [image, alpha, background]
        planes = [
            self._square(plane.as_subclass(Tensor), row, column, side, flip < self.hflip)
            for plane in planes
        ]
        alpha = planes.pop(1)
        trimap = make_trimap(alpha, *radii)
        colours = [self._changed(plane, changes) for plane in planes]
        image = colours[0] if background is None else composite(colours[0], colours[1], alpha)
        pair = torch.cat([image, trimap]), torch.cat([alpha, trimap])
        return pair if background is None else (*pair, *colours)

    def _square(self, plane: Tensor, row: int, column: int, side: int, flip: bool) -> Tensor:
        pixels = plane.permute(1, 2, 0)
        for dim, centre in enumerate((row, column)):
            start, length = centre - side // 2, pixels.shape[dim]
            if 0 <= start <= length - side:
                pixels = pixels.narrow(dim, start, side)
            else:
                pixels = pixels.index_select(dim, _mirrored(torch.arange(side) + start, length))
        plane = pixels.contiguous().permute(2, 0, 1)
        plane = F.resize(plane, [self.image_size, self.image_size], antialias=True)
        return plane.flip(-1) if flip else plane

    def _changed(self, image: Tensor, shares: Sequence[float]) -> Tensor:
        """Colours changed by `shares` in [0, 1) of the way from the least to the largest change."""
        adjustments = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for adjust, most, share in zip(adjustments, self.jitter, shares, strict=True):
            if most:  # even the neutral change of hue rounds
                change = most * (2 * share - 1)
                image = adjust(image, change if adjust is F.adjust_hue else 1 + change)
        return image


class MattingEval:
    """The whole image for the network, and a target at its own size, at which alpha is scored.

    Takes an image [3, H, W], or a foreground with the background to be composited on, and a target:
    alpha [1, H, W], or alpha and trimap [2, H, W]. Gives (`matting_input`, alpha and trimap); a
    trimap that is not given is made from alpha by `radius`. Everything is uint8.
    """

    def __init__(self, eval_size: int | None = None, radius: int = 10) -> None:
        self.eval_size, self.radius = eval_size, radius

    def __call__(
        self, image: Tensor, target: Tensor, background: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        target = target.as_subclass(Tensor)
        alpha, trimap = target[:1], target[1:]
        if not len(trimap):
            trimap = make_trimap(alpha, self.radius, self.radius)
        if background is not None:
            image = composite(image, background, alpha)
        return matting_input(image, trimap, self.eval_size), torch.cat([alpha, trimap])


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Dilate a mask, bool [1, H, W], by a square of side 2·radius + 1."""
    for _ in range(2):
        mask = _any_in_window(mask, radius).mT
    return mask


def _any_in_window(mask: Tensor, radius: int) -> Tensor:
    """Whether any of the 2·radius + 1 values around each along the last dimension is true.

    Windows of twice the width are made of two windows, so the cost grows as the radius' logarithm:
    max-pooling of a 2-megapixel image by a radius of 25 takes fifty times as long.
    """
    length, window, width = mask.shape[-1], 2 * radius + 1, 1
    mask = torch.nn.functional.pad(mask, (radius, radius))
    while 2 * width <= window:
        mask = mask[..., :-width] | mask[..., width:]
        width *= 2
    rest = window - width
    return mask[..., :length] | mask[..., rest : rest + length]


def _mirrored(positions: Tensor, length: int) -> Tensor:
    """Positions on a line that goes on for ever as mirror images of its part from 0 to `length`."""
    positions = positions % (2 * length)
    return torch.minimum(positions, 2 * length - 1 - positions)


def _unknown_pixel(trimap: Tensor, place: float) -> tuple[int, int]:
    """Row and column of the unknown pixel `place` in [0, 1) of the way through; of any, if none."""
    unknown = (trimap.flatten() == UNKNOWN).nonzero()
    if len(unknown):
        index = int(unknown[int(place * len(unknown))])
    else:
        index = int(place * trimap.numel())
    return divmod(index, trimap.shape[-1])


# --- segmentation -------------------------------------------------------------------------------
#
# fit: how an image of any size becomes the square that the network sees. "letterbox" keeps the
# aspect ratio and centres the image on grey; "stretch" does not keep it, and needs no grey.

_GREY = 128


def letterbox_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image of height × width that is centred in a square.

    The longer side takes all of `size` pixels, the other its share, at least 1 pixel.
    """
    longer = max(height, width)
    h, w = (max(1, round(side * size / longer)) for side in (height, width))
    return (size - h) // 2, (size - w) // 2, h, w


def segmentation_input(
    image: Tensor, size: int, fit: str, sides: Sequence[int] | None = None
) -> Tensor:
    """An image, uint8 [3, H, W], as the square that the network sees, [3, size, size].

    Bilinear with antialiasing. `sides`: height and width of the file, if the image was decoded at a
    reduced size. Evaluation and prediction both prepare their images by this function.
    """
    if fit == "stretch":
        return predict_input(image, size)
    height, width = sides or image.shape[-2:]
    top, left, h, w = letterbox_box(height, width, size)
    return _pad_to_square(F.resize(image, [h, w], antialias=True), top, left, size, _GREY)


def restore_logits(logits: Tensor, size: Sequence[int], fit: str) -> Tensor:
    """Logits [C, S, S] of a `segmentation_input` at the image's own size (H, W): [C, H, W].

    Cuts off the letterbox's grey and resizes bilinearly, in fp32 or more. Metrics and predict.py
    both finish their predictions by this function.
    """
    logits = logits.contiguous()  # channels-last ones are resized by kernels with other last bits
    if fit == "letterbox":
        top, left, h, w = letterbox_box(size[0], size[1], logits.shape[-1])
        logits = logits[:, top : top + h, left : left + w]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]


class SegmentationEval:
    """Fit the image to the network's square; the mask keeps its own size, at which it is scored."""

    def __init__(self, size: int, fit: str) -> None:
        self.size, self.fit = size, fit

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return segmentation_input(image, self.size, self.fit, mask.shape[-2:]), mask


class SegmentationTrain:
    """Random shape, size and place on a grey square, flip and colours; image and mask move as one.

    Takes an image [3, H, W] and a mask of class indices [1, H, W], both uint8; gives both in size ×
    size. The mask is resized by nearest neighbour, and is `IGNORE` where the image is grey padding.

    scale: range of the image's longer side, as a share of `size`; what is larger is cut at random.
    aspect: the aspect ratio is multiplied by a/b, both drawn from 1 ± aspect. hsv: how much of a
    turn the hue may shift either way, and how far the factors of saturation and value may be from
    1. With scale (1, 1) and aspect 0 the geometry is that of evaluation, nothing is placed at
    random.
    """

    def __init__(
        self,
        size: int,
        fit: str,
        scale: Sequence[float] = (0.25, 2.0),
        aspect: float = 0.3,
        hflip: float = 0.5,
        hsv: Sequence[float] = (0.1, 0.7, 0.3),
    ) -> None:
        self.size, self.fit, self.hflip = size, fit, hflip
        self.scale, self.aspect, self.hsv = scale, aspect, hsv

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Every call draws the same nine numbers, whatever their values lead to.
        *place, flip, hue, saturation, value = torch.rand(9).tolist()
        top, left, h, w = self._box(mask.shape[-2], mask.shape[-1], *place)
        picture = F.resize(image.as_subclass(Tensor), [h, w], antialias=True)
        # Not as a tv_tensors.Mask, which torchvision resizes by a "nearest" that lies half a pixel
        # off the image.
        labels = F.resize(mask.as_subclass(Tensor), [h, w], F.InterpolationMode.NEAREST_EXACT)
        rows = slice(max(0, -top), self.size - top)
        columns = slice(max(0, -left), self.size - left)
        picture, labels = picture[..., rows, columns], labels[..., rows, columns]
        if any(self.hsv):
            shifts = (2 * u - 1 for u in (hue, saturation, value))
            turn, s, v = (limit * shift for limit, shift in zip(self.hsv, shifts, strict=True))
            picture = _jitter_hsv(picture, turn, 1 + s, 1 + v)
        corner = max(0, top), max(0, left)
        picture = _pad_to_square(picture, *corner, self.size, _GREY)
        labels = _pad_to_square(labels, *corner, self.size, IGNORE)
        if flip < self.hflip:
            picture, labels = picture.flip(-1), labels.flip(-1)
        return tv_tensors.Image(picture), tv_tensors.Mask(labels)

    def _box(
        self, height: int, width: int, a: float, b: float, scale: float, y: float, x: float
    ) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the image in the square, from five numbers in [0, 1)."""
        size, (low, high) = self.size, self.scale
        if low == high == 1 and self.aspect == 0:
            stretch = self.fit == "stretch"
            return (0, 0, size, size) if stretch else letterbox_box(height, width, size)
        ratio = 1.0 if self.fit == "stretch" else width / height
        ratio *= (1 + self.aspect * (2 * a - 1)) / (1 + self.aspect * (2 * b - 1))
        side = size * (low + (high - low) * scale)
        h = max(1, round(side * min(1, 1 / ratio)))
        w = max(1, round(side * min(1, ratio)))
        return _offset(size - h, y), _offset(size - w, x), h, w


def _offset(room: int, u: float) -> int:
    """A place from 0 to `room`, which is negative for what sticks out; u is uniform in [0, 1)."""
    return min(0, room) + int(u * (abs(room) + 1))


def _pad_to_square(picture: Tensor, top: int, left: int, size: int, fill: int) -> Tensor:
    h, w = picture.shape[-2:]
    return F.pad(picture, [left, top, size - w - left, size - h - top], fill=fill)


def _jitter_hsv(image: Tensor, turn: float, saturation: float, value: float) -> Tensor:
    """Shift the hue by `turn` (1: once around) and multiply saturation and value; uint8 [3, H, W].

    The hexcone model of Smith, "Color Gamut Transform Pairs", SIGGRAPH 1978.
    """
    red, green, blue = image.contiguous().float()  # one channel after the other
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = highest - lowest
    # In sixths of a turn: 0 red, 2 green, 4 blue. Integers differ by 1 at least, if they differ.
    hue = torch.where(highest == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = torch.where(highest == red, green - blue, hue) / chroma.clamp(min=1) + 6 * turn
    new_highest = (highest * value).clamp_(max=255)
    new_chroma = new_highest * (saturation * chroma / highest.clamp(min=1)).clamp_(max=1)
    # A channel is full within a sixth of its own hue, and empty from two sixths on. Red's hue is 0.
    share = (hue + torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1)).remainder_(6)
    share = share.sub_(3).abs_().sub_(1).clamp_(0, 1)
    return share.mul_(new_chroma).add_(new_highest - new_chroma).round_().byte()
