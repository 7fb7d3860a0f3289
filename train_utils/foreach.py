"""Operations on many tensors in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target; on a GPU in a few launches, not one for each.

    Batch norm has floats and counters, and torch fuses copies of one dtype only.
    """
    for dtype in {target.dtype for target in targets}:
        chosen = [i for i, target in enumerate(targets) if target.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])
