"""A pod on this machine: N processes of M simulated devices each, joined as hosts are.

    python launch/local_pod.py --processes 2 --devices 4 -- train --config configs/quickstart.py
    python launch/local_pod.py --processes 4 --devices 2 --restarts 10 -- train --config ... --config.mesh.fsdp=8
    python launch/local_pod.py --processes 2 --devices 4 --dry-run -- train --config configs/quickstart.py

What follows -- are the arguments of jaxlm; every process gets the same ones. Lines of process i start with "i| ". When
one process ends with an error the others are stopped too, since they would wait for it; with --restarts all are started
again, and resume from the last checkpoint. A SIGTERM or SIGINT to this command goes to all of them: they save at one
step and end with status 75, which is passed on. Those that have not within --stop-grace seconds are killed.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO


class Host(subprocess.Popen[str]):
    """A process whose lines a thread prints."""

    printer: threading.Thread


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes, waits, and gives the status of the first that failed, or 0."""
    args, command = parse(sys.argv[1:] if argv is None else argv)
    if args.dry_run:
        for process in range(args.processes):
            print(shell_line(command, environment(process, args.processes, args.devices, port=0)))
        return 0
    stopped: list[float] = []
    running: list[Host] = []

    def pass_on(number: int, frame: object) -> None:
        stopped.append(time.monotonic())
        for process in running:
            process.send_signal(signal.SIGTERM)

    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, pass_on)
    for attempt in range(args.restarts + 1):
        if attempt:
            print(f"local_pod: start {attempt + 1} of at most {args.restarts + 1}", flush=True)
        running[:] = start(command, processes=args.processes, devices=args.devices)
        status = wait(running, grace=args.grace, stopped=stopped, stop_grace=args.stop_grace)
        if status == 0 or stopped:
            break
    return status


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and the command of every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="hosts (default 2)")
    parser.add_argument("--devices", type=int, default=4, help="simulated devices of each (default 4)")
    parser.add_argument("--restarts", type=int, default=0, help="how often all are started again (default 0)")
    parser.add_argument("--grace", type=float, default=30, help="seconds to end in, once another failed (default 30)")
    parser.add_argument("--stop-grace", type=float, default=600, help="seconds to save in, once stopped (default 600)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of jaxlm")
    args = parser.parse_args(argv)
    rest = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not rest or min(args.processes, args.devices) < 1 or args.restarts < 0:
        parser.error("give at least one process and device, and the arguments of jaxlm after --")
    return args, [sys.executable, "-m", "jaxlm.cli", *rest]


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What makes a process a host: the coordinator's address, how many there are, and which it is."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }


def shell_line(command: Sequence[str], variables: dict[str, str]) -> str:
    """As one would type it."""
    return " ".join([*(f"{name}={value}" for name, value in variables.items()), shlex.join(command)])


def start(
    command: Sequence[str], *, processes: int, devices: int, out: TextIO | None = None
) -> list[Host]:
    """All processes, with a thread each that writes their lines to `out` (None: what this process prints to).

    Each has its share of the cores (Linux), where there are as many: else all would start threads for every core.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for i in range(processes):
        variables = os.environ | environment(i, processes, devices, port)
        process = Host(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        if cores := _share_of_cores(i, processes):
            os.sched_setaffinity(process.pid, cores)
        process.printer = threading.Thread(target=_print_lines, args=(i, process, out or sys.stdout), daemon=True)
        process.printer.start()
        found.append(process)
    return found


def _share_of_cores(process: int, processes: int) -> list[int]:
    if processes == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // processes
    return cores[process * each : (process + 1) * each]


def _print_lines(i: int, process: Host, out: TextIO) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"{i}| {line}", end="", flush=True, file=out)


def wait(
    running: Sequence[Host], *, grace: float, stopped: Sequence[float] = (), stop_grace: float = math.inf
) -> int:
    """Until all have ended; once one has failed the others have `grace` seconds, and are then killed.

    stopped: when all were asked to stop, filled in while this waits; `stop_grace` seconds after the first they are too.
    """
    failed: float | None = None
    first = 0
    while None in (statuses := [process.poll() for process in running]):  # each is asked, not only the first that runs
        bad = [status for status in statuses if status]
        if bad and failed is None:
            failed, first = time.monotonic(), bad[0]
        now = time.monotonic()
        if (failed is not None and now - failed > grace) or (stopped and now - stopped[0] > stop_grace):
            for process in running:
                process.kill()
        time.sleep(0.05)
    for process in running:
        process.printer.join(timeout=5)  # its last lines say why it ended
    return first or next((status for status in statuses if status), 0)
