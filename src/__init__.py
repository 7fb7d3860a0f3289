"""Networks: they map images to predictions and know nothing of training."""

from .u2net import U2Net, from_official, identify, is_official, u2net_full, u2net_lite

__all__ = ["U2Net", "from_official", "identify", "is_official", "u2net_full", "u2net_lite"]
