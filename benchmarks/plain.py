"""The usual way to train these networks, as short as it can be written: what ours is compared with.

NCHW, fp32 or autocast, images normalised to floats on the host, the optimizer as torch constructs
it by default, and the losses read by `.item()` in every step. Networks and batches are ours: what
src/layers.py does for speed is in both.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transforms import UNKNOWN

Networks = Mapping[str, nn.Module]
Precision = Callable[[], AbstractContextManager]
Losses = dict[str, float]  # by the names of ours

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def optimizers(models: Networks, cfg: Any) -> dict[str, torch.optim.Optimizer]:
    """An optimizer of the recipe's kind and learning rate for every network."""
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    found = {}
    for name, model in models.items():
        optim = cfg.optim_d if name == "discriminator" else cfg.optim
        options = {"momentum": optim.momentum} if optim.name == "sgd" else {"betas": optim.betas}
        found[name] = kinds[optim.name](model.parameters(), lr=optim.lr, **options)
    return found


def saliency(
    models: Networks, opts: Mapping, batch: list[Tensor], device: torch.device, precision: Precision
) -> Losses:
    """One step of U²-Net: the sum of the outputs' binary cross-entropies."""
    images, masks = batch[0].to(device), batch[1].to(device)
    with precision():
        outputs = models["model"](images)
        terms = [F.binary_cross_entropy_with_logits(output, masks) for output in outputs]
        loss = torch.stack(terms).sum()
    _update(opts["model"], loss)
    return {"loss": loss.item()}


def segmentation(
    models: Networks, opts: Mapping, batch: list[Tensor], device: torch.device, precision: Precision
) -> Losses:
    """One step of FCN or U-Net: cross-entropy of the classes."""
    images, labels = batch[0].to(device), batch[1].to(device)
    with precision():
        loss = F.cross_entropy(models["model"](images), labels, ignore_index=255)
    _update(opts["model"], loss)
    return {"loss": loss.item()}


def matting(
    models: Networks, opts: Mapping, batch: list[Tensor], device: torch.device, precision: Precision
) -> Losses:
    """One step of Deep Image Matting: the mean of both losses on the unknown pixels."""
    inputs, image, alpha, unknown, fg, bg = (tensor.to(device) for tensor in batch)
    with precision():
        predicted = torch.sigmoid(models["model"](inputs))
        composite = predicted * fg + (1 - predicted) * bg
        distances = (torch.sqrt((predicted - alpha) ** 2 + 1e-12) * unknown).sum()
        distances += (torch.sqrt((composite - image) ** 2 + 1e-12).mean(1, True) * unknown).sum()
        loss = distances / 2 / unknown.sum()
    _update(opts["model"], loss)
    return {"loss": loss.item()}


def translation(
    models: Networks, opts: Mapping, batch: list[Tensor], device: torch.device, precision: Precision
) -> Losses:
    """One step of pix2pix: first G, with D's weights frozen, then D."""
    source, target = batch[0].to(device), batch[1].to(device)
    generator, discriminator = models["generator"], models["discriminator"]
    discriminator.requires_grad_(False)
    with precision():
        fake = generator(source)
        judged = discriminator(fake, source)
        loss = F.mse_loss(judged, torch.ones_like(judged)) + 100 * F.l1_loss(fake, target)
    _update(opts["generator"], loss)
    discriminator.requires_grad_(True)
    with precision():
        real, judged = discriminator(target, source), discriminator(fake.detach(), source)
        d_loss = F.mse_loss(real, torch.ones_like(real))
        d_loss = (d_loss + F.mse_loss(judged, torch.zeros_like(judged))) / 2
    _update(opts["discriminator"], d_loss)
    return {"loss": loss.item(), "D": d_loss.item()}


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


STEPS = {
    "saliency": saliency,
    "segmentation": segmentation,
    "matting": matting,
    "translation": translation,
}


def host_batch(task: str, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Our uint8 batch as the usual loader gives it: floats, normalised on the host."""
    images, target, *colours = batch
    unit = [tensor.contiguous().float() / 255 for tensor in (images, target, *colours)]
    if task == "translation":
        return [2 * tensor - 1 for tensor in unit]
    pictures = torch.cat([(unit[0][:, :3] - MEAN) / STD, unit[0][:, 3:]], dim=1)
    if task == "segmentation":
        return [pictures, target.reshape(len(target), *target.shape[-2:]).long()]
    if task == "matting":
        unknown = (target[:, 1:] == UNKNOWN).float()
        return [pictures, unit[0][:, :3], unit[1][:, :1], unknown, *unit[2:]]
    return [pictures, unit[1]]
