"""The templates in launch/, and runs whose number of processes changes on the way."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import yaml
from distributed import children, run_script
from test_scripts import REPO, held_port, logged, records, wait_until, weights

from train_utils.arguments import parse_args

pytestmark = pytest.mark.xdist_group("launch")  # what the tests share is made once

# Synchronised batch norm and SGD: training does not depend on the number of processes.
OPTIONS = [
    *("--config", REPO / "configs" / "fcn.yaml", "--device", "cpu", "--print-freq", "1"),
    *("--set", "data.image_size=96", "--set", "model.channels=8", "--set", "data.val_size=3"),
    *("--set", "data.train_size=15", "--epochs", "3", "--set", "train.save_steps=1"),
    *("--sync-bn", "-j", "0", "--lr", "0.02"),
]


@pytest.fixture
def shims(tmp_path):
    """A folder of commands to put first in PATH; python and torchrun are those of the tests."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, script):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)

    add("python", f'exec {sys.executable} "$@"')
    add("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    (tmp_path / "train_multi_GPU.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(REPO)!r})\n"
        f"runpy.run_path({str(REPO / 'train_multi_GPU.py')!r}, run_name='__main__')\n"
    )
    add.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return add


@pytest.fixture
def port():
    with held_port() as number:
        yield number


def all_run(processes):
    return all(process.poll() is None for process in processes)


def wait_for_step(folder, step, processes):
    """Until a run's status says that so many steps of the first epoch are done."""

    def reached():
        if not (folder / "status.json").exists():
            return False
        status = json.loads((folder / "status.json").read_text())
        return status.get("step", -1) >= step and status.get("epoch") == 0

    wait_until(reached, f"step {step}", lambda: all_run(processes))


def assert_nearly_same_run(one, other):
    """The same samples in every step: what differs is fp32 rounding, amplified by 12 steps."""
    assert [r["step"] for r in records(one)] == [r["step"] for r in records(other)]
    losses = [[record["train/loss"] for record in records(path)] for path in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)  # another sample would be 1e-2


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three epochs of four steps of four images, the last one short, on one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_script(folder, "train.py", *OPTIONS, "-b", 4, "--output-dir", "run")
    return folder / "run"


@pytest.mark.slow
def test_two_machines_then_one_process_then_three(alone, tmp_path):
    """The first start ends by SIGTERM to one of its torchruns, the second by one to itself."""
    arguments = (*OPTIONS, "-b", 2, "--output-dir", "run", "--resume", "auto")
    with held_port() as port:
        where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=localhost"]
        where += [f"--master_port={port}"]
        script = [REPO / "tests" / "struck.py", "step", "SIGTERM"]
        script += ["train_multi_GPU.py", *arguments]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
        machines = [
            subprocess.Popen(
                [*torchrun, f"--node_rank={rank}", *map(str, script)],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [machine.communicate(timeout=200)[0] for machine in machines]
        finally:
            for machine in machines:
                machine.kill()
    assert [machine.returncode for machine in machines] == [1, 1], outputs
    assert "2 process(es) on cpu" in outputs[0] and "Epoch" not in outputs[1]
    state = weights(tmp_path / "run")
    assert state["next_epoch"] == 0 and state["next_step"] in (3, 4)  # the third step, or the next
    assert f"stopped by SIGTERM at epoch 0, step {state['next_step']}" in outputs[0]

    stop = {"TEST_FAULT": "step:term@3"}
    code = 128 + signal.SIGTERM
    done = run_script(tmp_path, "train.py", *arguments, code=code, **stop)
    assert "continuing with 1 process(es) instead of 2: the global batch stays 4" in done.stdout
    done = run_script(tmp_path, "train_multi_GPU.py", *arguments, processes=3)
    assert "continuing with 3 process(es) instead of 1: the global batch stays 4" in done.stdout
    assert_nearly_same_run(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_two_machines_of_which_one_comes_back_and_is_lost(alone, tmp_path, shims, port):
    """torchrun agents by launch/nodes.sh; SIGKILL to one with its process, twice."""
    env = {**os.environ, "PATH": shims.path, "NPROC_PER_NODE": "1"}
    conf = "last_call_timeout=10,keep_alive_interval=1"  # seconds, not so long
    script = [str(REPO / "launch" / "nodes.sh"), f"localhost:{port}", "lost"]
    script += [*map(str, OPTIONS), "-b", "2"]
    run_folder = tmp_path / "runs" / "lost"
    log = (tmp_path / "output.txt").open("w")
    agents = []

    def start_agent():
        # On one host torchrun cannot tell who is to hold the store: the one that binds the port
        # first, and if that is one which is lost, the other one ends with it.
        env["PET_RDZV_CONF"] = f"{conf},is_host={not agents}"
        agents.append(subprocess.Popen(script, cwd=tmp_path, env=env, stdout=log, stderr=log))

    def lose_the_last_one():
        for process in [*children(agents[-1].pid), agents[-1].pid]:
            os.kill(process, signal.SIGKILL)

    try:
        start_agent()
        start_agent()
        wait_for_step(run_folder, 1, agents)
        lose_the_last_one()
        start_agent()
        for text, count in (("2 process(es) on cpu", 2), ("Epoch", 3)):
            wait_until(
                partial(logged, run_folder, text, count),
                f"{count} × {text!r}",
                partial(all_run, [agents[0], agents[2]]),
            )
        lose_the_last_one()
        code = agents[0].wait(timeout=180)
    finally:
        for agent in agents:
            agent.kill()
    assert code == 0, (tmp_path / "output.txt").read_text()
    text = (run_folder / "log.txt").read_text()
    assert "continuing with 1 process(es) instead of 2: the global batch stays 4" in text
    assert "stopped by" not in text
    assert_nearly_same_run(alone, run_folder)


SRUN = """shift  # --kill-on-bad-exit=1
tasks=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 "$@" & tasks+=($!)
done
echo "${tasks[@]}" > tasks.txt
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code"""


@pytest.mark.slow
def test_slurm_job_saves_queues_again_and_continues(alone, tmp_path, shims, port):
    shims("srun", SRUN)
    shims("scontrol", 'echo "$@" >> scontrol.txt')
    env = {**os.environ, "PATH": shims.path, "MASTER_PORT": str(port)}
    env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = ["bash", str(REPO / "launch" / "slurm.sh"), *map(str, OPTIONS)]
    script += ["-b", "2"]
    process = subprocess.Popen(
        script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(tmp_path / "runs" / "job-77", 1, [process])
        for task in (tmp_path / "tasks.txt").read_text().split():  # as --signal=USR1@120 does
            os.kill(int(task), signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    again = subprocess.run(script, env=env, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"  # not once more
    assert_nearly_same_run(alone, tmp_path / "runs" / "job-77")


@pytest.mark.slow
def test_slurm_job_that_cannot_start_does_not_queue_again(tmp_path, shims):
    shims("srun", 'shift; exec "$@"')
    shims("scontrol", 'echo "$@" >> scontrol.txt')
    env = {**os.environ, "PATH": shims.path}
    env |= {"SLURM_JOB_ID": "78", "SLURM_JOB_NAME": "job", "SLURM_SUBMIT_DIR": str(tmp_path)}
    (tmp_path / "runs" / "job-78").mkdir(parents=True)
    (tmp_path / "runs" / "job-78" / "status.json").write_text('{"state": "stopped"}')
    script = ["bash", str(REPO / "launch" / "slurm.sh"), "--data-path", "gone"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "gone" in done.stderr
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.fixture
def kubernetes():
    """The job and the network policy of the template."""
    return list(yaml.safe_load_all((REPO / "launch" / "pytorchjob.yaml").read_text()))


def test_kubernetes_template_starts_what_there_is(kubernetes):
    job, _ = kubernetes
    policy = job["spec"]["elasticPolicy"]
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] == 1 and policy["maxReplicas"] == worker["replicas"]
    pod = worker["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own patience
    (container,) = pod["containers"]
    assert (REPO / container["command"][-1]).is_file()
    args = parse_args(container["args"])
    assert (REPO / args.config).is_file() and args.resume == "auto"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_pods_have_no_rights_and_no_visitors(kubernetes):
    job, policy = kubernetes
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
    for volume in pod["volumes"]:
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
    spec, own = policy["spec"], template["metadata"]["labels"]
    assert policy["kind"] == "NetworkPolicy" and spec["policyTypes"] == ["Ingress"]
    assert spec["podSelector"]["matchLabels"] == own
    assert spec["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]


@pytest.mark.parametrize("name", ["slurm.sh", "nodes.sh", "pytorchjob.yaml"])
def test_templates_say_where_they_may_run(name):
    text = (REPO / "launch" / name).read_text()
    assert "# Trusted networks only: " in text and "docs/security.md" in text
