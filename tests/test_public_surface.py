"""Names, signatures and flags that users' scripts and command lines are written against."""

import inspect

import pytest

import my_dataset
import predict
import src
import tasks
import train_utils
import validation
from train_utils import arguments, distributed_utils

NONE = inspect.Parameter.empty
# What may be passed by position, in order, with its default; more keyword arguments may follow.
SIGNATURES = {
    train_utils.train_one_epoch: {
        **dict.fromkeys(
            ("model", "optimizer", "data_loader", "device", "epoch", "lr_scheduler"), NONE
        ),
        "print_freq": 10,
        "scaler": None,
    },
    train_utils.evaluate: dict.fromkeys(("model", "data_loader", "device"), NONE),
    train_utils.create_lr_scheduler: {
        **dict.fromkeys(("optimizer", "num_step", "epochs"), NONE),
        **{"warmup": True, "warmup_epochs": 1, "warmup_factor": 1e-3, "end_factor": 1e-6},
    },
    train_utils.get_params_groups: {"model": NONE, "weight_decay": 1e-4},
    train_utils.criterion: {"inputs": NONE, "target": NONE},
    train_utils.init_distributed_mode: {"args": NONE},
    train_utils.save_on_master: {"state": NONE, "path": NONE},
    train_utils.mkdir: {"path": NONE},
    src.u2net_full: {"out_ch": 1},
    src.u2net_lite: {"out_ch": 1},
    my_dataset.DUTSDataset: {"root": NONE, "train": True, "transforms": None},
    distributed_utils.is_main_process: {},
    distributed_utils.get_rank: {},
    distributed_utils.get_world_size: {},
    distributed_utils.all_gather: {"data": NONE},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_positional_arguments_and_their_defaults_stay(function):
    parameters = list(inspect.signature(function).parameters.values())
    known = SIGNATURES[function]
    found = {p.name: p.default for p in parameters[: len(known)] if p.kind is not p.KEYWORD_ONLY}
    assert list(found.items()) == list(known.items())
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters[len(known) :]:
        assert parameter.default is not NONE or parameter.kind in kinds, parameter


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("MetricLogger", ("update", "log_every", "meters", "add_meter")),
        ("SmoothedValue", ("update", "median", "avg", "global_avg", "max", "value")),
        ("MeanAbsoluteError", ("update", "compute", "reduce_from_all_processes")),
        ("F1Score", ("update", "compute", "reduce_from_all_processes")),
    ],
)
def test_meters_and_metrics_keep_their_names(name, methods):
    made = getattr(distributed_utils, name)()
    for method in methods:
        assert hasattr(made, method), method


def parse_train_args(argv):
    return arguments.parse_args(argv, flags=tasks.train_flags())


FLAGS = {
    parse_train_args: """
        --config X --data-path X --images X --masks X --val-images X --val-masks X
        --direction BtoA --cache disk --device cpu -b 1 --batch-size 1 -j 0 --workers 0
        --epochs 1 --lr 1 --wd 1 --weight-decay 1 --amp --amp off --sync-bn --compile
        --deterministic --on-nonfinite skip --seed 1 --print-freq 1 --eval-interval 1
        --weights X --resume auto --output-dir X --test-only --set a=b""",
    validation.parse_args: """
        --weights X --config X --data-path X --images X --masks X --predictions X --post-norm
        --toolbox --json X --device cpu -b 1 --batch-size 1 -j 0 --workers 0 --set a=b""",
    predict.parse_args: """
        X Y -o X --output X --weights X --config X --cutout --overlay --threshold 0.5
        --trimap X --device cpu --set a=b""",
}


@pytest.mark.parametrize("parse", FLAGS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_flags_stay(parse):
    parse(FLAGS[parse].split())
