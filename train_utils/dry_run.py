"""What a user may have edited, tried once before the first step.

One sample goes through losses, networks, metrics and pictures as training and evaluation will take
them. Nothing changes by it: networks are copied, and random generators are put back.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train_utils.activity import set_activity
from train_utils.amp import choose_amp_dtype
from train_utils.collectives import is_main_process
from train_utils.data import collate, generators_kept, item_name
from train_utils.device import tf32
from train_utils.errors import UserError, described, is_out_of_memory, shortened
from train_utils.inference import prepare
from train_utils.log import get_logger
from train_utils.metrics import ExactMetric, all_scores
from train_utils.run_folder import contact_sheet
from train_utils.task import BaseTask
from train_utils.train_and_eval import (
    Batch,
    Models,
    Sample,
    losses_by_network,
    means_on,
    to_device,
    weighed,
    weights_of,
)

# Layers that compute something else in training than in evaluation.
_BY_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def dry_run(
    task: BaseTask,
    models: Models,
    optimizers: Any,
    loader: DataLoader,
    val_loader: DataLoader,
    device: torch.device,
) -> list[str]:
    """Take one sample through training and evaluation, and log which losses are trained.

    Returns what it warns of: parameters that are never trained. Raises UserError for optimizers,
    losses, networks and metrics that would fail in a later step or evaluation, or train on
    something else than is meant. Any other error keeps its trace; what was tried is logged before
    it. To be called on all ranks, of which each tries the same sample.
    """
    check_optimizers(optimizers, models)
    networks = copies_to_try(models)
    set_activity("trying one sample before the first step")
    with generators_kept():
        reached = _try_training(task, networks, next(iter(optimizers)), loader.dataset, device)
        if len(val_loader.dataset):  # type: ignore[arg-type]
            _try_evaluation(task, networks, val_loader.dataset, device)
    warnings = untrained(models, optimizers, reached)
    for text in warnings if is_main_process() else ():
        get_logger().warning(f"warning: {text}")
    return warnings


def copies_to_try(models: Models) -> dict[str, nn.Module]:
    """Copies in training mode, but for normalisation and dropout: a single image will do."""
    networks = copy.deepcopy(dict(models))
    for network in networks.values():
        network.train()
        for layer in network.modules():
            layer.training &= not isinstance(layer, _BY_MODE)
    return networks


def check_optimizers(optimizers: Any, networks: Iterable[str]) -> None:
    """Raise UserError for what is no dict of torch optimizers by network."""
    form = 'Give a dict by network, such as {"model": torch.optim.AdamW(…)}.'
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise UserError(f"optimizers: {described(optimizers)}. {form}")
    for name, optimizer in optimizers.items():
        kind = type(optimizer).__name__
        if name not in networks:
            raise UserError(
                f"optimizers: {name!r} is none of the networks, {', '.join(networks)}. {form}"
            )
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"optimizers: {name!r} is {described(optimizer)}. {form}")
        try:
            inspect.signature(optimizer.step).bind()
        except TypeError as error:
            raise UserError(
                f"optimizers: {kind}.step() needs a closure, which the training loop does not "
                "give. Use an optimizer that steps by gradients alone, such as AdamW."
            ) from error


def _try_training(
    task: BaseTask, networks: Models, first: str, dataset: Any, device: torch.device
) -> set[str]:
    """Losses and networks on the first training sample, without a backward pass.

    Returns the parameters that have a part in a loss, as <network>.<name>.
    """
    batch, reached = collate([dataset.item(0)]), set[int]()
    amp_dtype = choose_amp_dtype(task.cfg.train.amp, device)
    told: list[str] = []
    names: set[str] = set()
    with _explained(task, networks, "losses", item_name(dataset.dataset, 0), batch):
        weights = weights_of(task.weight, batch)
        batch = to_device(batch, device)
        with torch.autocast(device.type, amp_dtype, enabled=bool(amp_dtype)):
            for network, given in losses_by_network(task.losses, networks, batch, first):
                means = means_on(device, given)
                weighed(means, dict.fromkeys(weights, 1.0), 1, [], network == first)
                trained = [name for name, mean in means.items() if mean.requires_grad]
                reached |= leaves_of([means[name] for name in trained])
                logged = [name for name in means if name not in trained]
                names |= means.keys()
                told.append(f"{network} is trained on {' + '.join(trained)}")
                told += [f"only logged: {', '.join(logged)}"] if logged else []
        if unknown := sorted(weights.keys() - names - {""}):
            raise UserError(
                f"weight: {unknown[0]!r} is none of the losses, {', '.join(sorted(names))}. Use "
                "the same names in both."
            )
        with torch.inference_mode():
            task.check_models(networks, batch)
    get_logger().info(f"losses: {'; '.join(told)}")
    return {name for name, parameter in _trainable(networks) if id(parameter) in reached}


def _trainable(networks: Models) -> Iterator[tuple[str, nn.Parameter]]:
    for network, model in networks.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{network}.{name}", parameter


def leaves_of(values: Iterable[Tensor]) -> set[int]:
    """The ids of the tensors that would get a gradient in a backward pass from some values."""
    todo: list[Any] = [value.grad_fn for value in values]
    seen, leaves = set(todo), set[int]()
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        found = {inner for inner, _ in getattr(node, "next_functions", ())} - seen
        seen |= found
        todo += found
    return leaves


def untrained(models: Models, optimizers: Mapping[str, Optimizer], reached: set[str]) -> list[str]:
    """Warnings of parameters that no loss depends on (`reached`: the others), or no optimizer has.

    Of those only that are not frozen.
    """
    groups = [group for each in optimizers.values() for group in each.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    unreached = {n: p for n, p in _trainable(models) if n not in reached}
    unheld = {n: p for n, p in _trainable(models) if n in reached and id(p) not in held}
    freeze = "or freeze them by requires_grad_(False)"
    return [
        f"{shortened(list(found))}: {problem}, so that {sum(p.numel() for p in found.values()):,} "
        f"parameters are never trained. {fix}, {freeze}."
        for found, problem, fix in (
            (unreached, "no loss depends on these", "Use them in a loss"),
            (unheld, "no optimizer has these", "Give them to one"),
        )
        if found
    ]


def _try_evaluation(task: BaseTask, networks: Models, dataset: Any, device: torch.device) -> None:
    """Prediction, metrics and pictures of the first validation sample, or of a corner of it."""
    image, target, *_ = (part.as_subclass(Tensor) for part in dataset.item(0))
    name = item_name(dataset.dataset, 0)
    if image.shape[-2:] == target.shape[-2:]:  # whole photographs take long
        side = task.cfg.data.image_size
        image, target = image[..., :side, :side], target[..., :side, :side]
    amp_dtype = choose_amp_dtype(task.cfg.eval.amp, device, "eval.amp")
    inputs = image[None].to(device)
    with (
        _explained(task, networks, "predict", name, (inputs,)),
        tf32(task.cfg.eval.tf32),
        torch.inference_mode(),
    ):
        prediction = task.predict(prepare(networks, device, amp_dtype), inputs)
        sample = Sample(image, target, prediction[0].cpu())
    metrics: Any = task.make_metrics()
    if not isinstance(metrics, (tuple, list)) or not all(
        isinstance(metric, ExactMetric) for metric in metrics
    ):
        raise UserError(f"make_metrics: {described(metrics)}. Return a tuple of metrics.")
    given = (
        f"prediction {described(sample.prediction)}{_range(sample.prediction)}, target "
        f"{described(sample.target)}{_range(sample.target)}"
    )
    expected = f" {task.name} expects of networks {task.outputs}." if task.outputs else ""
    with torch.inference_mode():
        for metric in metrics:
            try:
                metric.merge(metric.sample_state(sample.prediction, sample.target))
            except ValueError as error:
                raise UserError(f"{metric.name}: {error}; {given}.{expected}") from error
            # Weights that are not trained yet may give values that are not finite.
            if metric.invalid_images() and sample.prediction.isfinite().all():
                what = f"{metric.name}: {name} has {metric.invalid}"
                raise UserError(f"{what}: {given}.{expected}")
        all_scores(metrics)
        task.curves(metrics)
        contact_sheet([task.sheet_row(sample)])


def _range(values: Tensor) -> str:
    low, high = values.aminmax()
    return f" from {low:.3g} to {high:.3g}"


@contextmanager
def _explained(
    task: BaseTask, networks: Models, tried: str, sample: str, batch: Batch
) -> Iterator[None]:
    """Where a block fails, say on what, and what the networks returned.

    UserError if that is no tensor and the task says what it expects.
    """
    returned: dict[str, str] = {}
    unexpected: list[str] = []

    def note(name: str, network: nn.Module, output: Any) -> None:
        mode = "training" if network.training else "evaluation"
        text = f"{name} ({type(network).__name__}) returns {described(output)} in {mode}"
        returned[name] = text
        is_list = network.training and isinstance(output, (list, tuple))
        if not isinstance(output, Tensor) and not is_list:
            unexpected.append(text)

    hooks = [
        network.register_forward_hook(
            lambda network, _, output, name=name: note(name, network, output)
        )
        for name, network in networks.items()
    ]
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if unexpected and task.outputs:
            raise UserError(
                f"{unexpected[0]}. {task.name} expects {task.outputs}. ({tried}: {error})"
            ) from error
        of = f"{sample}, as a batch {', '.join(map(described, batch))}"
        outputs = "; ".join(returned.values()) or "no network was called"
        get_logger().error(f"{task.name}: trying {tried} on {of}: {outputs}; it failed:")
        raise
    finally:
        for hook in hooks:
            hook.remove()
