"""predict.py on several processes: files are shared out, each is done once, and all end alike."""

import re

import pytest
import torch
from distributed import Script, on_ranks, run_script
from PIL import Image
from test_scripts import held_port

from src import u2net_lite
from train_utils.errors import UserError
from train_utils.image_io import save_image
from train_utils.prediction import Job, share_of

OPTIONS = ("--weights", "w.pth", "--device", "cpu", "--set", "data.image_size=33")


@pytest.fixture
def photos(tmp_path):
    """Five photographs, of which the fourth is broken, and weights."""
    torch.manual_seed(0)
    torch.save(u2net_lite().state_dict(), tmp_path / "w.pth")
    (tmp_path / "photos").mkdir()
    for number in range(5):
        noise = Image.effect_noise((40, 30), 60).convert("RGB")
        save_image(noise, tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"no image")
    return tmp_path


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.slow
def test_files_are_shared_out_by_torchrun_and_done_once(photos):
    run_script(photos, "predict.py", "photos", *OPTIONS, "-o", "alone", code=1)
    done = run_script(photos, "predict.py", "photos", *OPTIONS, "-o", "out", processes=2, code=1)
    lines = done.stdout.splitlines()
    assert "w.pth → 5 file(s) on 2 processes" in lines
    written = sorted(line for line in lines if re.match(r"photos/\d", line))
    assert written == [f"photos/{n}.png → out/{n}.png" for n in (0, 1, 2, 4)]
    assert [line for line in lines if "done" in line] == ["4 done, 1 failed"]
    assert done.stderr.count("error: photos/3.png: ") == 1
    assert outputs(photos / "out") == outputs(photos / "alone")
    assert len(outputs(photos / "out")) == 4


@pytest.mark.slow
def test_tasks_of_srun_end_alike_and_a_missing_one_ends_all(photos):
    """A file that fails is every process's failure; so is a process that cannot start."""
    for weights, said in (("w.pth", "4 done, 1 failed"), ("none.pth", "")):
        tasks = []
        with held_port() as port:
            for rank in ("0", "1"):
                env = {f"SLURM_{name}": rank for name in ("PROCID", "LOCALID")}
                env |= {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(port)}
                arguments = ["photos", *OPTIONS, "-o", f"of {weights}"]
                arguments += ["--weights", weights] if rank == "1" else []
                tasks.append(Script(photos, "predict.py", *arguments, **env))
            first, second = (task.wait(100) for task in tasks)
        assert [first.returncode, second.returncode] == [1, 1], first.stderr + second.stderr
        assert said in first.stdout and "done" not in second.stdout
    assert "lost the other processes; their errors tell why" in first.stderr
    assert "none.pth: no such file" in second.stderr
    assert not (photos / "of none.pth").exists()


def _shares(folder, counts):
    """What this rank would do of so many jobs by rank, or its error."""
    rank = torch.distributed.get_rank()
    jobs = [Job(folder / f"{n}.png", {"map": folder / f"out/{n}.png"}) for n in range(counts[rank])]
    try:
        return [job.source.name for job in share_of(jobs)]
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_processes_that_see_other_files_are_told(tmp_path):
    shares = on_ranks(3, _shares, tmp_path, [4, 4, 4])
    assert shares == [["0.png", "3.png"], ["1.png"], ["2.png"]]
    said = on_ranks(2, _shares, tmp_path, [4, 3])
    assert said[0] == said[1]
    assert said[0].startswith(
        "rank 1 finds 3 file(s), and rank 0 4, or others. Start all processes"
    )


def test_one_process_has_all_jobs(tmp_path):
    jobs = [Job(tmp_path / "a.png", {})] * 3
    assert share_of(jobs) == jobs
