"""What a stack says of where a thread is. Functions under torch's file names stand in for torch's own frames."""

from __future__ import annotations

import os
import sysconfig
import threading
import time

import pytest

from megatron_ext.training.position import observe, position_of, short_path

SITE = sysconfig.get_path("purelib")
C10D = f"{SITE}/torch/distributed/distributed_c10d.py"
LOGGER = f"{SITE}/torch/distributed/c10d_logger.py"
MAPPINGS = f"{SITE}/megatron/core/tensor_parallel/mappings.py"


def stack(*calls: tuple[str, str], cuda: bool = False):
    """Call through functions of these (name, file), the outermost first, and look from the innermost."""
    import sys

    def look():
        return position_of(sys._getframe(1), cuda=cuda)

    inner = look
    for name, file in reversed(calls):
        scope: dict = {"inner": inner}
        exec(compile(f"def {name}():\n    return inner()", file, "exec"), scope)
        inner = scope[name]
    return inner()


def test_collective_is_named_by_its_function_and_its_caller():
    found = stack(("_reduce", MAPPINGS), ("wrapper", LOGGER), ("all_reduce", C10D))
    assert found.waits
    assert found.text == "all_reduce, called by _reduce (megatron/core/tensor_parallel/mappings.py:2)"


def test_outermost_function_of_the_collective_gives_its_name():
    found = stack(("gather", "/a/b.py"), ("all_gather_object", C10D), ("wrapper", LOGGER), ("all_gather", C10D))
    assert found.text.startswith("all_gather_object, called by gather ")


def test_work_of_its_own_is_named_by_file_and_line():
    found = stack(("_read", f"{SITE}/megatron_ext/data/loader.py"))
    assert not found.waits
    assert found.text == "_read (megatron_ext/data/loader.py:2)"


def test_library_function_is_shown_with_who_of_ours_called_it():
    found = stack(("_read", f"{SITE}/megatron_ext/data/loader.py"), ("memmap", f"{SITE}/numpy/memmap.py"))
    assert found.text == "memmap (numpy/memmap.py:2), called by _read (megatron_ext/data/loader.py:2)"
    assert found.function == "_read (megatron_ext/data/loader.py)"


def test_work_of_torch_distributed_on_checkpoints_is_no_wait():
    assert not stack(("save", "/a/b.py"), ("write_data", f"{SITE}/torch/distributed/checkpoint/filesystem.py")).waits


class Handle:
    """Something to wait for."""

    def wait(self):
        import sys

        return position_of(sys._getframe(1), cuda=False)

    def tolist(self):
        import sys

        caller = sys._getframe(1)
        return [position_of(caller, cuda=cuda) for cuda in (False, True)]


def test_wait_for_a_collective_begun_before_is_a_wait():
    found = Handle().wait()
    assert found.waits and found.text.startswith("the wait for a collective, called by test_wait_for")


def test_reading_a_result_waits_for_the_device_only_where_there_is_one():
    on_cpu, on_cuda = Handle().tolist()
    assert not on_cpu.waits
    assert on_cuda.waits and on_cuda.text.startswith("the wait for the device, called by test_reading")


@pytest.fixture
def sleeper():
    """A thread that stands still."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    yield thread
    release.set()
    thread.join()


def test_thread_that_stands_still_looks_the_same_twice(sleeper):
    first, second = (observe(sleeper.ident, cuda=False) for _ in range(2))
    assert first is not None and second is not None and first[1] == second[1]


def test_thread_that_calls_again_looks_different():
    steps: list = []
    enter, look = threading.Barrier(2), threading.Barrier(2)

    def call():
        enter.wait()
        look.wait()

    def work():
        call()
        call()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(2):
        enter.wait()
        while look.n_waiting == 0:
            time.sleep(0.001)
        steps.append(observe(thread.ident, cuda=False))
        look.wait()
    thread.join()
    assert steps[0][1] != steps[1][1]


def test_thread_that_has_ended_is_nowhere():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert observe(thread.ident, cuda=False) is None


def test_paths_leave_out_where_things_are_installed():
    assert short_path(MAPPINGS) == "megatron/core/tensor_parallel/mappings.py"
    assert short_path(os.path.abspath("megatron_ext/errors.py")) == "megatron_ext/errors.py"
    assert short_path("/home/me/script.py") == "/home/me/script.py"
