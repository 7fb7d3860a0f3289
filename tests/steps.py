"""One step of a task as the loop takes it, on one process."""

import torch

from train_utils import train_one_epoch
from train_utils.metric_logger import MetricLogger
from train_utils.train_and_eval import EpochRun, mean_losses


def take_step(task, models, batch):
    """What is logged of a step, and the gradients of all parameters, by name; weights stay."""
    gradients, run = {}, EpochRun(MetricLogger(reduce=True))
    optimizers = {}
    for name, model in models.items():
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=0.0)

        def keep(*_, name=name, model=model):
            for key, parameter in model.named_parameters():
                gradients[f"{name}.{key}"] = parameter.grad

        optimizers[name].register_step_pre_hook(keep)
    train_one_epoch(
        models,
        optimizers,
        [batch],
        "cpu",
        0,
        None,
        losses=task.losses,
        weight=task.weight,
        run=run,
    )
    names = mean_losses(run.logger)  # of no image they are nan
    return {name: run.logger.meters[name].value for name in names}, gradients


class Noting(EpochRun):
    """Calls a function after every step; `stops()` asks for an end."""

    def __init__(self, note=lambda progress: None, stops=lambda: False, **options):
        super().__init__(**options)
        self.after_step, self.stop_requested = note, stops
