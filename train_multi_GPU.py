"""Train on several GPUs, several CPU processes, or several machines: train.py's story under DDP.

    torchrun --nproc_per_node=4 train_multi_GPU.py --config configs/u2net_full.yaml --data-path DIR
    torchrun --nproc_per_node=2 train_multi_GPU.py --device cpu          two CPU processes, gloo
    srun --ntasks=8 --ntasks-per-node=4 python train_multi_GPU.py …      Slurm, without torchrun
    python train_multi_GPU.py …                                          one process

Several machines, on each of them (N = 0 on the first):
    torchrun --nnodes=2 --node_rank=N --nproc_per_node=4 --master_addr=HOST --master_port=29500 \\
        train_multi_GPU.py …

The arguments are train.py's. --batch-size is per process; the learning rate is not scaled.
"""

from launch.heap import keep_freed_memory

keep_freed_memory()  # before the imports that take seconds

import argparse

from torch.distributed.elastic.multiprocessing.errors import record

import tasks
from train import main
from train_utils.arguments import parse_args
from train_utils.setup import launched


@record
def launch(args: argparse.Namespace) -> None:
    """Join the process group, then do what train.py does."""
    with launched(args):
        main(args)


if __name__ == "__main__":
    launch(parse_args(description=__doc__, flags=tasks.train_flags()))
