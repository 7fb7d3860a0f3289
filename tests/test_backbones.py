"""Encoders against torchvision's own networks, and where their weights come from."""

import copy
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from src.backbones import (
    load_resnet50_stages,
    load_vgg_stages,
    resnet50_stages,
    vgg_stages,
)
from train_utils.errors import UserError
from train_utils.pretrained import backbone_state


def randomise(module: nn.Module) -> None:
    """Weights that keep the scale, and batch norm statistics that an untrained one lacks."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=(2 / fan_in) ** 0.5, generator=generator)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.1, generator=generator)
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.num_batches_tracked.fill_(7)


def torchvision_vgg(name: str) -> nn.Module:
    """torchvision's network with random features; its huge classifier is shapes only."""
    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
    net.features.to_empty(device="cpu")
    randomise(net.features)
    return net.eval()


@pytest.fixture(scope="module")
def vgg16() -> nn.Module:
    return torchvision_vgg("vgg16")


@pytest.fixture(scope="module")
def vgg16_bn() -> nn.Module:
    return torchvision_vgg("vgg16_bn")


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    net = torchvision.models.resnet50()
    randomise(net)
    return net.eval()


# --- VGG-16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_norm", "expected"), [(False, 14_714_688), (True, 14_723_136)])
def test_vgg_parameter_count(batch_norm, expected):
    """Σ 9·in·out + out over the 13 convolutions; batch norm adds 2 · 4224 channels."""
    with torch.device("meta"):
        stages = vgg_stages(batch_norm=batch_norm)
    assert sum(p.numel() for p in stages.parameters()) == expected


def test_vgg_stages_keep_the_size_and_widen():
    x = torch.rand(2, 4, 5, 7)
    for stage, width in zip(vgg_stages(channels=2, in_channels=4), (2, 4, 8, 16, 16), strict=True):
        x = stage(x)
        assert x.shape == (2, width, 5, 7)


def test_vgg_starts_kaiming_normal_with_zero_biases():
    torch.manual_seed(0)
    convs = [m for m in vgg_stages(channels=32).modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 13
    for conv in convs:
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, 0.1)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
@torch.inference_mode()
def test_vgg_gives_torchvisions_features(name, request):
    net = request.getfixturevalue(name)
    stages = vgg_stages(batch_norm=name == "vgg16_bn").eval()
    load_vgg_stages(stages, net.state_dict())
    ours = theirs = torch.rand(1, 3, 32, 64)
    layers = iter(net.features)
    for stage in stages:
        ours = F.max_pool2d(stage(ours), 2)
        for layer in layers:
            theirs = layer(theirs)
            if isinstance(layer, nn.MaxPool2d):
                break
        assert theirs.any()
        assert torch.equal(ours, theirs)
    assert next(layers, None) is None


@torch.inference_mode()
def test_a_fourth_input_channel_starts_without_effect(vgg16):
    stages = vgg_stages(in_channels=4)
    load_vgg_stages(stages, vgg16.state_dict())
    assert not stages[0][0].weight[:, 3].any()
    images = torch.rand(1, 4, 8, 8)
    expected = vgg16.features[:2](images[:, :3])
    torch.testing.assert_close(stages[0][:2](images), expected, atol=1e-5, rtol=0)


def test_vgg_files_without_batch_counters_load(vgg16_bn):
    state = vgg16_bn.state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    stages = vgg_stages(batch_norm=True)
    load_vgg_stages(stages, old)
    assert torch.equal(stages[4][7].running_var, vgg16_bn.features[41].running_var)
    assert stages[4][7].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features.28.bias": None}, "features.28.bias is missing"),
        ({"features.0.weight": torch.zeros(64, 3, 5, 5)}, r"features.0.weight is \(64, 3, 5, 5\)"),
        ({"features.0.weight": torch.zeros(64, 4, 3, 3)}, r"\(64, 4, 3, 3\), not \(64, 3, 3, 3\)"),
        ({"features.0.weight": torch.zeros(())}, r"features.0.weight is \(\), not"),
        ({"features.30.weight": torch.zeros(1)}, "features.30.weight is unknown"),
        ({"head.weight": torch.zeros(1)}, "head.weight is unknown"),
    ],
)
def test_vgg_weights_that_do_not_fit_are_named_and_not_copied(vgg16, changes, message):
    state = {k: v for k, v in (vgg16.state_dict() | changes).items() if v is not None}
    stages = vgg_stages()
    before = copy.deepcopy(stages.state_dict())
    with pytest.raises(ValueError, match=message):
        load_vgg_stages(stages, state)
    assert all(torch.equal(value, before[key]) for key, value in stages.state_dict().items())


def test_vgg_with_and_without_batch_norm_are_not_confused(vgg16, vgg16_bn):
    with torch.device("meta"):
        plain, normalised = vgg_stages(), vgg_stages(batch_norm=True)
    with pytest.raises(ValueError, match=r"features\.2\.weight is missing"):
        load_vgg_stages(plain, vgg16_bn.state_dict())
    with pytest.raises(ValueError, match=r"and \d+ more"):
        load_vgg_stages(normalised, vgg16.state_dict())


# --- ResNet-50 --------------------------------------------------------------------------------


def test_resnet_parameter_count():
    """torchvision's 25,557,032 without fc (2048 · 1000 + 1000)."""
    with torch.device("meta"):
        stages = resnet50_stages()
    assert sum(p.numel() for p in stages.parameters()) == 23_508_032


@torch.inference_mode()
def test_resnet_gives_torchvisions_features(resnet50):
    stages = resnet50_stages().eval()
    load_resnet50_stages(stages, resnet50.state_dict())
    images = torch.rand(1, 3, 64, 33)
    theirs = []
    hooks = [resnet50.maxpool.register_forward_pre_hook(lambda m, inputs: theirs.append(inputs[0]))]
    for layer in (resnet50.layer1, resnet50.layer2, resnet50.layer3, resnet50.layer4):
        hooks.append(layer.register_forward_hook(lambda m, inputs, out: theirs.append(out)))
    resnet50(images)
    for hook in hooks:
        hook.remove()
    x, shapes = images, []
    for stage, expected in zip(stages, theirs, strict=True):
        x = stage(x)
        assert torch.equal(x, expected)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 32, 17), (256, 16, 9), (512, 8, 5), (1024, 4, 3), (2048, 2, 2)]


def test_resnet_weights_that_do_not_fit_are_named(resnet50, vgg16):
    with torch.device("meta"):
        stages = resnet50_stages()
    state = resnet50.state_dict()
    del state["layer4.2.bn3.running_mean"]
    with pytest.raises(ValueError, match=r"layer4\.2\.bn3\.running_mean is missing$"):
        load_resnet50_stages(stages, state)
    with pytest.raises(ValueError, match=r"conv1\.weight is missing"):
        load_resnet50_stages(stages, vgg16.state_dict())


# --- freezing ---------------------------------------------------------------------------------


def test_frozen_stages_stay_as_they_are_in_training():
    stages = vgg_stages(channels=2, batch_norm=True)
    head = nn.Sequential(nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1))
    net = nn.Sequential(stages[0], head)
    stages.freeze()
    whole = nn.ModuleDict({"backbone": stages, "head": head}).train()
    before = copy.deepcopy(stages.state_dict())
    net(torch.rand(2, 3, 4, 4)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in stages.state_dict().items())
    assert all(p.grad is None for p in stages.parameters())
    assert all(p.grad is not None for p in head.parameters())
    assert head[1].num_batches_tracked == 1
    assert not any(m.training for m in copy.deepcopy(whole).train()["backbone"].modules())


# --- where weights come from ------------------------------------------------------------------

PUBLISHED = {
    "vgg16": "vgg16-397923af.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """torch hub's folder of weights, empty and not yet made."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


def failing_download(error: Exception):
    def download(*args, **kwargs):
        raise error

    return download


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A small file of weights that torchvision seems to offer, at a file:// address."""
    torch.save({"features.0.bias": torch.arange(3.0)}, tmp_path / "new.pth")
    digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()
    file = (tmp_path / "new.pth").rename(tmp_path / f"vgg16-{digest[:8]}.pth")
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=file.as_uri()))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: weights)
    return file


def test_a_local_file_is_read_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", failing_download(AssertionError()))
    file = tmp_path / "mine.pth"
    torch.save({"module.features.0.bias": torch.arange(3.0)}, file)
    state = backbone_state(str(file), "vgg16")
    assert {key: value.tolist() for key, value in state.items()} == {"features.0.bias": [0, 1, 2]}
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        backbone_state(str(tmp_path / "absent.pth"), "vgg16")


def test_default_weights_are_downloaded_once(published, cache):
    first = backbone_state("DEFAULT", "vgg16")
    assert first["features.0.bias"].tolist() == [0, 1, 2]
    assert [file.name for file in cache.iterdir()] == [published.name]
    published.unlink()
    assert backbone_state("DEFAULT", "vgg16").keys() == first.keys()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as POSIX has them")
def test_a_pipe_in_the_weights_place_is_replaced_not_waited_for(published, cache):
    cache.mkdir(parents=True)
    os.mkfifo(cache / published.name)
    assert backbone_state("DEFAULT", "vgg16").keys() == {"features.0.bias"}


def test_a_download_with_a_wrong_checksum_is_not_kept(published, cache):
    published.write_bytes(b"an error page of a proxy")
    with pytest.raises(UserError, match=r"could not be downloaded \(invalid hash value"):
        backbone_state("DEFAULT", "vgg16")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.parametrize(
    "error",
    [URLError("no route to host"), TimeoutError("timed out"), ConnectionResetError("reset")],
)
def test_offline_the_user_learns_what_to_place_where(cache, monkeypatch, arch, error):
    monkeypatch.setattr(torch.hub, "download_url_to_file", failing_download(error))
    with pytest.raises(UserError) as caught:
        backbone_state("DEFAULT", arch)
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{PUBLISHED[arch]}" in message
    assert f"place it as {cache / PUBLISHED[arch]}" in message
    assert "set model.weights to null" in message


def test_a_cache_folder_that_cannot_be_made_is_reported(cache, tmp_path):
    (tmp_path / "torch").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"^model\.weights: https://"):
        backbone_state("DEFAULT", "vgg16")


@pytest.mark.parametrize("arch", PUBLISHED)
def test_a_damaged_file_in_the_cache_is_not_loaded(cache, arch):
    cache.mkdir(parents=True)
    torch.save({"features.0.bias": torch.arange(3.0)}, cache / PUBLISHED[arch])
    with pytest.raises(UserError, match=f"{PUBLISHED[arch]}: damaged.*Delete it"):
        backbone_state("DEFAULT", arch)
