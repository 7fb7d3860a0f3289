"""Frames of video files, decoded one after the other by the program `ffmpeg`."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import closing
from io import BufferedReader
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from train_utils.errors import UserError, typed
from train_utils.image_io import MAX_PIXELS, PathLike, printable
from train_utils.threads import in_threads

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv")


def is_video(path: PathLike) -> bool:
    """Whether a file is taken for a video, by its suffix. An animated GIF is an image."""
    return os.fspath(path).lower().endswith(VIDEO_SUFFIXES)


def require_ffmpeg(path: PathLike) -> None:
    """Raise a UserError, which tells how to do without it, if there is no ffmpeg for a video."""
    if not shutil.which("ffmpeg"):
        folder = Path(path).with_suffix("")
        frames = f"file:{os.fspath(folder).replace('%', '%%')}/%06d.png"
        raise UserError(
            f"{path}: videos are decoded by the program ffmpeg, which is not installed (or not "
            "on the PATH). Install it, or extract the frames where it is, by mkdir "
            f"{typed(folder)} && ffmpeg -i {typed(f'file:{path}')} {typed(frames)}, and name that "
            "folder."
        )


def read_frames(path: PathLike) -> Generator[Tensor, None, None]:
    """The frames of a video in order, upright, each uint8 [3, H, W]; a few are read ahead.

    They are those that `ffmpeg -i` extracts: of a video with a varying frame rate, frames at a
    constant one. Raises UserError if ffmpeg is missing, or where it fails, after the frames before.
    Closing the generator ends ffmpeg.
    """
    require_ffmpeg(path)
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file"]
    command += ["-i", f"file:{os.fspath(path)}", "-map", "0:v:0"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as messages:  # in a pipe, many of them would block ffmpeg
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
        )
        assert isinstance(process.stdout, BufferedReader)
        frames = 0
        with process.stdout, closing(in_threads(read_ppm, repeat(process.stdout), 1)) as ahead:
            try:
                for frame in iter(ahead.__next__, None):
                    frames += 1
                    yield frame
                status = process.wait()
            except ValueError as error:
                raise UserError(f"{printable(path)}: frame {frames + 1} {error}.") from error
            finally:
                process.kill()  # first, or a frame that is being read might keep all waiting
                process.wait()
        messages.seek(0)
        lines = messages.read().decode(errors="backslashreplace").strip().splitlines()
        if status or not frames or lines:  # ffmpeg goes on after damage, and ends with status 0
            what = "failed" if status or not frames else "reported damage"
            problem = lines[-1][:200] if lines else f"exit status {status}"
            raise UserError(
                f"{printable(path)}: ffmpeg {what} after {frames} frames ({printable(problem)}). "
                "Check that the file is an intact video."
            )


def read_ppm(stream: BufferedReader) -> Tensor | None:
    """The next image of a stream of binary PPMs of 8 bits, uint8 [3, H, W]; None at its end.

    Raises ValueError for anything else, and for more than MAX_PIXELS.
    """
    header = stream.readline() + stream.readline() + stream.readline()
    if not header:
        return None
    fields = header.split()
    if len(fields) != 4 or fields[0] != b"P6" or fields[3] != b"255":
        raise ValueError("is not what ffmpeg was asked for")
    if not (fields[1].isdigit() and fields[2].isdigit() and int(fields[1]) * int(fields[2])):
        raise ValueError("is not what ffmpeg was asked for")
    width, height = int(fields[1]), int(fields[2])
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width}×{height} pixels, more than {MAX_PIXELS:,}")
    pixels = torch.empty(height, width, 3, dtype=torch.uint8)
    if stream.readinto(pixels.numpy().data) < pixels.numel():
        raise ValueError("is cut off")
    return pixels.permute(2, 0, 1)
