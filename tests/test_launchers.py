"""The launchers: what they would run, manifests against the schema of the cluster, and how they answer to what happens.

gcloud, sbatch, srun and scontrol are stood in for by scripts: what a launcher asks of them, and what it does with their
answers, is what is tested here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
GKE = ["--name", "r1", "--topology", "v5p:4x4x8", "--image", "image", "--bucket", "runs-of-us"]
TRAIN = ["--", "train", "--config", "a 'b.py"]


@pytest.fixture
def cloud(tmp_path):
    """An empty machine with stand-ins on its path; call it with scripts by name, and it gives its environment."""
    bin_dir, home = tmp_path / "bin", tmp_path / "home"
    bin_dir.mkdir()
    (home / "jaxlm/.venv/bin").mkdir(parents=True)

    def make(**scripts: str) -> dict[str, str]:
        for name, text in scripts.items():
            (bin_dir / name).write_text(f"#!/bin/bash\ncd {home}\n{text}\n")
            (bin_dir / name).chmod(0o755)
        return {"PATH": f"{bin_dir}:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(tmp_path)}

    return make


def launch(script: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable] if script.endswith(".py") else []
    command += [str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=LAUNCH.parent, timeout=120)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".py")))
def test_help_teaches(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and not done.stderr
    told = done.stdout.lower()
    assert all(word in told for word in ("-- train --config", "--dry-run", "restart", "stop")), told
    assert f"launch/{script}" in told


# Of a topology: hosts of a slice, chips of a host.
@pytest.mark.parametrize("topology, hosts", [("v5p:4x4x8", (32, 4)), ("v6e:2x4", (1, 8)), ("v5e:8x16", (32, 4))])
def test_a_jobset_has_a_pod_for_every_host(topology, hosts):
    options = ["--name", "r1", "--topology", topology, "--image", "image", "--slices", "2", "--dry-run", *TRAIN]
    job = json.loads(launch("gke.py", *options).stdout)["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2
    found = job["template"]["spec"]
    container = found["template"]["spec"]["containers"][0]
    assert found["parallelism"] == found["completions"] == hosts[0]
    assert container["resources"]["limits"]["google.com/tpu"] == hosts[1]
    assert container["command"] == ["jaxlm", "train", "--config", "a 'b.py"]


def test_the_jobset_is_one_that_a_cluster_takes():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    made = json.loads(launch("gke.py", *GKE, "--dry-run", *TRAIN).stdout)
    read = models.JobsetV1alpha2JobSet.from_dict(made).to_dict()

    def kept(a, b):
        if isinstance(a, dict):
            return all(name in b and kept(value, b[name]) for name, value in a.items())
        return all(map(kept, a, b)) if isinstance(a, list) else a == b

    assert kept(made, read)  # nothing stands in it that its schema does not know
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    assert not kept(made, models.JobsetV1alpha2JobSet.from_dict(made).to_dict())


def test_gke_hands_the_manifest_to_kubectl_and_gives_its_status(cloud):
    env = cloud(kubectl="echo $*; cat > manifest; exit 3")
    done = launch("gke.py", *GKE, *TRAIN, env=env)
    assert done.returncode == 3 and done.stdout.strip() == "apply -f -"
    assert json.loads((Path(env["HOME"]) / "manifest").read_text())["kind"] == "JobSet"


def test_xpk_names_the_slice_by_its_cores():
    done = launch("gke.py", *GKE, "--xpk", "--cluster", "c1", "--dry-run", *TRAIN)
    assert "--tpu-type=v5p-256 " in done.stdout and "jaxlm train --config" in done.stdout


@pytest.mark.parametrize(
    "change, message",
    [(["--topology", "v5p:4x"], "--topology"), (["--topology", "v9:2x2"], "tpu7x"), (["--xpk"], "needs --cluster")],
)
def test_gke_refuses(change, message):
    done = launch("gke.py", *GKE, *change, *TRAIN)
    assert done.returncode == 2 and message in done.stderr


# A cloud that gives TPUs after a wait, takes them away from the second start, and whose first start fails. Each line of
# `looks` is the state at one look; jaxlm ends with the next number of `ends`.
GCLOUD = r"""
echo "$*" >> calls
case "$*" in
  *describe*) state=$(head -n 1 looks); sed -i 1d looks; [ "$state" != ABSENT ] && echo "$state" ;;
  *scp*) ;;
  *"uv venv"*) ;;
  *ssh*) for a in "$@"; do case $a in --command=*) bash -c "${a#--command=}" ;; esac; done ;;
esac
"""
JAXLM = r"""#!/bin/bash
echo "$*" >> ../../started.txt; number=$(head -n 1 ../ends); sed -i 1d ../ends; exit $number
"""


def test_tpu_vm_waits_starts_again_and_ends(cloud, tmp_path):
    env = cloud(gcloud=GCLOUD)
    home = Path(env["HOME"])
    jaxlm = home / "jaxlm/.venv/bin/jaxlm"
    jaxlm.write_text(JAXLM)
    jaxlm.chmod(0o755)
    looks = ["ABSENT", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 3, "SUSPENDED", "SUSPENDED", "ABSENT", *["ACTIVE"] * 9]
    (home / "looks").write_text("\n".join(looks) + "\n")
    (home / "ends").write_text("1\n75\n0\n")
    options = ["--name", "r1", "--zone", "z", "--type", "v5p-8", "--spot", "--poll", "0.2"]
    done = launch("tpu_vm.sh", "run", *options, *TRAIN, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "started.txt").read_text().splitlines() == ["train --config a 'b.py"] * 3
    assert "starting again, 9 restarts left" in done.stdout and "tpu_vm: done" in done.stdout
    calls = (home / "calls").read_text().splitlines()
    asked = [line.split()[3] for line in calls if "queued-resources" in line and "describe" not in line]
    assert asked == ["create", "delete", "create"]
    assert "--spot" in calls[1] and "--runtime-version=v2-alpha-tpuv5 " in calls[1]


def test_tpu_vm_gives_up_and_says_where_to_look(cloud):
    env = cloud(gcloud=GCLOUD)
    home = Path(env["HOME"])
    (home / "jaxlm/.venv/bin/jaxlm").write_text(JAXLM)
    (home / "jaxlm/.venv/bin/jaxlm").chmod(0o755)
    (home / "looks").write_text("ACTIVE\n" * 20)
    (home / "ends").write_text("1\n1\n")
    options = ["--name", "r1", "--zone", "z", "--type", "v5p-8", "--poll", "0.2", "--restarts", "1"]
    done = launch("tpu_vm.sh", "run", *options, *TRAIN, env=env)
    assert done.returncode == 2 and "no restarts are left; see" in done.stderr


def test_tpu_vm_names_every_node_of_several_slices():
    options = ["--name", "r1", "--zone", "z", "--type", "v6e-256", "--slices", "2", "--bucket", "b", "--dry-run"]
    lines = launch("tpu_vm.sh", "run", *options, *TRAIN).stdout
    assert "--node-count=2 --node-prefix=r1" in lines and "ssh r1-0 " in lines and "ssh r1-1 " in lines
    assert "gcsfuse --implicit-dirs b" in lines and "v2-alpha-tpuv6e" in lines


def test_slurm_asks_for_a_process_per_gpu():
    done = launch("slurm.sh", "--dry-run", "--nodes", "4", "--sbatch", "--partition=p", *TRAIN)
    for option in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--partition=p"):
        assert f"{option} " in done.stdout
    assert done.stdout.strip().endswith(r"launch/slurm.sh --restarts 10 -- train --config a\ \'b.py")


@pytest.mark.parametrize("ends, before, requeued", [(0, 0, False), (75, 10, True), (1, 9, True), (1, 10, False)])
def test_slurm_requeues_what_was_stopped_or_failed(cloud, ends, before, requeued):
    env = cloud(srun=f"echo srun $*; exit {ends}", scontrol="echo scontrol $*")
    env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(before)}
    done = launch("slurm.sh", "--restarts", "10", *TRAIN, env=env)
    assert done.returncode == ends and "srun --label --wait=60" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh"])
def test_what_is_missing_is_said(script):
    action = ["run", "--name", "r", "--zone", "z", "--type", "v4-8"] if script == "tpu_vm.sh" else []
    assert "give the arguments of jaxlm after --" in launch(script, *action).stderr
    assert "unknown argument --node" in launch(script, *action, "--node", "3").stderr
    assert "--nodes needs a value" in launch("slurm.sh", "--nodes").stderr
