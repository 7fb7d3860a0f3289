"""How fast a folder of photographs becomes a folder of saliency maps: the usual way and ours.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --weights u2netp.pth --images DIR --count 80 --json out.json

plain takes one photograph after the other: decoded, made floats, resized and normalised, through
the network in NCHW and fp32 ("plain amp": under autocast, where ours is in 16 bits) on all cores,
the map resized and saved as Pillow saves by default. ours is predict.py's `main`. On CPUs its
process keeps freed memory, and so does that of "same env". All load the weights in every round, and
have a process of their own.
Without --images the photographs are embedded scenes of 400×300 pixels, JPEGs; without --weights the
network is u2net_lite, random.

The rows below are ours' steps of one photograph, one after the other on a single thread, and their
shares of a thread's time; on GPUs, all but the forward pass lie on threads beside it.
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import predict
import tasks
from benchmarks import common
from benchmarks.processes import Work, processes_of
from src import u2net_lite
from train_utils.amp import choose_amp_dtype
from train_utils.config import parse_assignments
from train_utils.errors import UserError
from train_utils.image_io import save_image
from train_utils.inference import prepare
from train_utils.listing import list_images
from train_utils.prediction import Job, Predictor
from train_utils.settings import PhotoData
from train_utils.setup import clean_errors
from train_utils.shapes import render_scene


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--weights", type=Path, help="of a saliency network; default: random")
    parser.add_argument("--images", type=Path, help="folder of photographs; default: scenes")
    parser.add_argument("--count", type=common.positive, default=32, help="photographs per round")
    parser.add_argument("--set", default=[], action="append", metavar="KEY=VALUE")
    return parser.parse_args(argv)


def write_scenes(folder: Path, count: int) -> None:
    """JPEGs of 400×300 pixels."""
    folder.mkdir()
    for index in range(count):
        scene = render_scene(0, index, 400).image[:, :300]
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg", quality=90)


def predict_plainly(
    weights: Path,
    settings: dict[str, Any],
    files: list[Path],
    output: Path,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> None:
    """The usual script, under autocast if there is a dtype for it."""
    task, models = tasks.load_models(weights, settings)
    model, data = models["model"].to(device), task.cfg.data
    assert isinstance(data, PhotoData)
    side = [data.image_size] * 2
    for file in files:
        picture = TF.to_dtype(TF.pil_to_tensor(Image.open(file).convert("RGB")), scale=True)
        image = TF.normalize(TF.resize(picture, side, antialias=True), data.mean, data.std)
        with torch.no_grad(), torch.autocast(device.type, amp_dtype, enabled=bool(amp_dtype)):
            saliency = model(image[None].to(device)).float()
        saliency = F.interpolate(saliency, picture.shape[-2:], mode="bilinear")[0, 0]
        codes = (saliency * 255).round().byte().cpu()
        Image.fromarray(codes.numpy()).save(output / f"{file.stem}.png")


def predict_ours(command: list[str]) -> None:
    """predict.py, without its lines."""
    with redirect_stdout(io.StringIO()):
        if predict.main(predict.parse_args(command)):
            raise UserError(f"{command[0]} …: a file could not be predicted.")


def make_work(device: torch.device, predict_all: Callable, *args: Any) -> Work:
    """What the process of a way does."""
    return {"predict": partial(predict_all, *args)}


def stage_times(
    weights: Path, settings: dict[str, Any], files: list[Path], output: Path, device: torch.device
) -> dict[str, float]:
    """Median seconds of every step of ours, alone on one thread."""
    task, models = tasks.load_models(weights, settings)
    cfg = task.cfg
    models = prepare(models, device, choose_amp_dtype(cfg.eval.amp, device, "eval.amp"))
    predictor = Predictor(task, models, device)
    times: dict[str, list[float]] = {"read": [], "forward": [], "render": [], "write": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        done: list[Any] = []
        times[stage].append(common.seconds(lambda: done.append(work()), device))
        return done[0]

    with torch.inference_mode():
        for file in files:
            job = Job(file, {"map": output / f"{file.stem}.png"})
            picture = timed("read", partial(predictor.read, job))
            if picture.error:
                raise UserError(picture.error)
            timed("forward", partial(predictor.predict, [picture]))
            maps = {"kinds": ["map"], "threshold": None, "prediction": picture.prediction}
            maps |= picture.images
            pictures = timed("render", partial(task.render, **maps))
            timed("write", partial(save_image, pictures["map"], job.outputs["map"]))
    torch.set_num_threads(threads)
    return {stage: median(each[1:] or each) for stage, each in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device, settings = torch.device(args.device), parse_assignments(args.set)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = args.weights or folder / "u2net_lite.pth"
        if not args.weights:
            torch.save(u2net_lite().state_dict(), weights)
        if not args.images:
            write_scenes(folder / "photographs", args.count)
        files = list_images(args.images or folder / "photographs")[: args.count]
        amp_dtype = choose_amp_dtype(tasks.load_models(weights, settings)[0].cfg.eval.amp, device)
        ways: dict[str, tuple] = {}
        for name in common.names_of_ways(device, amp_dtype):
            dtype = amp_dtype if name.startswith("plain amp") else None
            (output := folder / name).mkdir()
            ways[name] = (predict_plainly, weights, settings, files, output, device, dtype)
        command = [*map(str, files), "-o", str(output), "--weights", str(weights)]
        command += ["--device", args.device, *(f"--set={each}" for each in args.set)]
        ways["ours"] = (predict_ours, command)
        set_up = list(filter(common.has_settings, ways))
        with processes_of(args.device, make_work, ways, set_up) as worlds:
            work = {name: partial(world, "predict") for name, world in worlds.items()}
            times = common.take_turns(work, args.rounds)
        stages = stage_times(weights, settings, files, output, device)
    row: dict[str, Any] = {"work": f"{len(files)} photographs"}
    row |= {f"{way} img/s": len(files) / median(each) for way, each in times.items()}
    row |= {f"× {way}": common.ratio(times, "ours", way) for way in times if way != "ours"}
    rows = [row]
    total = sum(stages.values())
    rows += [
        {"work": stage, "ours ms": 1000 * each, "share": each / total}
        for stage, each in stages.items()
    ]
    common.report(args, rows)


if __name__ == "__main__":
    with clean_errors():
        main()
