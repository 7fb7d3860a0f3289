"""How long it takes from the command line to the first result: a minimal script and ours.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 15 --json startup.json

Every time is that of a new process, from its launch to its end or, for a training, to the line that
reports the first step, on two embedded scenes of 64 pixels. plain imports torch, torchvision and
TensorBoard's writer, builds the same network, and does one step, or predicts one photograph.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common
from benchmarks.prediction import write_scenes
from src import u2net_lite
from train_utils.errors import UserError
from train_utils.setup import clean_errors

REPO = Path(__file__).resolve().parents[1]

PLAIN_STEP = """
import sys
import torch, torchvision
from torch.utils.tensorboard import SummaryWriter
from src import u2net_lite
device = sys.argv[1]
writer = SummaryWriter(sys.argv[2])
model = u2net_lite().to(device)
optimizer = torch.optim.AdamW(model.parameters())
images, masks = torch.rand(2, 3, 64, 64, device=device), torch.zeros(2, 1, 64, 64, device=device)
outputs = model(images)
loss = sum(torch.nn.functional.binary_cross_entropy_with_logits(x, masks) for x in outputs)
loss.backward()
optimizer.step()
writer.add_scalar("loss", loss.item(), 1)
print("first step", flush=True)
"""

PLAIN_PREDICTION = """
import sys
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from src import u2net_lite
device, weights, source, target = sys.argv[1:]
model = u2net_lite()
model.load_state_dict(torch.load(weights))
model.eval().to(device)
picture = TF.to_dtype(TF.pil_to_tensor(Image.open(source).convert("RGB")), scale=True)
image = TF.normalize(TF.resize(picture, [320, 320]), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
with torch.no_grad():
    saliency = model(image[None].to(device))
saliency = torch.nn.functional.interpolate(saliency, picture.shape[-2:], mode="bilinear")[0, 0]
Image.fromarray((saliency * 255).round().byte().cpu().numpy()).save(target)
"""


def launch(command: Sequence[Any], folder: Path, until: str | None = None) -> Callable[[], None]:
    """A function that runs Python in `folder` to its end, or to a printed line with `until`."""
    arguments = [sys.executable, *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}

    def run() -> None:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout
        with process, process.stdout:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if until and until in line:
                    process.kill()
                    return
        if until or process.returncode:
            raise UserError(f"{' '.join(arguments[1:3])}: failed ({''.join(lines)[-500:]})")

    return run


def make_work(folder: Path, device: str) -> dict[str, dict[str, Callable[[], None]]]:
    """By the name of the work, the functions of its ways."""
    torch.save(u2net_lite().state_dict(), weights := folder / "u2net_lite.pth")
    write_scenes(folder / "photographs", 1)
    photograph = folder / "photographs" / "0.jpg"
    tiny = {"data.image_size": 64, "data.train_size": 2, "data.val_size": 1, "train.print_freq": 1}
    options = [f"--set={key}={value}" for key, value in tiny.items()]
    options += [f"--device={device}", "-b2", "-j0"]
    ours = [REPO / "predict.py", photograph, f"--weights={weights}", f"--device={device}"]
    plain = ["-c", PLAIN_PREDICTION, device, weights, photograph, folder / "plain.png"]
    step = ["-c", PLAIN_STEP, device, folder / "log"]
    work = {
        f"{script} --help": {"ours": launch([REPO / script, "--help"], folder)}
        for script in ("predict.py", "validation.py", "train.py")
    }
    work["one photograph"] = {"plain": launch(plain, folder), "ours": launch(ours, folder)}
    work["first training step"] = {
        "plain": launch(step, folder, "first step"),
        "ours": launch(["-u", REPO / "train.py", *options], folder, "[1/1]"),
    }
    return work


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return common.make_parser(__doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work, ways in make_work(Path(folder), args.device).items():
            times = common.take_turns(ways, args.rounds)
            row: dict[str, Any] = {"work": work}
            row |= {f"{way} s": median(each) for way, each in times.items()}
            rows.append(
                {**row, **({"ratio": common.ratio(times, "ours")} if len(ways) > 1 else {})}
            )
    common.report(args, rows)


if __name__ == "__main__":
    with clean_errors():
        main()
