"""What happens between the files that predict.py reads and those that it writes."""

import threading
import time

import pytest
import torch
from PIL import Image

from tasks import matting, saliency
from train_utils.image_io import read_image, save_image
from train_utils.inference import GPU_CHUNK
from train_utils.prediction import Job, Predictor, remove_frames_after
from train_utils.prediction_files import plan
from train_utils.threads import in_threads
from train_utils.tiles import MIN_PIXELS
from transforms import UNKNOWN


class BesideCPU:
    """A device that is handled as a GPU is; tensors stay where they are."""

    type = "beside"


def fake_task(forward=lambda models, x: x[:, :1] / 255):
    """Saliency of 8×8 inputs in which each pixel predicts its own red."""
    cfg = saliency.Config()
    cfg.data.image_size = 8
    task = saliency.Task(cfg)
    task.predict = forward
    return task


def predictor(device, task=None):
    made = Predictor(task or fake_task(), {}, torch.device("cpu"))
    if device == "beside":
        made.device = BesideCPU()
    return made


@pytest.fixture(autouse=True)
def _tensors_stay(monkeypatch):
    to = torch.Tensor.to

    def fake_to(self, *args, **kwargs):
        stays = args and isinstance(args[0], BesideCPU)
        return self if stays else to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", fake_to)


def photographs(folder, count):
    """Images of two sizes, one of them broken, and their jobs."""
    jobs = []
    for number in range(count):
        path = folder / f"{number:02d}.png"
        size = (8, 8) if number % 3 else (16, 12)
        Image.new("RGB", size, (number, 100, 0)).save(path)
        jobs.append(Job(path, {"map": folder / "out" / path.name}))
    (folder / "02.png").write_bytes(b"no image")
    return jobs


@pytest.mark.parametrize("device", ["cpu", "beside"])
def test_files_come_in_order_and_fail_alone(device, tmp_path):
    jobs = photographs(tmp_path, 3 * GPU_CHUNK + 1)
    done = list(predictor(device).run(jobs))
    assert [picture.job for picture in done] == jobs
    assert [bool(picture.error) for picture in done] == [n == 2 for n in range(len(jobs))]
    assert "02.png" in done[2].error
    for number in set(range(len(jobs))) - {2}:
        written = Image.open(jobs[number].outputs["map"])
        assert written.size == ((8, 8) if number % 3 else (16, 12))
        assert written.getextrema() == (number, number)


@pytest.mark.parametrize("device", ["cpu", "beside"])
def test_an_output_that_cannot_be_written_fails_alone(device, tmp_path):
    jobs = photographs(tmp_path, 4)
    jobs[1] = jobs[1]._replace(outputs={"map": tmp_path / "00.png" / "x.png"})  # below a file
    done = list(predictor(device).run(jobs))
    assert [bool(picture.error) for picture in done] == [False, True, True, False]
    assert "01.png" in done[1].error and "cannot be written" in done[1].error


@pytest.mark.parametrize("device", ["cpu", "beside"])
def test_few_images_are_in_memory_whatever_their_number(device, tmp_path, monkeypatch):
    """Jobs are drawn as they are needed, while the consumer has what came before."""
    monkeypatch.setattr("train_utils.prediction.own_cores", lambda: 2)
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (8, 8)), path)
    drawn = 0

    def jobs():
        nonlocal drawn
        for number in range(200):
            drawn += 1
            yield Job(path, {"map": tmp_path / "out" / f"{number}.png"})

    # A chunk at the device, and twice the threads and one, at either side of it.
    limit = {"cpu": 2 * torch.get_num_threads() + 1, "beside": GPU_CHUNK + 2 * (2 * 2 + 1)}[device]
    for done, picture in enumerate(predictor(device).run(jobs()), 1):
        assert not picture.images and picture.prediction is None
        assert drawn - done <= limit
    assert done == 200


def test_inputs_of_one_size_go_together_and_the_last_chunk_is_filled(tmp_path):
    shapes = []

    def forward(models, images):
        shapes.append(tuple(images.shape))
        return images[:, :1] / 255

    jobs = photographs(tmp_path, GPU_CHUNK + 3)
    assert len(list(predictor("beside", fake_task(forward)).run(jobs))) == len(jobs)
    assert shapes == [(GPU_CHUNK, 3, 8, 8)] * 2  # 7 without the broken one, and 3, both filled up


@pytest.mark.parametrize("device", ["cpu", "beside"])
def test_an_interruption_ends_threads_and_the_source(device, tmp_path):
    before, closed = threading.active_count(), []
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (8, 8)), path)

    def jobs():
        try:
            for number in range(10**6):
                yield Job(path, {"map": tmp_path / "out" / f"{number}.png"})
        finally:
            closed.append(True)

    running = predictor(device).run(jobs())
    next(running)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert closed and threading.active_count() == before
    assert len(list((tmp_path / "out").iterdir())) < 100


def test_threads_work_ahead_and_results_keep_their_order():
    both = threading.Barrier(2, timeout=10)  # broken unless two jobs run at one time

    def job(number):
        both.wait()
        time.sleep(0.002 * (number % 2))
        return number

    assert list(in_threads(job, range(8), threads=2)) == list(range(8))


def test_an_exception_in_a_thread_reaches_the_consumer():
    results = in_threads(lambda x: 1 // x, [1, 0, 1], threads=1)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def too_large_beyond(pixels, error):
    """A network that fails for inputs of more pixels, and gives half an alpha for others."""
    sizes = []

    def network(images):
        sizes.append(images.shape[-2] * images.shape[-1])
        if sizes[-1] > pixels:
            raise error
        return torch.full_like(images[:, :1], 0.5)

    return network, sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to …"),
    ],
)
def test_too_little_memory_means_smaller_tiles(error):
    network, sizes = too_large_beyond(700_000, error)
    made = Predictor(matting.Task(matting.Config()), {"model": network}, torch.device("cpu"))
    batch = torch.full((1, 4, 1600, 1600), UNKNOWN, dtype=torch.uint8)
    outputs, warning = made.forward(batch)
    assert outputs.shape == (1, 1, 1600, 1600) and (outputs == 0.5).all()
    # 2,560,000 pixels whole, then tiles of at most a half, then of at most a quarter of them.
    assert sizes[:2] == [1600 * 1600, 960 * 960] and max(sizes[2:]) <= 640_000
    assert "too little memory for 1,280,000 pixels" in warning
    assert "tiles of 640,000" in warning and "eval.max_pixels=640000" in warning
    assert made.task.cfg.eval.max_pixels == 2**22  # the next image gets its own try


def test_too_little_memory_for_the_smallest_tile_is_an_error():
    network, sizes = too_large_beyond(0, RuntimeError("not enough memory"))
    made = Predictor(matting.Task(matting.Config()), {"model": network}, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not enough memory"):
        made.forward(torch.full((1, 4, 1000, 1100), UNKNOWN, dtype=torch.uint8))
    assert len(sizes) == 3 and 1_100_000 // 4 >= MIN_PIXELS > 1_100_000 // 8


def test_too_little_memory_without_tiles_is_that_files_error(tmp_path):
    def forward(models, images):
        raise RuntimeError("not enough memory")

    (done,) = predictor("cpu", fake_task(forward)).run(photographs(tmp_path, 1))
    assert done.error.startswith(f"{tmp_path / '00.png'}: out of memory: use") and not done.warning


def test_other_errors_of_a_network_are_not_retried():
    network, sizes = too_large_beyond(0, RuntimeError("a bug"))
    made = Predictor(matting.Task(matting.Config()), {"model": network}, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="a bug"):
        made.forward(torch.full((1, 4, 1000, 1000), UNKNOWN, dtype=torch.uint8))
    assert len(sizes) == 1


@pytest.mark.parametrize("kinds", [["map"], ["map", "overlay"]])
def test_images_scaled_down_by_their_decoder_are_written_at_their_own_size(kinds, tmp_path):
    """The network sees what evaluation under data.draft would show it, an overlay all pixels."""
    noise = Image.effect_noise((160, 96), 60).convert("RGB")
    noise.save(tmp_path / "a.jpg")
    task = fake_task()
    task.cfg.data.draft = True  # at least 2 · image_size = 16 pixels: of an eighth, one side has 12
    job = Job(tmp_path / "a.jpg", {kind: tmp_path / f"{kind}.png" for kind in kinds})
    made = predictor("cpu", task)
    picture = made.read(job)
    small = read_image(tmp_path / "a.jpg", 16)
    assert small.shape == (3, 24, 40)
    assert torch.equal(picture.network_input, task.network_input(small))
    assert picture.images["image"].shape == (3, 96, 160)
    (done,) = made.run([job])
    assert not done.error and Image.open(tmp_path / "map.png").size == (160, 96)
    if "overlay" in kinds:
        assert torch.equal(picture.images["image"], read_image(tmp_path / "a.jpg"))


def test_an_empty_file_may_be_replaced(tmp_path):
    """A power failure can leave one, and it holds nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").touch()
    assert len(plan([str(tmp_path / "a.jpg")], out, ["map"])) == 1


def test_a_shorter_video_leaves_no_frames_of_a_longer_one(tmp_path):
    pattern = tmp_path / "%06d.png"
    for number in range(1, 6):
        save_image(Image.new("L", (2, 2)), tmp_path / f"{number:06d}.png")
    (tmp_path / "000005.png").write_bytes(b"somebody's own")
    remove_frames_after(2, Job(tmp_path / "clip.mp4", {"map": pattern}))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["000001.png", "000002.png", "000005.png"]
