#!/usr/bin/env python3
"""A training run on TPU slices of a Kubernetes cluster: writes the JobSet, and hands it to kubectl.

    python launch/gke.py --name r1 --topology v5p:4x4x8 --image IMAGE --bucket my-runs -- train --config configs/...
    python launch/gke.py --name r1 --topology v6e:16x16 --slices 4 --image IMAGE --bucket my-runs -- train --config ...
    python launch/gke.py --dry-run ... -- train --config ...              the manifest, to read or keep
    python launch/gke.py --xpk --cluster c1 ... -- train --config ...     the same run as a command of xpk

What follows -- are the arguments of jaxlm; every host gets the same ones. The cluster needs the JobSet controller and a
node pool of that topology; the image needs jaxlm[tpu] and the configs, in its working folder. The bucket is mounted as
the folder runs/ there, since a run's folder must outlive the hosts; checkpoints go to it faster beside the mount, with
jaxlm[tpu,gcs] in the image and --config.train.bucket=gs://my-runs/checkpoints.

Restarts: a pod that is evicted, preempted or told to stop saves (all do, at one step) and ends with status 75: all are
started again, as often as that happens. One that fails starts all again too, --restarts times.

    kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=r1,batch.kubernetes.io/job-completion-index=0    what it prints
    kubectl get jobset r1                                                                              how it fares
    kubectl delete jobset r1                                                         stops it, saved, and cleans up
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Node pools of the TPU generations; of xpk's names of slices, the prefix and whether they count two cores a chip.
GENERATIONS = {
    "v4": ("tpu-v4-podslice", "v4", 2),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", 1),
    "v5p": ("tpu-v5p-slice", "v5p", 2),
    "v6e": ("tpu-v6e-slice", "v6e", 1),
    "tpu7x": ("tpu7x", "tpu7x", 2),
}
SAVE_S = 600
"""Seconds that a pod has to save in when it is told to stop."""
PREEMPTED = 75
"""What jaxlm ends with once a stopped run is saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or applies."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.xpk:
        command, manifest = xpk_command(args), None
    else:
        command, manifest = ["kubectl", "apply", "-f", "-"], json.dumps(jobset(args), indent=2)
    if args.dry_run:
        print(manifest or shlex.join(command))
        return 0
    return subprocess.run(command, input=manifest, text=True, check=False).returncode


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `arguments` those of jaxlm, and the generation and chips of the topology."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--topology", required=True, metavar="NAME:AxBxC", help="of a slice, as in jaxlm plan")
    parser.add_argument("--image", required=True, help="with jaxlm and the configs")
    parser.add_argument("--slices", type=int, default=1, help="joined over the data-centre network (default 1)")
    parser.add_argument("--bucket", help="mounted as runs/; needed unless the config's run_dir is shared otherwise")
    parser.add_argument("--service-account", default="default", help="of the pods, with access to the bucket")
    parser.add_argument("--restarts", type=int, default=10, help="after failures (default 10)")
    parser.add_argument("--xpk", action="store_true", help="as a command of xpk, which takes no bucket")
    parser.add_argument("--cluster", help="of xpk")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest or command instead")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of jaxlm")
    args = parser.parse_args(argv)
    args.arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    args.generation, _, args.shape = args.topology.partition(":")
    sizes = args.shape.split("x")
    if args.generation not in GENERATIONS or not all(size.isdigit() and int(size) for size in sizes):
        parser.error(f"--topology: expected one of {', '.join(GENERATIONS)} and a shape, as v5p:4x4x8")
    args.chips = math.prod(map(int, sizes))
    if not args.arguments or args.slices < 1:
        parser.error("give at least one slice, and the arguments of jaxlm after --")
    if args.xpk and not args.cluster:
        parser.error("--xpk needs --cluster")
    return args


def jobset(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one job a slice, one pod a host."""
    job = {
        "parallelism": num_hosts(args),
        "completions": num_hosts(args),
        "backoffLimit": 0,  # a slice is all or nothing: the JobSet starts all of it again
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"annotations": bucket_annotations(args)}, "spec": pod(args)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.restarts,
                "rules": [
                    {
                        "name": "stopped",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}],
        },
    }


def pod(args: argparse.Namespace) -> dict[str, Any]:
    """What runs on a host. TPU_WORKER_HOSTNAMES and, of several slices, MEGASCALE_* come from the cluster."""
    container: dict[str, Any] = {
        "name": "jaxlm",
        "image": args.image,
        "command": ["jaxlm", *args.arguments],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips_per_host(args)}},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": args.service_account,
        "terminationGracePeriodSeconds": SAVE_S,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": GENERATIONS[args.generation][0],
            "cloud.google.com/gke-tpu-topology": args.shape,
        },
        "containers": [container],
    }
    if args.bucket:
        container["workingDir"] = "/jaxlm"
        container["volumeMounts"] = [{"name": "runs", "mountPath": "/jaxlm/runs"}]
        attributes = {"bucketName": args.bucket, "mountOptions": "implicit-dirs"}
        spec["volumes"] = [
            {"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        ]
    return spec


def bucket_annotations(args: argparse.Namespace) -> dict[str, str]:
    """What makes the cluster mount buckets."""
    return {"gke-gcsfuse/volumes": "true"} if args.bucket else {}


def chips_per_host(args: argparse.Namespace) -> int:
    """All of them where one host has the slice, else four."""
    whole = 8 if args.generation in ("v5e", "v6e") else 4
    return args.chips if args.chips <= whole else 4


def num_hosts(args: argparse.Namespace) -> int:
    """Of a slice."""
    return args.chips // chips_per_host(args)


def xpk_command(args: argparse.Namespace) -> list[str]:
    """The same run, for those who keep their clusters with xpk."""
    _, name, cores = GENERATIONS[args.generation]
    return [
        "xpk", "workload", "create", f"--workload={args.name}", f"--cluster={args.cluster}",
        f"--tpu-type={name}-{args.chips * cores}", f"--num-slices={args.slices}", f"--docker-image={args.image}",
        f"--max-restarts={args.restarts}", f"--termination-grace-period-seconds={SAVE_S}",
        f"--command={shlex.join(['jaxlm', *args.arguments])}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
