"""train_multi_GPU.py, whose launcher is signalled by it at a chosen moment, once.

    torchrun … tests/struck.py step|hold|save SIGNAL ARGUMENTS OF train_multi_GPU.py

step: in rank 0's third backward pass; hold: there, too, and then the pass waits for a file named
`go`; save: when rank 0's third checkpoint is whole, before it takes the old one's place.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def strike_third(owner, name, wanted, number, hold):
    """Have the third call of owner.name for which `wanted(*args)` holds signal the launcher."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.extend([None] * wanted(*args))
        if len(calls) == 3 and wanted(*args):
            os.kill(os.getppid(), number)
            while hold and not Path("go").exists():
                time.sleep(0.05)
        return function(*args, **kwargs)

    setattr(owner, name, call)


if __name__ == "__main__":
    moment, number, *arguments = sys.argv[1:]
    sys.argv = [str(REPO / "train_multi_GPU.py"), *arguments]
    sys.path.insert(0, str(REPO))
    if os.environ["RANK"] == "0":
        if moment == "save":
            place = (os, "replace", lambda _, target, *_rest: str(target).endswith("last.pth"))
        else:
            import torch

            place = (torch.Tensor, "backward", lambda *_: True)
        strike_third(*place, signal.Signals[number], hold=moment == "hold")
    runpy.run_path(sys.argv[0], run_name="__main__")
