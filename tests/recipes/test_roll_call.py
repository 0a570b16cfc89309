"""Before processes are joined: all that are there go on together, and those that are not are named."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxlm.recipes.roll_call import roll_call


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def call(address, *, number, present, timeout_s):
    """What each present process is told: None or the message."""
    told = {}

    def one(index):
        try:
            roll_call(address, number=number, index=index, timeout_s=timeout_s)
            told[index] = None
        except ValueError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_that_are_there_go_on_at_once(address):
    begin = time.monotonic()
    assert call(address, number=4, present=(3, 1, 0, 2), timeout_s=60) == dict.fromkeys(range(4))
    assert time.monotonic() - begin < 30


def test_everyone_is_told_who_is_absent(address):
    told = call(address, number=5, present=(0, 1, 3), timeout_s=1)
    assert told.keys() == {0, 1, 3}
    assert all(f"after 1 s these of the 5 processes have not joined at {address}: 2, 4." in x for x in told.values())


def test_where_process_0_is_absent_it_is_named(address):
    assert "have not joined at" in call(address, number=2, present=(1,), timeout_s=0.5)[1]
    assert f"{address}: 0." in call(address, number=2, present=(1,), timeout_s=0.5)[1]


def test_a_stranger_is_none_of_them(address):
    host, port = address.split(":")

    def stranger():
        time.sleep(0.2)
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"GET / HTTP/1.1\n")

    threading.Thread(target=stranger).start()
    assert call(address, number=2, present=(0,), timeout_s=1)[0].startswith("after 1 s these of the 2")


def test_an_address_without_a_port_is_refused():
    with pytest.raises(ValueError, match="expected host:port of process 0"):
        roll_call("host", number=2, index=0, timeout_s=1)


def test_a_process_that_waits_in_vain_says_for_whom(address):
    code = "from jaxlm.recipes import runtime; runtime.JOIN_TIMEOUT = 1; runtime.join()"
    where = dict(JAX_PLATFORMS="cpu", JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="0")
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "have not joined" in done.stderr and ": 1, 2." in done.stderr
