"""A script that faults strike in a real launch: those of TEST_FAULT (tests/faults.py), and signals.

    torchrun … tests/struck.py SCRIPT ARGUMENTS
    torchrun … tests/struck.py step|hold|save SIGNAL SCRIPT ARGUMENTS

The signal goes to the launcher, once. step: in rank 0's third backward pass; hold: there, too, and
then the pass waits for a file named `go`; save: when rank 0's third checkpoint is whole, before it
takes the old one's place.
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


def signal_launcher(moment, number):
    """Have the launcher signalled at one of the moments."""
    if moment == "save":
        place = (os, "replace", lambda _, target, *_rest: str(target).endswith("last.pth"))
    else:
        import torch

        place = (torch.Tensor, "backward", lambda *_: True)
    strike_third(*place, number, hold=moment == "hold")


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    arguments = sys.argv[1:]
    if not arguments[0].endswith(".py"):
        moment, name, *arguments = arguments
        if os.environ["RANK"] == "0":
            signal_launcher(moment, signal.Signals[name])
    if "TEST_FAULT" in os.environ:
        import faults  # it imports torch

        faults.install(os.environ["TEST_FAULT"])
    script, *arguments = arguments
    sys.argv = [str(REPO / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
