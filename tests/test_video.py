"""Videos, decoded by a stand-in for ffmpeg: a script that writes what the real one would."""

import os
import shutil
import socket
import stat
import subprocess
import sys
from io import BufferedReader, BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_image_io import within
from test_predict import predictor

from train_utils import video
from train_utils.errors import UserError
from train_utils.image_io import MAX_PIXELS, save_image
from train_utils.prediction_files import plan
from train_utils.video import is_video, read_frames, read_ppm

# Frames of 4×2 pixels whose red is their number, from 1 on.
FRAMES = """#!{python}
import os, resource, sys, time
if "-h" in sys.argv:
    print({options!r})
    sys.exit()
open(__file__ + ".pid", "w").write(str(os.getpid()))
open(__file__ + ".argv", "w").write("\\n".join(sys.argv))
assert "-nostdin" in sys.argv and sys.argv[sys.argv.index("-i") + 1].endswith({name!r})
for number in range(1, {count} + 1):
    sys.stdout.buffer.write(b"P6\\n4 2\\n255\\n" + bytes((number % 256, 7, 9)) * 8)
    sys.stdout.buffer.flush()
{end}
"""


def install(folder, monkeypatch, count, end="", name="clip.mp4", options="-fps_mode"):
    """A video, and an ffmpeg on the PATH that gives `count` frames of it and then does `end`."""
    (folder / name).write_bytes(bytes(1000))
    program = folder / "bin" / "ffmpeg"
    program.parent.mkdir(exist_ok=True)
    values = {"count": count, "end": end, "name": name, "options": options}
    text = FRAMES.format(python=sys.executable, **values)
    program.write_text(text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_videos_are_told_by_their_suffix():
    assert is_video("a.mp4") and is_video(Path("b/C.MOV"))
    assert not is_video("a.gif") and not is_video("mp4")


def test_frames_in_order(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 5)
    frames = list(read_frames(tmp_path / "clip.mp4"))
    assert [frame[0].unique().tolist() for frame in frames] == [[n] for n in range(1, 6)]
    assert frames[0].shape == (3, 2, 4) and frames[0].dtype == torch.uint8
    assert frames[0][:, 0, 0].tolist() == [1, 7, 9]


def test_closing_ends_a_video_that_does_not_end(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 3, "time.sleep(60)")
    frames = read_frames(tmp_path / "clip.mp4")
    assert [next(frames)[0, 0, 0].item() for _ in range(3)] == [1, 2, 3]
    frames.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "bin" / "ffmpeg.pid").read_text()), 0)


def test_a_failure_comes_after_the_frames_before_it_with_ffmpegs_own_words(tmp_path, monkeypatch):
    said = "print('[mov @ 0x7f] moov \\x1b gone', file=sys.stderr); print('last', file=sys.stderr)"
    end = f"{said}; sys.exit(3)"
    install(tmp_path, monkeypatch, 2, end)
    frames = read_frames(tmp_path / "clip.mp4")
    assert next(frames).shape == next(frames).shape == (3, 2, 4)
    with pytest.raises(UserError, match=r"clip\.mp4: .* after 2 frames \(moov \\x1b gone\)"):
        next(frames)


@pytest.mark.parametrize(
    "end, problem",
    [
        ("", "failed after 0 frames"),
        ("sys.stdout.buffer.write(b'P6\\n4 2\\n65535\\n')", "frame 1 is not what"),
        ("sys.stdout.buffer.write(b'P6\\n99999 9999\\n255\\n')", "frame 1 has 99999×9999 pixels"),
        ("sys.stdout.buffer.write(b'P6\\n4 2\\n255\\nabc'); sys.exit(1)", "frame 1 is cut off"),
        ("sys.stdout.buffer.write(b'P6\\n-3 5\\n255\\n')", "frame 1 is not what"),
        ("sys.stdout.buffer.write(b'P6\\n0 5\\n255\\n')", "frame 1 is not what"),
    ],
)
def test_what_is_no_frame_is_an_error(end, problem, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 0, end)
    with pytest.raises(UserError, match=problem):
        list(read_frames(tmp_path / "clip.mp4"))


def test_many_messages_do_not_block(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 2, "sys.stderr.write('x' * 10**6)")
    frames = read_frames(tmp_path / "clip.mp4")
    assert [next(frames)[0, 0, 0].item() for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match=r"reported damage after 2 frames \(x{200}\)"):
        next(frames)  # ffmpeg goes on after damage, and its exit status is 0


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_script_called_ffmpeg_ends_with_all_that_it_started(tmp_path, monkeypatch):
    script = tmp_path / "ffmpeg"
    # `cat` is a process of its own, and waits for a reader.
    script.write_text('#!/bin/sh\n[ "$4" = -h ] || cat /dev/zero\ntrue\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(bytes(50))
    with within(30), pytest.raises(UserError, match="not what ffmpeg was asked for"):
        next(read_frames(clip))


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-fps_mode", "-vsync"])
def test_ffmpeg_gets_bounds(option, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 1, options=option)
    list(read_frames(tmp_path / "clip.mp4"))
    argv = (tmp_path / "bin" / "ffmpeg.argv").read_text().split("\n")
    given = dict(pairwise(argv))
    assert given[option] == "passthrough"  # frames as they are stored, not at a constant rate
    assert given["-protocol_whitelist"] == "file" and given["-map"] == "0:V:0"
    demuxers = given["-format_whitelist"].split(",")
    assert {"mov", "matroska", "avi", "mpeg", "asf"} <= set(demuxers)
    assert not {"concat", "hls", "image2", "lavfi", "dash", "sdp"} & set(demuxers)
    assert MAX_PIXELS <= int(given["-max_pixels"]) <= 1.1 * MAX_PIXELS
    assert argv.index("-max_pixels") < argv.index("-threads") < argv.index("-i")


def test_more_frames_than_a_file_can_hold_end_it(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 10**6)
    frames = read_frames(tmp_path / "clip.mp4")
    assert [next(frames).shape for _ in range(125)] == [(3, 2, 4)] * 125  # 1,000 bytes, 8 for each
    with pytest.raises(UserError, match=r"clip\.mp4: frame 126 is one more than .* \(125\)\. \w+"):
        next(frames)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "bin" / "ffmpeg.pid").read_text()), 0)


@pytest.mark.parametrize(
    "begun", ["", "sys.stdout.buffer.write(b'P6\\n4 2\\n'); sys.stdout.flush();"]
)
def test_a_silent_ffmpeg_is_ended(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_PATIENCE", 1)
    install(tmp_path, monkeypatch, 2, f"{begun}time.sleep(600)")
    frames = read_frames(tmp_path / "clip.mp4")
    assert next(frames).shape == next(frames).shape
    with pytest.raises(UserError, match=r"clip\.mp4: .*no frame for 1 seconds\)\. Check that"):
        next(frames)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory by Linux' means")
def test_ffmpegs_memory_is_bounded(tmp_path, monkeypatch):
    limit = "resource.getrlimit(resource.RLIMIT_DATA)[0]"
    install(tmp_path, monkeypatch, 1, f"time.sleep(0.2); sys.exit(f'allocate {{{limit}}}')")
    with pytest.raises(UserError, match=rf"\(allocate {4 * 2**30}\)\. It needs more memory"):
        list(read_frames(tmp_path / "clip.mp4"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "missing"])
def test_only_regular_files_are_opened(kind, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 1, "time.sleep(600)")
    path = tmp_path / "x.mp4"
    problem = "a pipe or a device"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket may have a hundred characters
        socket.socket(socket.AF_UNIX).bind("x.mp4")
    elif kind == "folder":
        path.mkdir()
        problem = "it is a folder"
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        problem = "no such file"
    with pytest.raises(UserError, match=rf"x\.mp4: .*{problem}"):
        next(read_frames(path))
    assert not (tmp_path / "bin" / "ffmpeg.pid").exists()


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs a real ffmpeg")
def test_bombs_with_a_real_ffmpeg(tmp_path):
    def make(*arguments):
        subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments], cwd=tmp_path, check=True)

    # 19 frames 1 ms apart, and one 3,040 s later.
    late = ["-vf", r"setpts='if(lt(N\,19)\,N\,N*160000)'", "-fps_mode", "passthrough"]
    make("-f", "lavfi", "-i", "color=red:s=16x16:r=1000:d=0.02", *late, "-c:v", "ffv1", "gap.mkv")
    assert len(list(read_frames(tmp_path / "gap.mkv"))) == 20
    large = f"color=red:s=12000x{MAX_PIXELS // 10_000}:r=1:d=1"
    make("-f", "lavfi", "-i", large, "-pix_fmt", "gray", "-c:v", "png", "large.mkv")
    with pytest.raises(UserError, match=r"max pixel count .* Scale it down"):
        list(read_frames(tmp_path / "large.mkv"))
    for text in ("ffconcat version 1.0\nfile gap.mkv\n", "#EXTM3U\n#EXTINF:1,\ngap.mkv\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(UserError, match="failed after 0 frames"):
            list(read_frames(tmp_path / "list.mp4"))


def test_a_stream_of_ppms_by_hand():
    two = b"P6\n1 2\n255\n" + bytes(range(6)) + b"P6\n1 1\n255\n" + bytes((9, 10, 11))
    stream = BufferedReader(BytesIO(two))
    assert read_ppm(stream).tolist() == [[[0], [3]], [[1], [4]], [[2], [5]]]
    assert read_ppm(stream).tolist() == [[[9]], [[10]], [[11]]]
    assert read_ppm(stream) is None


def test_without_ffmpeg_the_error_tells_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    clip = tmp_path / "clip.mp4"
    clip.touch()
    with pytest.raises(UserError) as error:
        plan([str(clip)], tmp_path / "out", ["map"])
    stem = tmp_path / "clip"
    command = f"mkdir {stem} && ffmpeg -i file:{clip} file:{stem}/%06d.png"
    assert command in str(error.value)


def test_frames_become_numbered_files_beside_other_inputs(tmp_path, monkeypatch):
    """A video that fails in the middle keeps what it gave; the image after it is still done."""
    install(tmp_path, monkeypatch, 3, "sys.exit('cut off')")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    inputs = [str(tmp_path / name) for name in ("clip.mp4", "b.png")]
    jobs = plan(inputs, tmp_path / "out", ["map", "cutout"])
    done = list(predictor("cpu").run(jobs))
    assert [bool(picture.error) for picture in done] == [False] * 3 + [True, False]
    assert "cut off" in done[3].error
    out = tmp_path / "out"
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    frames = [f"clip/00000{n}{kind}.png" for n in (1, 2, 3) for kind in ("", "_cutout")]
    assert names == ["b.png", "b_cutout.png", *frames]
    assert Image.open(out / "clip" / "000002.png").getextrema() == (2, 2)
    # A second run may write the same frames again; what others have put there it may not.
    plan(inputs, out, ["map"])
    Image.new("L", (2, 2)).save(out / "clip" / "mine.png")
    with pytest.raises(UserError, match=r"mine\.png: exists and was not written by predict"):
        plan(inputs, out, ["map"])


def test_frames_collide_with_nothing(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, 1)
    for name in ("clip.mp4", "clip.mov"):
        (tmp_path / name).touch()
    (tmp_path / "x" / "clip").mkdir(parents=True)
    save_image(Image.new("L", (2, 2)), tmp_path / "x" / "clip" / "000001.png")

    def refusal(*inputs, output="out", **extras):
        with pytest.raises(UserError) as error:
            given = [str(tmp_path / name) for name in inputs]
            plan(given, tmp_path / output, ["map"], extras)
        return str(error.value)

    assert "clip.mov and" in refusal("clip.mp4", "clip.mov")
    assert "would both be written there" in refusal("clip.mp4", "x")
    assert "would overwrite an input" in refusal("clip.mp4", "x", output="x")
    trimap = str(tmp_path / "x" / "clip" / "000001.png")
    assert "its frames need a trimap each" in refusal("clip.mp4", trimap=trimap)
