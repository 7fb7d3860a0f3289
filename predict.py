"""Predict on images and videos: files, folders, patterns in, maps of the input's own size out.

    python predict.py photo.jpg                             → predictions/photo.png
    python predict.py photos -o maps --cutout --overlay     a folder tree, mirrored below maps/
    python predict.py "photos/*.jpg" --weights runs/…/model_best.pth
    python predict.py clip.mp4                              → predictions/clip/000001.png … (ffmpeg)
    python predict.py loop.gif scan.tif                     each frame or page, likewise
    python predict.py photo.jpg --weights u2netp.pth --set data.mean=[0,0,0] --set data.std=[1,1,1]
    python predict.py photo.jpg --trimap photo_trimap.png --cutout       matting
    python predict.py photos --trimap trimaps                            trimaps of the same names

The weights file says which network and preprocessing to use; both are exactly those that its scores
were measured with. Without --weights the newest best checkpoint under runs/ is taken. What the map
is depends on the task, whose `render` draws it: grey values, a label map (palette PNG of class
indices), an image. A trimap is 0 on the background, 128 where unknown, 255 on the foreground.
"""

from launch.heap import keep_freed_memory

keep_freed_memory()  # before the imports that take seconds

import argparse
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import tasks
from train_utils.amp import choose_amp_dtype
from train_utils.arguments import new_parser
from train_utils.config import parse_assignments
from train_utils.device import allow_tf32, resolve_device, take_device
from train_utils.errors import UserError, printable, tell
from train_utils.inference import prepare
from train_utils.listing import Kind
from train_utils.prediction import Picture, Predictor
from train_utils.prediction_files import plan, remarks
from train_utils.run_folder import newest_best_checkpoint
from train_utils.setup import clean_errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `extras` holds the inputs beside the images that were given, by name."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMG|VIDEO|DIR|GLOB")
    add("-o", "--output", default="predictions", metavar="DIR", help="default: predictions")
    add("--weights", metavar="FILE", help="default: the newest best checkpoint under runs/")
    add("--config", metavar="YAML", help="recipe of weights that bring none with them")
    add("--cutout", action="store_true", help="also <name>_cutout.png: RGBA, the map as alpha")
    add(
        "--overlay",
        action="store_true",
        help="also <name>_overlay.png: the map tinted on the image",
    )
    add("--threshold", type=float, metavar="T", help="write 255 where the map is > T, else 0")
    extras = {name for task in tasks.all_tasks().values() for name in task.EXTRA_INPUTS}
    for name in sorted(extras):
        about = f"the image's {name}, where the network needs one, or a folder of them"
        add(f"--{name}", metavar="FILE|DIR", help=about)
    add("--device", default="auto")
    add("--set", default=[], action="append", metavar="KEY=VALUE", help="override a config key")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error("--threshold: must lie between 0 and 1")
    args.extras = {name: path for name, path in vars(args).items() if name in extras and path}
    return args


def main(args: argparse.Namespace) -> int:
    """Predict on every input; returns the number of files (of a video: frames) that failed."""
    left_out: dict[Kind, list[Path]] = {}
    jobs = plan(args.inputs, Path(args.output), kinds_of(args), args.extras, left_out)

    device = resolve_device(args.device)
    take_device(device)
    weights = args.weights or newest_best_checkpoint()
    task, models = tasks.load_models(weights, parse_assignments(args.set), args.config)
    check_flags(args, task.PREDICT_FLAGS, str(weights))
    cfg = task.cfg
    allow_tf32(cfg.eval.tf32)
    models = prepare(models, device, choose_amp_dtype(cfg.eval.amp, device, "eval.amp"))
    print(printable(f"{weights} → {len(jobs)} file(s)"), flush=True)

    done = failed = 0
    predictor = Predictor(task, models, device, args.threshold)
    with closing(predictor.run(jobs)) as pictures:
        for picture in pictures:
            report(picture)
            failed += bool(picture.error)
            done += not picture.error
    print(printable(f"{done} done, {failed} failed{remarks(left_out)}"), flush=True)
    return failed


def kinds_of(args: argparse.Namespace) -> list[str]:
    """The kinds of output that are asked for."""
    return ["map", *(kind for kind in ("cutout", "overlay") if getattr(args, kind))]


def check_flags(args: argparse.Namespace, flags: Mapping[str, bool], weights: str) -> None:
    """UserError for a flag that the network has no use for, or lacks (name → required?)."""
    given = [*kinds_of(args)[1:], *args.extras]
    given += [] if args.threshold is None else ["threshold"]
    for name in given:
        if name not in flags:
            offered = ", ".join(f"--{flag}" for flag in flags) or "none of these"
            raise UserError(
                f"--{name}: {weights} has no use for it; its network takes {offered}. Leave it out."
            )
    for name, needed in flags.items():
        if needed and name not in given:
            raise UserError(
                f"--{name}: {weights} needs one beside every image. Add --{name} FILE, or a folder "
                "with files of the images' names."
            )


def report(picture: Picture) -> None:
    """Print what has become of an input."""
    source = picture.job.source
    if picture.warning:
        tell(f"warning: {source}: {picture.warning}")
    if picture.error:
        tell(f"error: {picture.error}")
    else:
        outputs = ", ".join(map(str, picture.job.outputs.values()))
        print(printable(f"{source} → {outputs}"), flush=True)


if __name__ == "__main__":
    with clean_errors():
        sys.exit(1 if main(parse_args()) else 0)
