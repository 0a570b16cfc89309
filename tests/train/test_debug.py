"""What --debug promises: a NaN is traced to its line, nothing travels unasked, nothing is compiled twice."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.train import debug

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))
tiny_run, Data, comparable = (TINY[name] for name in ("tiny_run", "Data", "comparable"))


def half_of(x):
    return x / 2


def log_of_a_negative(x):
    return jnp.log(x - 10)


def test_a_nan_is_traced_to_the_line_that_made_it():
    with pytest.raises(FloatingPointError, match="nan") as error:
        debug.trace(lambda x: log_of_a_negative(half_of(x)), jnp.ones(3))
    names = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert "log_of_a_negative" in names and "half_of" not in names


def test_an_infinity_is_said_to_be_one():
    with pytest.raises(FloatingPointError, match="no operation made a NaN: the loss or the gradient is infinite"):
        debug.trace(lambda x: 1 / x, jnp.zeros(3))


def test_a_second_compilation_is_refused_and_what_changed_is_named():
    watched = debug.watch(lambda x, y: x.sum() + y.sum(), "the step")
    x, y = jnp.ones((4, 2)), jnp.ones(3)
    assert float(watched(x, y)) == float(watched(x + 1, y)) - 8
    with pytest.raises(RuntimeError, match=r"the step was compiled again: \[1\] was float32\[3\] .*is float32\[5\]"):
        watched(x, jnp.ones(5))


def test_an_array_of_the_host_is_refused():
    watched = debug.watch(lambda x: x + 1, "the step")
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        watched(np.ones(3, np.float32))


def test_a_watched_run_gives_the_same_numbers(tmp_path):
    tiny_run(tmp_path / "plain", num_steps=6)
    tiny_run(tmp_path / "watched", num_steps=6, compile_step=debug.compile_watched)
    assert comparable(tmp_path / "watched") == comparable(tmp_path / "plain")


@pytest.mark.slow
def test_a_watched_run_stops_at_the_first_bad_step_in_the_loss(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        tiny_run(tmp_path, data=Data(bad=(2,)), compile_step=debug.compile_watched)
    assert "loss_fn" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]


def test_it_is_on_where_nan_tracing_is():
    assert not debug.enabled()
    with jax.debug_nans(True):
        assert debug.enabled()
