"""Frames of video files, decoded one after the other by the program `ffmpeg`.

A video may come from anywhere, so ffmpeg gets bounds: a regular file of a kind that is named here,
its first video stream only, no other file and no network, frames of MAX_PIXELS, as many as a file
of its size can hold, and, on Linux, 4 GiB of memory. It is ended if it gives nothing for a minute.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import closing, suppress
from functools import partial
from io import BufferedReader
from itertools import repeat
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from train_utils.errors import UserError, typed
from train_utils.image_io import MAX_PIXELS, PathLike, require_file
from train_utils.threads import in_threads

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv")

_DEMUXERS = "mov,m4v,matroska,avi,mpeg,mpegvideo,mpegts,asf"  # which read these, in ffmpeg's words
_THREADS = 4  # that decode; each holds frames, so 100 million pixels take 4 GiB
_MEMORY = 4 * 2**30
_PATIENCE = 60  # seconds
# Of all codecs, sizes and containers tried, a picture that does not change took 20 bytes at least.
_BYTES_PER_FRAME = 8
_MESSAGES = 20  # of ffmpeg's, that are kept: the first names the cause

_FIXES = {
    "not on whitelist": "It is no video that is taken, whatever its name says: convert it to MP4.",
    "max pixel count": "Scale it down.",
    "allocate": "It needs more memory than there is, or than 4 GiB: scale it down.",
    "pixels, more": "Scale it down.",
    "no frame for": "Check that the file is an intact video on a disk that answers.",
    "can hold": "Nobody films that: encode the video anew, or remove it.",
}


def is_video(path: PathLike) -> bool:
    """Whether a file is taken for a video, by its suffix; an animated GIF is an image of frames."""
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

    Every frame comes once, whatever its time. Raises UserError if ffmpeg is missing, or where it
    fails or breaks a bound, after the frames before. Closing the generator ends ffmpeg.
    """
    require_ffmpeg(path)
    most = require_file(path).st_size // _BYTES_PER_FRAME
    ffmpeg, frames, problem = _Ffmpeg(path), 0, ""
    frames_ahead = in_threads(_Ffmpeg.next_frame, repeat(ffmpeg), 1)
    with ffmpeg.process, closing(frames_ahead) as ahead:
        try:
            for frame in iter(ahead.__next__, None):
                if frames == most:
                    raise ValueError(f"is one more than a file of its size can hold ({most:,})")
                frames += 1
                yield frame
            ffmpeg.process.wait()
        except ValueError as error:
            problem = f"frame {frames + 1} {error}"
        finally:
            ffmpeg.end()  # first, or a frame that is being read might keep all waiting
    # ffmpeg goes on after damage, and ends with status 0.
    status, messages = ffmpeg.process.returncode, ffmpeg.messages
    if problem or status or not frames or messages:
        raise UserError(f"{path}: {_explained(status, frames, problem, messages)}")


class _Ffmpeg:
    """A running ffmpeg, which writes a video's frames to its standard output as PPMs.

    messages: the first lines that it has written to its standard error.
    """

    def __init__(self, path: PathLike) -> None:
        # It counts the pixels of rows that it has padded, hence the tenth more.
        command = ["ffmpeg", "-v", "error", "-nostdin", "-max_pixels", str(MAX_PIXELS * 11 // 10)]
        command += ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS]
        command += ["-threads", str(_THREADS), "-i", f"file:{os.fspath(path)}", "-map", "0:V:0"]
        command += [*_each_frame_once(), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # In a session of its own: where `ffmpeg` is a script, what that starts is ended as well.
        self.process = subprocess.Popen(
            [*command, "-"], stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True
        )
        if hasattr(resource, "prlimit"):  # Linux
            with suppress(OSError):
                resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        self.messages: list[str] = []
        self._awaited_since = math.inf
        self._ended = Event()
        self._threads = [Thread(target=self._listen), Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()

    def next_frame(self) -> Tensor | None:
        """See `read_ppm`."""
        assert isinstance(self.process.stdout, BufferedReader)  # for mypy
        self._awaited_since = time.monotonic()
        try:
            return read_ppm(self.process.stdout)
        finally:
            self._awaited_since = math.inf

    def end(self) -> None:
        """End ffmpeg, unless it has ended, and the threads beside it."""
        self._kill()
        self.process.wait()
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(1):
            if time.monotonic() - self._awaited_since > _PATIENCE:
                self.messages.insert(0, f"no frame for {_PATIENCE} seconds")
                self._kill()
                return

    def _kill(self) -> None:
        if self.process.poll() is not None:
            return
        if os.name == "posix":
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()

    def _listen(self) -> None:
        assert self.process.stderr  # for mypy
        # All of it is read, or ffmpeg would wait for that.
        for line in iter(partial(self.process.stderr.readline, 1000), b""):
            if len(self.messages) < _MESSAGES and line.strip():
                text = line.decode(errors="backslashreplace").strip()
                self.messages.append(re.sub(r"^(\[[^]]* @ [^]]*\] *)+", "", text))


def _each_frame_once() -> list[str]:
    """The option for frames as they are stored, renamed in ffmpeg 5.1.

    For a constant rate, ffmpeg would fill a gap in the timestamps with millions of frames.
    """
    command = ["ffmpeg", "-nostdin", "-v", "error", "-h", "long"]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return ["-fps_mode" if b"-fps_mode" in asked.stdout else "-vsync", "passthrough"]


def _explained(status: int, frames: int, problem: str, messages: list[str]) -> str:
    """What has gone wrong with a video, in ffmpeg's words where it has said why, and what to do."""
    known = [line for line in messages if any(key in line for key in _FIXES)]
    said = (known or messages or [f"exit status {status}"])[0][:200]
    if not problem:
        what = "failed" if status or not frames else "reported damage"
        problem = f"ffmpeg {what} after {frames} frames ({said})"
    elif messages:
        problem += f" ({said})"
    fixes = [fix for key, fix in _FIXES.items() if key in problem]
    return f"{problem}. {(fixes or ['Check that the file is an intact video.'])[0]}"


def read_ppm(stream: BufferedReader) -> Tensor | None:
    """The next image of a stream of binary PPMs of 8 bits, uint8 [3, H, W]; None at its end.

    Raises ValueError for anything else, and for more than MAX_PIXELS.
    """
    header = b"".join(stream.readline(99) for _ in range(3))
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
