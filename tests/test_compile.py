"""torch.compile takes every network whole: a graph that breaks costs what compiling saves."""

from functools import partial

import pytest
import torch
from test_parity import narrow_u2net

import src

NETWORKS = {
    "u2net": (narrow_u2net, (3,)),
    "fcn": (partial(src.fcn, 4, 8, batch_norm=True), (3,)),
    "unet": (partial(src.unet, 4, 8), (3,)),
    "unet_vgg16": (partial(src.unet_vgg16, 4, 8), (3,)),
    "unet_resnet50": (partial(src.unet_resnet50, 4), (3,)),
    "matting": (partial(src.deep_matting, 8), (4,)),
    "generator": (partial(src.UNetGenerator, channels=8, levels=5), (3,)),
    "discriminator": (partial(src.PatchDiscriminator, channels=8), (3, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize(  # meta goes the ways that are for GPUs
    ("name", "device"), [("u2net", "cpu"), *((name, "meta") for name in NETWORKS)]
)
def test_no_network_breaks_the_graph(name, device):
    """Forward and backward in training, under autocast where there is one."""
    torch._dynamo.reset()
    build, channels = NETWORKS[name]
    with torch.device(device):
        model = build().to(memory_format=torch.channels_last)
        images = [torch.rand(2, count, 72, 64) for count in channels]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu"):
        output = compiled(*images)
    outputs = output if isinstance(output, list) else [output]
    sum(each.square().mean() for each in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
