"""The embedded data set: exact, repeatable, never empty, and not solved by a threshold."""

import dataclasses
import hashlib
import math
import random

import numpy as np
import pytest
import torch
from distributed import on_ranks

from train_utils import shapes
from train_utils.shapes import CLASS_NAMES, Scene, class_palette, render_scene

SCENES = 200


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(0, index, 64) for index in range(SCENES)]


def stacked(scenes: list[Scene], name: str) -> torch.Tensor:
    return torch.stack([getattr(scene, name) for scene in scenes])


def digest(scene: Scene) -> str:
    """One hash of all bytes of a scene, in the order of its fields."""
    sha = hashlib.sha256()
    for field in dataclasses.fields(scene):
        sha.update(getattr(scene, field.name).numpy().tobytes())
    return sha.hexdigest()


# --- repeatable -----------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_seed_index_and_size():
    assert digest(render_scene(3, 5, 40)) == digest(render_scene(3, 5, 40))


def test_every_seed_and_index_gives_another_scene():
    # (1, 23), (12, 3) and (123, 0) read alike if the key joins the numbers without a separator.
    keys = [(0, 0), (0, 1), (1, 0), (1, 23), (12, 3), (123, 0), (0, 2**32), (-1, 0)]
    assert len({digest(render_scene(seed, index, 16)) for seed, index in keys}) == len(keys)


def test_the_bytes_of_the_data_set_are_frozen():
    """Every figure ever reported on this data set depends on them."""
    expected = {
        (0, 0, 64): "80168e9bbdd5083a241ad9377d5769dc20f6e907cc059b3985a806cf83e23abf",
        (7, 123456, 96): "5a4e94e648115ce20e90be3d839637464313dce942e7827eb326663f0fd72afc",
    }
    assert {key: digest(render_scene(*key)) for key in expected} == expected


def test_the_number_of_threads_changes_no_byte():
    # From 32,768 elements on torch splits most work over threads; 185² is more, and odd.
    threads = torch.get_num_threads()
    digests = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            digests.append(digest(render_scene(0, 1, 185)))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def digests_of_a_seed():
    return [digest(render_scene(5, index, 50)) for index in range(6)]


@pytest.mark.slow
def test_another_process_draws_the_same_bytes():
    assert on_ranks(1, digests_of_a_seed) == [digests_of_a_seed()]


def test_the_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    first = digest(render_scene(0, 9, 32))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(2)
    assert digest(render_scene(0, 9, 32)) == first


def test_the_default_dtype_changes_no_byte():
    expected = digest(render_scene(0, 2, 32))
    torch.set_default_dtype(torch.float64)
    try:
        assert digest(render_scene(0, 2, 32)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 97, 256])
def test_every_size_gives_all_tensors_in_bytes(size: int):
    scene = render_scene(0, 4, size)
    for field in dataclasses.fields(scene):
        channels = 1 if field.name in ("mask", "classes", "alpha") else 3
        tensor = getattr(scene, field.name)
        assert tensor.dtype == torch.uint8, field.name
        assert tensor.shape == (channels, size, size), field.name
        assert tensor.is_contiguous(), field.name


@pytest.mark.parametrize("size", [15, 0, -3])
def test_too_small_a_size_is_refused(size: int):
    with pytest.raises(ValueError, match=f"size {size}: .* at least 16"):
        render_scene(0, 0, size)


def test_the_composition_does_not_depend_on_the_size():
    overlaps, agreements = [], []
    for index in range(8):
        small, large = render_scene(2, index, 64), render_scene(2, index, 256)
        # The mean of 4 × 4 masks is above ½ where the small pixel's centre lies inside.
        reduced = torch.nn.functional.avg_pool2d(large.mask.float() / 255, 4) > 0.5
        inside = small.mask > 0
        overlaps.append((reduced & inside).sum() / (reduced | inside).sum())
        same = small.classes[:, inside[0]] == large.classes[:, 2::4, 2::4][:, inside[0]]
        agreements.append(same.float().mean())
    assert min(overlaps) > 0.85
    assert min(agreements) > 0.9


# --- the truths agree with each other -------------------------------------------------------------


def test_the_image_is_the_composite_of_its_layers(scenes: list[Scene]):
    for scene in scenes[:50]:
        alpha, front, back = (t.int() for t in (scene.alpha, scene.foreground, scene.background))
        composite = (alpha * front + (255 - alpha) * back + 127) // 255
        assert torch.equal(scene.image.int(), composite)


def test_composite_of_hand_computed_pixels():
    """128·200 + 127·100 = 38,300 = 150.2·255; 1·255 rounds to 1; 127·1 = 0.498·255 rounds to 0."""
    front = torch.tensor([200, 255, 1, 9, 9], dtype=torch.uint8)
    back = torch.tensor([100, 0, 0, 4, 4], dtype=torch.uint8)
    alpha = torch.tensor([128, 1, 127, 0, 255], dtype=torch.uint8)
    assert shapes._composite(front, back, alpha).tolist() == [150, 1, 0, 4, 9]


def test_the_mask_is_alpha_from_128_on(scenes: list[Scene]):
    assert torch.equal(stacked(scenes, "mask"), (stacked(scenes, "alpha") >= 128).byte() * 255)


def test_classes_and_labels_cover_exactly_the_mask(scenes: list[Scene]):
    classes, salient = stacked(scenes, "classes"), stacked(scenes, "mask") == 255
    assert classes.max() < len(CLASS_NAMES)
    assert torch.equal(classes > 0, salient)

    labels = stacked(scenes, "labels").permute(0, 2, 3, 1)
    shape = salient[:, 0]
    assert torch.equal(labels[shape], class_palette()[classes[:, 0][shape].long()])
    colours_of_shapes = {tuple(colour) for colour in class_palette()[1:].tolist()}
    elsewhere = {tuple(colour) for colour in labels[~shape].unique(dim=0).tolist()}
    assert len(elsewhere) == 4  # two grounds, strokes, small shapes
    assert not elsewhere & colours_of_shapes


def test_the_palette_has_a_colour_of_its_own_for_each_class():
    palette = class_palette()
    assert palette.dtype == torch.uint8
    assert palette.shape == (len(CLASS_NAMES), 3)
    assert len(palette.unique(dim=0)) == len(CLASS_NAMES)
    assert palette[0].tolist() == [0, 0, 0]


def test_every_class_is_common(scenes: list[Scene]):
    classes = stacked(scenes, "classes").flatten(1)
    for index, name in enumerate(CLASS_NAMES):
        assert (classes == index).any(1).float().mean() > 0.2, name


# --- worth learning, possible to learn ------------------------------------------------------------


def test_the_salient_area_is_sane(scenes: list[Scene]):
    area = (stacked(scenes, "mask") > 0).float().mean((1, 2, 3))
    assert area.min() > 0.02
    assert area.max() < 0.6
    assert 0.15 < area.mean() < 0.3


def test_alpha_has_an_unknown_band_in_every_scene(scenes: list[Scene]):
    alpha = stacked(scenes, "alpha").flatten(1)
    unknown = ((alpha > 0) & (alpha < 255)).float().mean(1)
    assert unknown.min() > 0.01
    assert unknown.median() > 0.05  # more than anti-aliasing: soft, hairy and glassy finishes
    assert ((alpha == 0).float().mean(1) > 0.2).all()
    assert (alpha == 255).any(1).float().mean() > 0.8  # the others show glassy shapes only


def test_the_foreground_goes_on_beyond_the_shapes(scenes: list[Scene]):
    foreground, clear = stacked(scenes, "foreground").float(), stacked(scenes, "alpha") == 0
    outside = torch.stack([f[:, c[0]].mean() for f, c in zip(foreground, clear, strict=True)])
    inside = torch.stack([f[:, ~c[0]].mean() for f, c in zip(foreground, clear, strict=True)])
    assert (outside / inside).median() == pytest.approx(1, abs=0.15)
    assert (outside > 20).all()


def max_f1(saliency: torch.Tensor, mask: torch.Tensor) -> float:
    """maxF1 (β² = 0.3) of saliency in 0…1 against a bool mask, both [N, S, S], over 256 thresholds.

    Precision and recall are averaged over the images first, as the project's metric does.
    """
    bins = (saliency.clamp(0, 1) * 255).byte().numpy()
    precision, recall = np.zeros(256), np.zeros(256)
    for image, truth in zip(bins, mask.numpy(), strict=True):
        hit, false = (
            np.bincount(image[pixels], minlength=256)[::-1].cumsum() for pixels in (truth, ~truth)
        )
        precision += hit / (hit + false + 1e-4) / len(bins)
        recall += hit / truth.sum() / len(bins)
    return (1.3 * precision * recall / (0.3 * precision + recall + 1e-8)).max()


def test_no_threshold_on_a_colour_channel_finds_the_shapes(scenes: list[Scene]):
    """To call everything salient scores 0.25 on these scenes."""
    image, mask = stacked(scenes, "image").float() / 255, stacked(scenes, "mask")[:, 0] > 0
    high, low = image.amax(1), image.amin(1)
    channels = {
        "red": image[:, 0],
        "green": image[:, 1],
        "blue": image[:, 2],
        "brightness": image.mean(1),
        "value": high,
        "chroma": high - low,
        "saturation": (high - low) / (high + 1e-6),
    }
    for name, channel in channels.items():
        assert max_f1(channel, mask) < 0.45, name
        assert max_f1(1 - channel, mask) < 0.45, name


def test_the_distance_from_the_colour_of_the_border_is_not_enough(scenes: list[Scene]):
    """The classic guess, salient is what differs from the frame's border, image by image."""
    image, mask = stacked(scenes, "image").float() / 255, stacked(scenes, "mask")[:, 0] > 0
    border = torch.ones(64, 64, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    colour = image[:, :, border].mean(2)[..., None, None]
    assert max_f1((image - colour).norm(dim=1), mask) < 0.7


# --- outlines -------------------------------------------------------------------------------------

ON_THE_OUTLINE = {
    "disc": [(1, 0), (0, -1), (0.6, 0.8)],
    # (r² − 0.8²) / 1.6 = ±0.25: r² = 1.04 and 0.24
    "ring": [(math.sqrt(1.04), 0), (0, -math.sqrt(0.24))],
    "square": [(0.85, 0.3), (-0.85, -0.85)],
    "triangle": [(0, 1.4), (0.5, -0.7), (1.4 * math.sqrt(0.75), -0.7)],
    # Tips at radius 1.3 and notches at 0.6, in turn every 36 degrees.
    "star": [
        (radius * math.sin(math.radians(36 * k)), radius * math.cos(math.radians(36 * k)))
        for k, radius in enumerate([1.3, 0.6] * 5)
    ],
}


@pytest.mark.parametrize("kind", CLASS_NAMES[1:])
def test_outlines_are_where_they_should_be(kind: str):
    u, v = torch.tensor(ON_THE_OUTLINE[kind], dtype=torch.float32).T
    outline = shapes._OUTLINES[kind]
    torch.testing.assert_close(outline(u, v), torch.zeros(len(u)), atol=1e-6, rtol=0)
    angle = torch.arange(720) * (math.pi / 360)
    far = shapes._OUTER_RADIUS * 1.001
    assert (outline(far * angle.cos(), far * angle.sin()) > 0).all()  # or windows would cut shapes
    assert (outline(torch.tensor(0.0), torch.tensor(0.0)) < 0) == (kind != "ring")


def test_familiar_scenes_differ_in_the_colours_of_shapes_only():
    nearer = []
    for index in range(8):
        plain, familiar = render_scene(1, index, 64), render_scene(1, index, 64, familiar=True)
        for part in ("mask", "classes", "alpha", "background", "labels"):
            assert torch.equal(getattr(plain, part), getattr(familiar, part))
        assert not torch.equal(plain.foreground, familiar.foreground)
        solid = plain.alpha.expand(3, -1, -1) == 255
        own = class_palette()[plain.classes[0].long()].permute(2, 0, 1)
        distances = [(s.image.int() - own).abs()[solid].float().mean() for s in (familiar, plain)]
        nearer.append(distances[0] < distances[1])
    assert all(nearer)
