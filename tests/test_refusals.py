"""Bad input is refused before the first step, with its name, the cause and the fix."""

import errno
import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from distributed import fork_server, run_script
from PIL import Image

import predict
import tasks
import train
import validation
from src import u2net_full, u2net_lite
from tasks import saliency
from tasks.matting.trimaps import read_trimap
from train_utils import distributed_utils, init_distributed_mode
from train_utils.amp import choose_amp_dtype
from train_utils.device import resolve_device
from train_utils.distributed_utils import cpu_cores, read_launch_environment
from train_utils.errors import UserError
from train_utils.image_io import save_image
from train_utils.prediction import read_inputs
from train_utils.prediction_files import plan
from train_utils.run_folder import choose_run_folder
from train_utils.scores import write_json
from train_utils.setup import clean_errors, worker_count

REPO = Path(__file__).resolve().parents[1]
TINY = ["--set", "data.image_size=48", "--set", "data.train_size=4", "--set", "data.val_size=2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def refused(module, *argv):
    """The message with which a script refuses its arguments; no run folder may be left."""
    args = module.parse_args(list(map(str, argv)))
    with pytest.raises(UserError) as caught:
        if module is not predict:
            init_distributed_mode(args)
        module.main(args)
    assert not Path("runs").exists()
    return str(caught.value)


def pairs(count, mask_size=(40, 30), missing=()):
    """A folder of photos and one of masks in the present folder."""
    for folder in ("images", "masks"):
        Path(folder).mkdir()
    for i in range(count):
        Image.effect_noise((40, 30), 50).convert("RGB").save(f"images/{i}.jpg")
        if i not in missing:
            Image.new("L", mask_size, 255).save(f"masks/{i}.png")
    return "--images", "images", "--masks", "masks"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", ["train.py", "train_multi_GPU.py", "validation.py"])
def test_missing_gpu_is_one_line_and_a_failure(tmp_path, script):
    done = run_script(tmp_path, script, "--device", "cuda", code=1)
    assert done.stderr.startswith("error: --device cuda: torch sees no GPU. Use --device cpu")
    assert "Traceback" not in done.stderr


def test_fewer_gpus_than_processes(accelerator):
    accelerator("cuda", 2)
    with pytest.raises(UserError, match=r"4 processes on this node but 2 GPU.*nproc_per_node=2"):
        resolve_device("auto", 3, 4)
    assert resolve_device("auto", 1, 2) == torch.device("cuda", 1)
    assert resolve_device("cuda:1", 0, 1) == torch.device("cuda", 1)
    assert resolve_device("cpu", 3, 4) == torch.device("cpu")
    with pytest.raises(UserError, match="2 GPU"):
        resolve_device("cuda:2", 0, 1)


def test_unknown_device_and_half_an_environment(monkeypatch):
    for name in ("gpu", "cuda:", "auto2"):
        with pytest.raises(UserError, match="no such device"):
            resolve_device(name)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="only one of RANK and WORLD_SIZE"):
        read_launch_environment()


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ("RANK=abc WORLD_SIZE=2", "RANK"),
        ("RANK=-1 WORLD_SIZE=2", "RANK"),
        ("RANK= WORLD_SIZE=2", "RANK"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE"),
        ("RANK=2 WORLD_SIZE=2", "RANK"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=x", "LOCAL_RANK"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=99999", "MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=x", "MASTER_PORT"),
        ("SLURM_PROCID=x SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID"),
        ("SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID"),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=x", "SLURM_STEP_NUM_TASKS"),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NNODES=0", "SLURM_NNODES"),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=x", "SLURM_LOCALID"),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=-1", "SLURM_NODEID"),
        (
            "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=x",
            "SLURM_STEP_TASKS_PER_NODE",
        ),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_CPUS_PER_TASK=x", "SLURM_CPUS_PER_TASK"),
    ],
)
def test_malformed_numbers_of_a_launcher(monkeypatch, variables, wrong):
    monkeypatch.setattr(os, "environ", dict(word.split("=") for word in variables.split()))
    with pytest.raises(UserError, match=f"^{wrong}=.*: ") as caught:
        init_distributed_mode(Namespace(device="cpu"))
        cpu_cores()
    with pytest.raises(SystemExit), clean_errors():
        raise caught.value


def test_errors_of_files_are_lines(capsys):
    name = "a" * 300
    for error in (
        OSError(errno.ENAMETOOLONG, "File name too long", name),
        PermissionError(1, "no", "b"),
    ):
        with pytest.raises(SystemExit), clean_errors():
            raise error
    assert f"error: {name}: File name too long. Check" in capsys.readouterr().err
    with pytest.raises(OSError, match="no file"), clean_errors():
        raise OSError("no file")  # a fault of ours or of the system keeps its trace


@pytest.mark.parametrize(
    ("nodes", "tasks", "node", "local_world", "host"),
    [
        ("gpu[07-09,11]", "4(x2),3", "2", 3, "gpu07"),
        ("alpha,beta", "4(x2)", "1", 4, "alpha"),
        ("n[1-2]-ib", "2(x2)", "0", 2, "n1-ib"),
    ],
)
def test_slurm_variables(monkeypatch, nodes, tasks, node, local_world, host):
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_NNODES": "3",
        "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "1234",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone after the test
        monkeypatch.delenv(name)
    assert read_launch_environment() == (5, 11, 1, local_world)
    assert os.environ["MASTER_ADDR"] == host


def test_slurm_tasks_agree_on_a_port_that_others_cannot_guess(monkeypatch):
    """Another step, another job and another srun have another one; MASTER_PORT stays."""
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")

    def port(rank, job="1234", step="0", launcher="41245"):
        variables = {"JOB_ID": job, "STEP_ID": step, "STEP_LAUNCHER_PORT": launcher}
        variables |= {"PROCID": rank, "LOCALID": rank, "STEP_NUM_TASKS": "4", "NNODES": "2"}
        variables |= {"NODEID": rank, "SRUN_COMM_PORT": rank, "STEP_NODELIST": "n[1-2]"}
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("MASTER_PORT", "")
        monkeypatch.delenv("MASTER_PORT")
        read_launch_environment()
        return int(os.environ["MASTER_PORT"])

    assert port("0") == port("1")  # 1 is on another node
    others = [port("0", job="1235"), port("0", step="1"), port("0", launcher="41246")]
    assert len({port("0"), *others}) == 4
    assert all(12000 <= number < 32000 for number in others)
    monkeypatch.setenv("MASTER_PORT", "29500")
    read_launch_environment()
    assert os.environ["MASTER_PORT"] == "29500"


# What Slurm sets, from its sources (src/common/env.c, srun, slurmstepd) and from jobs' listings.
JOB = {"JOB_ID": "7", "NTASKS": "4", "NPROCS": "4", "NNODES": "1", "TASKS_PER_NODE": "4"}
TASK = {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
PTY = {"PTY_PORT": "44152", "PTY_WIN_COL": "144", "PTY_WIN_ROW": "38"}


def step(number, tasks):
    sizes = dict.fromkeys(("STEP_NUM_TASKS", "STEP_TASKS_PER_NODE"), tasks)
    return {"STEP_ID": number, "STEPID": number, "STEP_NUM_NODES": "1", **sizes}


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        pytest.param(JOB, None, id="salloc, its shell where it was called"),
        pytest.param({**JOB, **TASK, **PTY, **step("4294967290", "1")}, None, id="salloc's step"),
        pytest.param({**JOB, **TASK, **PTY, **step("0", "1")}, None, id="srun -n1 --pty bash"),
        pytest.param({**JOB, **TASK, **PTY, **step("0", "4")}, None, id="srun -n4 --pty bash"),
        pytest.param({**JOB, **TASK}, None, id="sbatch without srun, or a server that it starts"),
        pytest.param({**TASK, "NTASKS": "4"}, None, id="a rank and the job's tasks alone"),
        pytest.param({**JOB, **TASK, **step("0", "1")}, None, id="srun -n1 in a job of several"),
        pytest.param({**JOB, **TASK, **step("0", "4")}, 4, id="srun -n4"),
        pytest.param({**JOB, **TASK, "NTASKS": "1", **step("1", "2")}, 2, id="srun --overcommit"),
    ],
)
def test_a_step_of_several_tasks_is_known_by_the_step_s_own_variables(
    variables, tasks, monkeypatch
):
    """Whoever else is taken for a task would wait ten minutes for others that never come."""
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone after the test
        monkeypatch.delenv(name)
    launch = read_launch_environment()
    assert (launch and launch.world_size) == tasks
    if not launch:
        args = Namespace(device="cpu")
        init_distributed_mode(args)
        assert (args.world_size, args.distributed) == (1, False)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@pytest.mark.parametrize(
    ("task", "terminal", "alone"),
    [
        ("another group", True, True),  # typed into the shell that is the task
        ("another group", False, False),  # `timeout 60 python …` by srun from such a shell
        ("own group", True, False),  # srun -n4 --pty python …
        ("own group", False, False),  # srun -n4 python … from such a shell
        ("gone", True, True),  # in a container that does not see the task
        ("gone", False, False),
    ],
)
def test_srun_from_a_shell_of_a_step_starts_tasks_though_it_inherits_variables(
    task, terminal, alone, monkeypatch
):
    groups = {101: os.getpgrp(), 102: os.getpgrp() + 1}
    number = {"own group": 101, "another group": 102, "gone": 2**22 + 1}[task]

    def group_of(pid):
        if pid not in groups:
            raise ProcessLookupError
        return groups[pid]

    monkeypatch.setattr(os, "getpgid", group_of)
    monkeypatch.setattr(distributed_utils, "_has_terminal", lambda: terminal)
    for name, value in {**JOB, **TASK, **PTY, **step("1", "4"), "TASK_PID": str(number)}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    assert (read_launch_environment() is None) == alone


def test_srun_with_one_gpu_and_some_cores_per_task(accelerator, monkeypatch):
    accelerator("cuda", 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert resolve_device("auto", 3, 4) == torch.device("cuda", 0)
    assert cpu_cores(4) == 6


def test_more_processes_than_cores_have_no_loader_workers(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert worker_count(None, torch.device("cpu"), 10_000) == 0
    assert cpu_cores(10_000) == 1


def test_plain_start_is_world_size_one():
    args = Namespace(device="cpu")
    threads = torch.get_num_threads()
    init_distributed_mode(args)
    assert (args.rank, args.world_size, args.distributed, args.device) == (0, 1, False, "cpu")
    torch.set_num_threads(threads)


def test_amp_on_a_cpu():
    with pytest.raises(UserError, match=r"train\.amp=fp16: CPUs have no fast fp16"):
        choose_amp_dtype("fp16", torch.device("cpu"))
    assert choose_amp_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert choose_amp_dtype("off", torch.device("cuda")) is None


def test_empty_folder_and_missing_masks():
    Path("images").mkdir()
    Path("masks").mkdir()
    message = refused(train, "--images", "images", "--masks", "masks")
    assert "images" in message
    Path("images").rmdir()
    Path("masks").rmdir()
    message = refused(train, *pairs(5, missing=(1, 3)))
    assert "no mask for 2 of the 5 images" in message
    assert "1.jpg" in message and "3.jpg" in message


def test_size_mismatch_names_the_pair_before_the_first_step():
    message = refused(train, *pairs(4, mask_size=(30, 40)))
    assert "images/0.jpg" in message and "masks/0.png" in message
    assert "40×30" in message and "30×40" in message


def test_images_without_masks_and_wrong_layout():
    Path("images").mkdir()
    assert "--images DIR --masks DIR" in refused(train, "--images", "images")
    assert "DUTS-TR" in refused(train, "--data-path", "images")
    assert "--data-path" in refused(train, "--config", REPO / "configs" / "u2net_full.yaml")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--set", "train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["--set", "train.epochs=many"], ["train.epochs", "many"]),
        (["--epochs", "0"], ["epochs", "must be 1 to"]),
        (["--set", "data.crop_size=400"], ["crop_size", "image_size"]),
        (["--set", "train.best=accuracy"], ["accuracy", "maxF1, MAE"]),
        (["--set", "task=nothing"], ["nothing", "saliency"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--test-only"], ["--test-only", "--weights"]),
        (["--resume", "nowhere"], ["nowhere", "--resume auto"]),
        (["--weights", "none.pth"], ["none.pth", "no such file"]),
        (["--set", "train.seed=99999999999999999999"], ["train.seed", "2^63"]),
        (["--set", "eval.batch_size=0"], ["batch_size", "must be 1 to"]),
        (["--masks", "masks"], ["--images DIR --masks DIR"]),
        (["--val-images", "a", "--val-masks", "b"], ["--images DIR --masks DIR"]),
    ],
)
def test_train_settings(argv, parts):
    message = refused(train, *TINY, *argv)
    for part in parts:
        assert part in message


def test_folders_on_the_command_line_replace_those_of_a_recipe():
    Path("own.yaml").write_text("data: {images: a, masks: b, val_images: c, val_masks: d}")
    assert "elsewhere" in refused(train, "--config", "own.yaml", "--data-path", "elsewhere")
    message = refused(train, "--config", "own.yaml", "--images", "x", "--masks", "y")
    assert "x" in message and "no such folder" in message.lower()


def make_run(folder):
    """A run's folder, by its status."""
    Path(folder).mkdir()
    Path(folder, "status.json").write_text('{"state": "failed", "pid": 1, "time": 1.5}')


def test_a_run_is_not_started_over_another():
    make_run("out")
    Path("out/last.pth").write_bytes(b"precious")
    assert "--resume auto" in refused(train, *TINY, "--output-dir", "out")
    assert sorted(p.name for p in Path("out").iterdir()) == ["last.pth", "status.json"]
    Path("out/status.json").unlink()
    assert "--resume out/last.pth" in refused(train, *TINY, "--output-dir", "out")
    assert [p.name for p in Path("out").iterdir()] == ["last.pth"]


def test_output_folder_that_cannot_be_made():
    Path("file").write_text("")
    assert "file/run" in refused(train, *TINY, "--output-dir", "file/run")
    assert "file: is a file, no folder" in refused(train, *TINY, "--output-dir", "file")
    if os.name == "posix":
        Path("link").symlink_to("gone")
        with pytest.raises(UserError, match=r"link: is a link to gone, which is not there\."):
            choose_run_folder("link/run", None, "name")
        message = refused(train, *TINY, "--output-dir", os.fsdecode(b"run\xff"))
        assert r"run\udcff: is not UTF-8, as TensorBoard needs it. Choose" in message
        assert not Path(os.fsdecode(b"run\xff")).exists()


def test_trimaps_are_found_by_name_and_missing_ones_fail_by_themselves():
    for name in ("in/a.jpg", "in/sub/b.png", "tri/a_trimap.png", "tri/sub/b.png", "in/c.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(name)
    jobs = plan(["in"], Path("out"), ["map"], {"trimap": "tri"})
    trimaps = ["tri/a_trimap.png", "tri/c_trimap.png", "tri/sub/b.png"]
    assert [str(job.extras["trimap"]) for job in jobs] == trimaps
    with pytest.raises(UserError, match=r"tri/c_trimap\.png: no such file"):
        read_inputs(jobs[1], {"trimap": read_trimap})
    with pytest.raises(UserError, match=r"no trimap for in/c\.png"):
        plan(["in/c.png"], Path("out"), ["map"], {"trimap": "tri"})
    with pytest.raises(UserError, match="one file for several images"):
        plan(["in"], Path("out"), ["map"], {"trimap": "tri/a_trimap.png"})
    with pytest.raises(UserError, match="is the image itself"):
        plan(["in/a.jpg"], Path("out"), ["map"], {"trimap": "in/a.jpg"})


def test_trimaps_that_only_the_suffix_tells_apart():
    for name in ("in/a.jpg", "tri/a.png", "tri/a.bmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(name)
    with pytest.raises(UserError, match="only the suffix"):
        plan(["in"], Path("out"), ["map"], {"trimap": "tri"})


def test_trimaps_among_the_images_are_no_inputs():
    Path("in").mkdir()
    for name in ("a.png", "a_trimap.png"):
        Image.new("L", (4, 4)).save(Path("in", name))
    (job,) = plan(["in"], Path("out"), ["map"], {"trimap": "in"})
    assert (job.source.name, job.extras["trimap"].name) == ("a.png", "a_trimap.png")
    with pytest.raises(UserError, match="overwrite an input"):
        plan(["in/a.png"], Path("in"), ["map"], {"trimap": "in"})


def test_flags_that_the_network_has_no_use_for_or_lacks():
    for name in ("photo.png", "trimap.png"):
        Image.new("RGB", (40, 30)).save(name)
    torch.save(u2net_lite().state_dict(), "lite.pth")
    message = refused(predict, "photo.png", "--weights", "lite.pth", "--trimap", "trimap.png")
    assert "--trimap" in message and "--cutout, --overlay, --threshold" in message


def test_what_the_network_needs_beside_an_image_is_asked_for():
    Image.new("RGB", (40, 30)).save("photo.png")
    values = {"task": "matting", "model": {"channels": 4}}
    task = tasks.read_config(values, "test", {})
    state = task.build_models()["model"].state_dict()
    torch.save({"model": state, "args": values, "next_epoch": 1}, "matting.pth")
    message = refused(predict, "photo.png", "--weights", "matting.pth")
    assert "--trimap: matting.pth needs one beside every image" in message
    for flag in ("--overlay", "--threshold=0"):
        flags = ("--trimap", "trimap.png", flag)
        message = refused(predict, "photo.png", "--weights", "matting.pth", *flags)
        assert message.startswith(flag.partition("=")[0]) and "takes --trimap, --cutout" in message
    for switch in ("--post-norm", "--toolbox"):
        message = refused(validation, "--weights", "matting.pth", switch)
        assert f"{switch}: is for saliency, and matting.pth is of another task" in message


def test_an_image_too_large_to_render_does_not_end_the_folder(monkeypatch, capsys):
    for name in "abc":
        Image.new("RGB", (40, 30)).save(f"{name}.png")
    torch.save(u2net_lite().state_dict(), "lite.pth")
    render = saliency.Task.render

    def out_of_memory(task, image, **rest):
        if not Path("predictions/a.png").exists():
            return render(task, image, **rest)
        raise RuntimeError("not enough memory: you tried to allocate 1 byte")

    monkeypatch.setattr(saliency.Task, "render", out_of_memory)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    small = ("--set", "data.image_size=40", "--set", "eval.amp=off")
    args = predict.parse_args(["a.png", "b.png", "c.png", "--weights", "lite.pth", *small])
    assert predict.main(args) == 2
    printed = capsys.readouterr()
    assert "1 done, 2 failed" in printed.out
    assert "b.png: not enough memory" in printed.err


def test_a_recipe_beside_a_checkpoint_and_for_a_bare_state_dict():
    Image.new("RGB", (40, 30)).save("photo.png")
    state = u2net_lite().state_dict()
    torch.save(state, "bare.pth")
    recipe = str(REPO / "configs" / "shapes.yaml")
    small = ("--set", "data.image_size=40", "--set", "eval.amp=off")
    args = predict.parse_args(["photo.png", "--weights", "bare.pth", "--config", recipe, *small])
    assert predict.main(args) == 0
    assert Image.open("predictions/photo.png").size == (40, 30)
    torch.save({"model": state, "args": {"task": "saliency"}, "next_epoch": 1}, "ours.pth")
    message = refused(validation, "--weights", "ours.pth", "--config", recipe)
    assert "brings its own settings" in message


def training_state(**changes):
    """The least that a run could continue from."""
    dicts = ("optimizer", "lr_scheduler", "ema_steps", "best_scores", "meters", "args")
    numbers = ("epoch", "next_epoch", "next_step", "num_samples", "global_batch", "world_size")
    state = {**{key: {} for key in dicts}, **dict.fromkeys(numbers, 1), "lr": 0.1}
    return {**state, "model": {"x": torch.zeros(1)}, **changes}


def tiny_checkpoint(path, **values):
    """A file that says what a checkpoint of ours says of its task, without a training."""
    args = {"task": "segmentation", **values}
    torch.save({"model": {"x": torch.zeros(1)}, "args": args, "next_epoch": 1}, path)


def test_weights_of_another_task():
    tiny_checkpoint("fcn.pth")
    message = refused(train, *TINY, "--weights", "fcn.pth")
    assert "fcn.pth: holds weights of segmentation, and this recipe is for saliency" in message


def test_resuming_with_the_recipe_of_another_task():
    torch.save(training_state(args={"task": "matting"}), "last.pth")
    recipe = str(REPO / "configs" / "unet.yaml")
    message = refused(train, "--config", recipe, "--resume", "last.pth")
    assert "last.pth: is a run of matting" in message and "unet.yaml is for segmentation" in message


def test_an_unknown_task_is_named_with_its_file():
    Path("bad.yaml").write_text("task: segmentatoin\n")
    assert "bad.yaml: task: 'segmentatoin'" in refused(train, "--config", "bad.yaml")


def test_masks_of_which_nothing_counts():
    options = pairs(2)
    for name in ("masks/0.png", "masks/1.png"):
        Image.new("L", (40, 30), 255).save(name)
    for folder in ("more", "photos"):
        Path(folder).mkdir()
        for number in range(2):
            Image.new("L", (40, 30), 1 - number).save(f"{folder}/{number}.png")
    recipe = str(REPO / "configs" / "unet.yaml")
    names = ("--set", "data.class_names=[background,road]", "--config", recipe)
    assert "ignored" in refused(train, *options, *names)
    validation_only = ("--images", "photos", "--masks", "more")
    validation_only += ("--val-images", "images", "--val-masks", "masks")
    message = refused(train, *validation_only, *names)
    assert "validation masks: every pixel is ignored" in message


@pytest.mark.slow
def test_weights_of_another_network():
    torch.save(u2net_full().state_dict(), "full.pth")
    message = refused(train, *TINY, "--weights", "full.pth")
    assert "full.pth" in message and "of another shape" in message
    torch.save({"a": torch.zeros(2)}, "other.pth")
    message = refused(validation, "--weights", "other.pth")
    assert "other.pth" in message and "--config" in message
    state = u2net_lite().state_dict()
    state["side.1.wrong"] = state.pop("side.1.weight")
    torch.save(state, "almost.pth")
    message = refused(validation, "--weights", "almost.pth")
    assert "1 missing: side.1.weight; 1 unexpected: side.1.wrong" in message
    torch.save({"model": u2net_lite().state_dict(), "args": {"lr": 1}}, "foreign.pth")
    assert "DIR" in refused(validation, "--weights", "foreign.pth", "--data-path", "nowhere")
    message = refused(train, *TINY, "--weights", "other.pth")
    assert "missing" in message and "1 unexpected: a" in message


def test_validation_without_anything_to_score():
    assert "python train.py" in refused(validation)
    torch.save(u2net_lite().state_dict(), "lite.pth")
    missing = refused(validation, "--weights", "lite.pth", "--json", "none/s.json")
    assert "none/s.json" in missing
    assert "--masks" in refused(validation, "--predictions", "maps")
    assert "--images" in refused(validation, "--weights", "lite.pth", "--masks", "maps")
    Path("scores").mkdir()
    assert "scores" in refused(validation, "--weights", "lite.pth", "--json", "scores")


def test_predict_without_a_run_says_how_to_get_one():
    Image.new("RGB", (8, 8)).save("a.png")
    message = refused(predict, "a.png")
    assert "python train.py" in message and "--weights" in message


def test_predict_refuses_collisions_before_writing():
    for folder in ("x", "y"):
        Path(folder).mkdir()
        Image.new("RGB", (8, 8)).save(f"{folder}/a.png")
    Image.new("RGB", (8, 8)).save("x/a.jpg")
    message = refused(predict, "x")
    assert "a.png" in message and "a.jpg" in message
    assert "x/a.png" in refused(predict, "x/a.png", "y/a.png")
    assert "overwrite an input" in refused(predict, "x/a.png", "-o", "x")
    assert "overwrite an input" in refused(predict, "x/a.jpg", "x/a.png", "-o", "x")
    assert not Path("predictions").exists()
    assert "no file matches" in refused(predict, "x/*.tif")
    assert "no image there" in refused(predict, "nothing.png")


def test_predict_plans_patterns_and_leaves_its_own_output_out():
    Path("in/deep").mkdir(parents=True)
    Path("in/out").mkdir()
    for name in ("in/a.png", "in/deep/b.png", "in/out/old.png"):
        Image.new("RGB", (8, 8)).save(name)

    def planned(*inputs, output="in/out"):
        jobs = plan(list(inputs), Path(output), ["map"])
        return sorted(job.outputs["map"].as_posix() for job in jobs)

    assert planned("in") == ["in/out/a.png", "in/out/deep/b.png"]
    assert planned("in/*/*.png", output="o") == ["o/deep/b.png", "o/out/old.png"]
    assert planned("in/**/b.png", output="o") == ["o/deep/b.png"]
    Path("in/.hidden").mkdir()
    for name in ("in/.hidden/c.png", "in/.c.png"):
        Image.new("RGB", (8, 8)).save(name)
    for link in ("in/l1", "in/deep/l2"):
        Path(link).symlink_to(Path("in").absolute(), target_is_directory=True)
    everything = ["o/a.png", "o/deep/b.png", "o/out/old.png"]
    assert planned("in/**/*.png", output="o") == planned("in/**", output="o") == everything
    assert planned("in/a.png", "in/a.png", output="o") == ["o/a.png"]  # named twice, done once
    assert planned("in/a.png", "in/deep", output="o") == ["o/a.png", "o/b.png"]


def test_no_output_leaves_its_folder(monkeypatch):
    """Whatever names and links say; the other files of the call are done."""
    monkeypatch.setattr("train_utils.prediction_files.require_ffmpeg", lambda path: None)
    for folder in ("in/deep", "out"):
        Path(folder).mkdir(parents=True)
    longest = "x" * 251 + ".png"
    names = ["...mp4", "..mp4", "....png", "a.png", "deep/b.png", "deep/c.mp4", "deep/-d\n.png"]
    for name in [*names, longest]:
        save_image(Image.new("RGB", (8, 8)), Path("in/x.png"))
        Path("in/x.png").rename(f"in/{name}")
    Path("out/deep").symlink_to(Path("elsewhere").absolute(), target_is_directory=True)

    def planned(*inputs, kinds=("map",)):
        jobs = plan(list(inputs), Path("out"), list(kinds))
        for job in jobs:
            assert bool(job.error) != bool(job.outputs)
            for path in job.outputs.values():
                assert path.parent.resolve().is_relative_to(Path("out").resolve())
        return {job.source.name: job.error for job in jobs}

    errors = planned("in/...mp4", "in/..mp4", "in/....png", f"in/{longest}", "in")
    dots = ["...mp4", "..mp4", "....png"]
    assert [name for name, error in errors.items() if "no name is left. Rename it" in error] == dots
    assert "by the link out/deep" in errors["b.png"] and "by the link" in errors["-d\n.png"]
    assert not errors["a.png"] and not errors[longest]
    assert "longer than 255 bytes" in planned("in", kinds=["map", "cutout"])[longest]
    assert "Name it without '..'" in planned("in/*/../../in/a.png")["a.png"]
    assert planned("in/deep/../a.png") == {"a.png": ""}
    Path("out/deep").unlink()
    assert not any(planned("in").values())  # hidden files are left out
    assert "no image there" in refused(predict, "y" * 300)
    assert len(plan(["in/a.png"], Path("z" * 300), ["map"])) == 1  # writing says what is wrong
    Path("out/clip").symlink_to(Path("elsewhere").absolute(), target_is_directory=True)
    Path("in/clip.mp4").touch()
    assert "by the link out/clip" in planned("in/clip.mp4", "in/a.png")["clip.mp4"]


def test_an_output_is_no_pipe_and_no_other_case(monkeypatch):
    monkeypatch.setattr("train_utils.prediction_files._IGNORES_CASE", True)
    for name in ("x/A.png", "y/a.png"):
        Path(name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(name)
    assert "would both be written there" in refused(predict, "x/A.png", "y/a.png")
    if hasattr(os, "mkfifo"):
        Path("out").mkdir()
        os.mkfifo("out/a.png")
        assert "was not written by predict.py" in refused(predict, "y/a.png", "-o", "out")


def test_batch_norm_on_a_single_tiny_image_is_refused():
    """Five images in batches of four leave one, whose deepest map has a single pixel."""
    argv = ["--set", "data.image_size=33", "--set", "data.train_size=5", "--set", "data.val_size=1"]
    message = refused(train, *argv, "-b", "4")
    assert "batch norm cannot train" in message and "--batch-size" in message


def test_data_path_beside_folders_is_refused():
    folders = ("--images", "a", "--masks", "b")
    assert "one or the other" in refused(train, "--data-path", "x", *folders)
    torch.save(u2net_lite().state_dict(), "lite.pth")
    both = ("--weights", "lite.pth", "--data-path", "x", *folders)
    assert "one or the other" in refused(validation, *both)


def test_predictions_of_a_part_of_the_images_are_refused():
    pairs(3)
    Path("images/2.jpg").unlink()
    message = refused(validation, "--predictions", "images", "--masks", "masks")
    assert "1 of the masks in masks have no prediction" in message


def test_prediction_files_are_scored_without_a_network():
    """By hand: of white masks a map of 0, 0.2, 0.2, 0.4 is off by 0.8, stretched by 0.5."""
    for name, levels in (("a", [[0, 51], [51, 102]]), ("b", [[255, 255], [255, 255]])):
        for folder, pixels in (("maps", levels), ("masks", [[255, 255], [255, 255]])):
            Path(folder).mkdir(exist_ok=True)
            picture = Image.fromarray(torch.tensor(pixels, dtype=torch.uint8).numpy())
            picture.save(f"{folder}/{name}.png")

    def scores(*switches):
        files = ("--predictions", "maps", "--masks", "masks", "--json", "s.json")
        args = validation.parse_args([*files, "--device", "cpu", *switches])
        init_distributed_mode(args)
        validation.main(args)
        return json.loads(Path("s.json").read_text())

    plain, all_of_it = scores(), scores("--post-norm", "--toolbox")
    assert plain.keys() == {"MAE", "maxF1", "n"} < all_of_it.keys()
    assert (plain["n"], all_of_it["n"]) == (2, 2)
    assert plain["MAE"] == pytest.approx(0.8 / 2) and all_of_it["MAE"] == pytest.approx(0.5 / 2)
    recipe = ("--config", REPO / "configs" / "matting.yaml")
    message = refused(validation, "--predictions", "maps", "--masks", "masks", *recipe)
    assert "matting is scored with its network only" in message


def test_scores_are_written_whole_or_refused():
    for _ in range(2):
        write_json(Path("s.json"), {"MAE": 0.1, "n": 2})
        assert Path("s.json").read_text() == '{\n  "MAE": 0.1,\n  "n": 2\n}\n'
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="No space left"):
            write_json(Path("/dev/full"), {"MAE": 0.1})


def test_scores_replace_nothing_but_scores():
    torch.save(u2net_lite().state_dict(), "lite.pth")
    Path("package.json").write_text('{"name": "n"}')
    Path("list.json").write_text("[1]")
    Path("deep.json").write_text("[" * 100_000)
    Path("empty.json").touch()
    for name in ("lite.pth", "package.json", "list.json", "deep.json"):
        before = Path(name).read_bytes()
        for files in (("--weights", "lite.pth"), ("--predictions", "maps", "--masks", "masks")):
            message = refused(validation, *files, "--json", name)
            problem = "has more than" if name == "lite.pth" else "holds something else than scores"
            assert f"--json {name}: {problem}" in message
        with pytest.raises(UserError, match="Choose another file"):
            write_json(Path(name), {"n": 1})
        assert Path(name).read_bytes() == before
    write_json(Path("empty.json"), {"n": 1})
    if os.name == "posix":
        for target in ("empty.json", "nothing.json"):
            Path("link.json").unlink(missing_ok=True)
            Path("link.json").symlink_to(target)
            with pytest.raises(UserError, match=r"link\.json: is a link"):
                write_json(Path("link.json"), {"n": 2})
            assert Path("link.json").is_symlink()


def test_predict_leaves_files_alone_that_it_has_not_written():
    Image.new("RGB", (8, 8)).save("a.jpg")
    Path("gt").mkdir()
    Image.new("L", (8, 8)).save("gt/a.png")
    assert "was not written by predict.py" in refused(predict, "a.jpg", "-o", "gt")
    save_image(Image.new("L", (8, 8)), Path("gt/a.png"))
    assert len(plan(["a.jpg"], Path("gt"), ["map"])) == 1  # a second call may
    assert "not a folder" in refused(predict, "a.jpg", "-o", "a.jpg/x")
    assert "empty" in refused(predict, "")


def hold_a_run_folder(path, pipe):
    """Be a process that has a run in this folder until it is told to go."""
    pipe.send(str(choose_run_folder(path, None, "name")))
    pipe.recv()


@pytest.mark.slow
def test_a_folder_in_which_a_run_is_under_way():
    pipe, other = fork_server().Pipe()
    folder = str(Path("out").absolute())
    holder = fork_server().Process(target=hold_a_run_folder, args=(folder, other))
    holder.start()
    assert pipe.recv() == folder
    message = refused(train, *TINY, "--output-dir", "out")
    pipe.send("go")
    holder.join()
    assert f"process {holder.pid} on" in message


def test_two_runs_in_one_second():
    first, second = (choose_run_folder(None, None, "name") for _ in range(2))
    assert first != second and second.is_dir()


def test_a_run_continued_elsewhere_takes_its_records_along():
    Path("a").mkdir()
    for name in ("last.pth", "model_best.pth", "metrics.jsonl"):
        Path("a", name).write_text(name)
    new = choose_run_folder("b", Path("a/last.pth"), "name")
    copies = ["last.pth", "metrics.jsonl", "model_best.pth", "status.json"]
    assert sorted(p.name for p in new.glob("[!.]*")) == copies
    make_run("c")
    Path("c/last.pth").write_text("")
    with pytest.raises(UserError, match="holds a run already"):
        choose_run_folder("c", Path("a/last.pth"), "name")


def test_a_run_without_its_last_checkpoint_is_not_started_over():
    """`--resume auto` is what templates start with: it must lose nothing."""
    make_run("out")
    torch.save(training_state(), "out/model_0003.pth")
    message = refused(train, *TINY, "--output-dir", "out", "--resume", "auto")
    assert "out/last.pth: is gone" in message and "--resume out/model_0003.pth" in message
    Path("out/model_0003.pth").rename("out/model_best.pth")
    assert "holds a run already" in refused(train, *TINY, "--output-dir", "out")


def test_going_back_forgets_the_best_checkpoint_of_later(tmp_path):
    make_run("out")
    for name, epoch in (("model_0003", 4), ("model_best", 6), ("last", 9)):
        torch.save(training_state(next_epoch=epoch), f"out/{name}.pth")
    choose_run_folder(None, Path("out/model_0003.pth"), "name")
    assert torch.load("out/last.pth", weights_only=True)["next_epoch"] == 4
    assert not Path("out/model_best.pth").exists()


def test_srun_that_binds_each_task_to_a_gpu_of_its_own(accelerator, monkeypatch):
    accelerator("cuda", 1)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert resolve_device("auto", 3, 4) == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")  # the tasks would share it
    with pytest.raises(UserError, match="4 processes on this node but 1 GPU"):
        resolve_device("auto", 3, 4)


def test_compiling_and_synchronised_batch_norm_exclude_each_other(monkeypatch):
    args = train.parse_args(["--compile", "--sync-bn", "--device", "cpu"])
    args.rank, args.world_size, args.local_world_size = 0, 2, 2
    with pytest.raises(UserError, match="--compile, --sync-bn"):
        train.main(args)


def test_predictions_on_another_gpu_leave_the_first_one_alone(accelerator, tmp_path):
    image = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(image)
    chosen = accelerator("cuda", 2)
    options = ["-o", str(tmp_path / "out"), "--weights", str(tmp_path / "none.pth")]
    args = predict.parse_args([str(image), *options, "--device", "cuda:1"])
    with pytest.raises(UserError, match=r"none\.pth"):
        predict.main(args)
    assert chosen == [1]


def test_torchrun_inside_srun_shares_out_the_gpus_of_its_task(accelerator, monkeypatch):
    accelerator("cuda", 4)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "4")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "100000")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto", 3, 4) == torch.device("cuda", 3)
    assert cpu_cores(4) < 100000


def test_the_precision_of_evaluations_is_refused_before_the_first_step():
    message = refused(train, *TINY, "--output-dir", "out", "--set", "eval.amp=fp16")
    assert "eval.amp=fp16: CPUs have no fast fp16" in message
    assert not Path("out").exists()
