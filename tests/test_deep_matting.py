"""The matting network against a second reading of the paper; sizes, modes and weights."""

import pytest
import torch
from torch import nn
from torchvision.models import vgg

from src import deep_matting


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomised(deep_matting(channels=4))


def randomised(net: nn.Module) -> nn.Module:
    """Batch norm with statistics of its own, so that evaluation shows whether each is in place."""
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return net.eval()


class Paper(nn.Module):
    """Figure 3 of the paper, layer by layer, at a sixteenth of its width."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vgg.make_layers([4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32], True)
        self.encoder[0] = nn.Conv2d(4, 4, 3, padding=1)
        self.deconv6 = self.block(32, 32, 1)
        self.deconv5 = self.block(32, 32, 5)
        self.deconv4 = self.block(32, 16, 5)
        self.deconv3 = self.block(16, 8, 5)
        self.deconv2 = self.block(8, 4, 5)
        self.deconv1 = self.block(4, 4, 5)
        self.raw_alpha = nn.Conv2d(4, 1, 5, padding=2)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def block(self, in_ch: int, out_ch: int, kernel: int) -> nn.Sequential:
        conv = nn.Conv2d(in_ch, out_ch, kernel, padding="same", bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_ch), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = []
        for number, layer in enumerate(self.encoder, 1):
            x = layer(x)
            if number in {6, 12, 21, 30, 39}:  # 2, 2, 3, 3 and 3 convolutions of three layers
                x, indices = self.pool(x)
                where.append(indices)
        x = self.deconv6(x)
        for level in range(5, 0, -1):
            x = getattr(self, f"deconv{level}")(self.unpool(x, where[level - 1]))
        return torch.sigmoid(self.raw_alpha(x))


def test_agrees_with_the_paper_layer_by_layer(small):
    paper = Paper().eval()
    theirs, ours = paper.state_dict(), list(small.state_dict().values())
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours]
    paper.load_state_dict(dict(zip(theirs, ours, strict=True)))
    x = torch.randn(2, 4, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(x), paper(x))


def test_parameters_of_the_published_width():
    with torch.device("meta"):
        net = deep_matting()
    # VGG-16's convolutions, a fourth input channel, and the encoder's batch norm; the decoder's
    # convolutions, their batch norm, and alpha's convolution.
    encoder = 14_714_688 + 64 * 9 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)
    kernels = 512**2 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 64
    decoder = 512**2 + 25 * kernels + 2 * (512 + 512 + 256 + 128 + 64 + 64) + 25 * 64 + 1
    assert sum(p.numel() for p in net.parameters()) == encoder + decoder == 25_947_329


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (31, 33), (32, 64), (65, 2)])
def test_any_size_comes_back(small, size):
    with torch.no_grad():
        alpha = small(torch.randn(1, 4, *size))
    assert alpha.shape == (1, 1, *size)
    assert alpha.isfinite().all()


def test_images_are_extended_by_their_border(small):
    x = torch.randn(1, 4, 40, 33)
    rows, columns = torch.arange(64).clamp(max=39), torch.arange(64).clamp(max=32)
    with torch.no_grad():
        whole = small(x[:, :, rows][:, :, :, columns])
        torch.testing.assert_close(small(x), whole[..., :40, :33])


def test_training_gives_logits_and_evaluation_their_sigmoid():
    net = deep_matting(channels=2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # without statistics it takes the batch's, always
            module.running_mean = module.running_var = None
    x = torch.randn(3, 4, 64, 64)
    logits = net.train()(x)
    assert logits.min() < 0
    torch.testing.assert_close(net.eval()(x), torch.sigmoid(logits))


def test_every_parameter_learns():
    net = deep_matting(channels=2).train()
    net(torch.randn(2, 4, 64, 64)).sum().backward()
    # A bias before batch norm is idle: its gradient is rounding noise.
    idle = {
        f"backbone.{name}.bias"
        for name, layer in net.backbone.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= idle


def test_an_empty_batch_trains_nothing():
    net = deep_matting(channels=2).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}
    logits = net(torch.randn(0, 4, 40, 40))
    assert logits.shape == (0, 1, 40, 40)
    logits.sum().backward()
    assert not any(p.grad.any() for p in net.parameters())
    after = dict(net.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_lone_image_needs_a_deepest_map_of_more_than_one_pixel():
    net = deep_matting(channels=2).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 4, 32, 32))
    assert net(torch.randn(1, 4, net.min_train_side, 1)).shape == (1, 1, 33, 1)


@pytest.mark.parametrize("training", [True, False])
def test_alpha_is_fp32_under_autocast(training):
    net = deep_matting(channels=4).train(training)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alpha = net(torch.randn(1, 4, 64, 64))
    assert alpha.dtype == torch.float32
    assert (alpha != alpha.bfloat16()).float().mean() > 0.9  # and with more digits than bf16 has


def test_imagenet_weights_leave_the_trimap_out_at_first():
    net = deep_matting().eval()
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=True).eval()
    net.load_backbone({f"features.{key}": value for key, value in features.state_dict().items()})
    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        deepest = x
        for stage in net.backbone:
            deepest = nn.functional.max_pool2d(stage(deepest), 2)
        torch.testing.assert_close(deepest, features(x[:, :3]))


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        deep_matting(channels=2).load_backbone({"conv1.weight": torch.zeros(64, 3, 7, 7)})
