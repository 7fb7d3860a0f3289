"""What the launcher scripts share; the names a training script needs are importable from here."""

from train_utils.distributed_utils import init_distributed_mode, mkdir, save_on_master
from train_utils.losses import criterion
from train_utils.schedule import create_lr_scheduler, get_params_groups
from train_utils.train_and_eval import evaluate, train_one_epoch

__all__ = [
    "create_lr_scheduler",
    "criterion",
    "evaluate",
    "get_params_groups",
    "init_distributed_mode",
    "mkdir",
    "save_on_master",
    "train_one_epoch",
]
