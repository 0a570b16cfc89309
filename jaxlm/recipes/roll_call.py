"""Are all processes of a run there? Asked before JAX joins them, which ends a process without a word on who is missing.

Process 0 listens at the coordinator's address, before the coordinator does. Every other one connects, says its number,
and is told who is absent once all have called or the time is up.
"""

from __future__ import annotations

import contextlib
import socket
import time


def roll_call(address: str, *, number: int, index: int, timeout_s: float) -> None:
    """Returns once all `number` processes have called; ValueError naming those that have not within `timeout_s`.

    address: host:port of process 0, the same for all. index: this process's number.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r}: expected host:port of process 0")
    until = time.monotonic() + timeout_s
    absent = _ask(host, int(port), number, until) if index == 0 else _answer(host, int(port), index, until)
    if absent:
        raise ValueError(
            f"after {timeout_s:.0f} s these of the {number} processes have not joined at {address}: {absent}. Look at "
            "their logs, start them, or correct JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS"
        )


def _ask(host: str, port: int, number: int, until: float) -> str:
    """Of process 0: who is absent, as text; empty for nobody. All that have called are told."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host.strip("[]"), port), backlog=number))
        there: dict[int, socket.socket] = {}
        while len(there) < number - 1 and (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # the time is up, or a stranger called
                caller = stack.enter_context(listener.accept()[0])
                caller.settimeout(max(until - time.monotonic(), 0.1))
                there[int(caller.makefile().readline())] = caller
        absent = ", ".join(str(i) for i in range(1, number) if i not in there)
        for caller in there.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{absent}\n".encode())
        return absent


def _answer(host: str, port: int, index: int, until: float) -> str:
    """Of another process: who is absent; "0" if process 0 does not answer."""
    while time.monotonic() < until:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5) as line:
                line.sendall(f"{index}\n".encode())
                line.settimeout(max(until - time.monotonic(), 0) + 10)
                if told := line.makefile().readline():
                    return told.strip()
        except OSError:
            pass
        time.sleep(0.1)
    return "0"
