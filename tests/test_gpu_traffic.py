"""Operations and bytes on a GPU that is not there, against counts by hand."""

import torch
import torch.nn.functional as F

from benchmarks.fake_cuda import CUDA, fake_gpu
from benchmarks.gpu_traffic import Traffic, eager_bytes, fused_bytes


def counted(work, *shapes):
    """Operations, bytes one by one, and bytes of fused kernels, for fp16 inputs."""
    with fake_gpu(), Traffic() as traffic:
        inputs = [torch.empty(*shape, dtype=torch.float16, device=CUDA) for shape in shapes]
        traffic.forget()
        work(*inputs)
    return traffic.operations, eager_bytes(traffic.nodes), fused_bytes(traffic.nodes)


def test_elementwise_operations_become_one_kernel():
    def work(x, weight):
        y = F.conv2d(x, weight, padding=1)  # 1024 + 288 → 1024 bytes
        return (torch.relu(y) + y).sum()  # 1024 → 1024; 2 × 1024 → 1024; 1024 → 2

    alone = 1024 + 288 + 1024
    eager = alone + 2048 + 3072 + 1026
    # Together they read y once, and nothing but the sum is left.
    assert counted(work, (2, 4, 8, 8), (4, 4, 3, 3)) == (4, eager, alone + 1024 + 2)


def test_what_another_kernel_takes_is_written():
    def work(x, weight):
        y = torch.relu(x)
        F.conv2d(y, weight, padding=1)
        y.add_(1)  # reads and writes y

    conv = 1024 + 288 + 1024
    # relu and add are one kernel, which reads x; its two results are y for the convolution, and y.
    fused = 1024 + 1024 + 1024 + conv
    assert counted(work, (2, 4, 8, 8), (4, 4, 3, 3)) == (3, 2048 + conv + 2048, fused)


def test_parts_of_a_tensor_count_as_such():
    def work(x):
        torch.relu(x[:, :1])  # 256 → 256
        x.zero_()  # is not read

    assert counted(work, (2, 4, 8, 8)) == (2, 512 + 1024, 512 + 1024)


def test_batch_norm_reads_twice_and_pooling_keeps_a_byte():
    def work(x):
        F.batch_norm(x, None, None, training=True)

    def pool(x):
        F.max_pool2d(x, 2)  # 1024 → 256, and 128 places of 8 bytes

    statistics = 2 * 4 * 4  # mean and deviation of four channels, in fp32
    operations, eager, _ = counted(work, (2, 4, 8, 8))
    assert operations == 1 and eager == 1024 + statistics + 1024 + statistics + 1024
    assert counted(pool, (2, 4, 8, 8)) == (1, 1024 + 256 + 1024, 1024 + 256 + 128)
