"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ssmrl.checkpoint import load_checkpoint
from ssmrl.stop import StopSignal

LOOP = """
import sys, time
from ssmrl.checkpoint import save_checkpoint
from ssmrl.stop import StopSignal

folder, slow_save = sys.argv[1], sys.argv[2] == "slow"

with StopSignal() as stop:
    for step in range(10**6):
        print(step, flush=True)
        time.sleep(0.05)
        if stop or step == 3:
            save_checkpoint(folder, step + 1, {"step": step})
            while stop and slow_save:
                print("saving", flush=True)
                time.sleep(0.05)
            stop.exit_if_asked()
"""


def loop(folder, how="fast"):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "5\n":
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_update_and_a_save(tmp_path, number, code):
    process = loop(tmp_path)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == code
    last = int(rest.split()[-1]) if rest else 5
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == last + 1
    assert found.state == {"step": last}


def test_a_second_interrupt_ends_it_at_once_and_leaves_a_checkpoint(tmp_path):
    process = loop(tmp_path, "slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "saving\n":
            break
    process.send_signal(signal.SIGTERM)  # asks for what is asked already
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    assert load_checkpoint(tmp_path) is not None


def stopped_within(stop):
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.exit_if_asked()


def test_handlers_come_back_and_the_signal_is_forgotten_by_the_next_block():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        stop = StopSignal()
        with stop:
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
            with pytest.raises(SystemExit, match="143"):
                stop.exit_if_asked()
            assert heard == []
        assert heard == [signal.SIGTERM]  # which nobody has acted on
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
        with stop:
            assert not stop
            stop.exit_if_asked()
        with pytest.raises(SystemExit):
            stopped_within(stop)
        assert heard == [signal.SIGTERM] * 2  # of the last one the block has made an end itself
    finally:
        signal.signal(signal.SIGTERM, before)


FORKED = """
import multiprocessing, os, signal, time
from ssmrl.stop import StopSignal

with StopSignal() as stop:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.5)
    print(child.is_alive())
    child.terminate()
    child.join(10)
    print(child.exitcode)
"""


def test_a_process_that_is_forked_within_it_leaves_interrupts_to_its_parent_and_can_be_ended():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "-15"]


def test_in_another_thread_it_is_refused():
    errors = []

    def enter():
        try:
            with StopSignal():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == ["StopSignal must be entered in the main thread; Python takes signals in no other."]
