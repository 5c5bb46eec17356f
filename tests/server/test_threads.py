"""How many threads compute: as many as find a core."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from server.engine.compute_threads import LONGEST_PAUSE, PAUSE, ThreadScaler, use_device, waited_for_cores
from server.threads import KeyedThreads, usable_cores


class Machine:
    """A clock, and how many threads of a team of a given size find no core."""

    def __init__(self, cores: int) -> None:
        self.now = self.waited = 0.0
        self.cores = cores

    def run(self, team: ThreadScaler, seconds: float, step: float = 0.01) -> list[int]:
        """The sizes that the team had, after each step."""
        sizes = []
        for _ in range(round(seconds / step)):
            team.look()
            sizes.append(team.size)
            self.now += step
            self.waited += step * max(0, team.size - self.cores)
            team.ended()
        return sizes

    def team(self, size: int) -> ThreadScaler:
        return ThreadScaler(size, waited=lambda: self.waited, clock=lambda: self.now)


def test_a_quiet_machine_leaves_the_team_alone() -> None:
    machine = Machine(cores=4)
    assert set(machine.run(machine.team(4), 300)) == {4}


def test_threads_without_a_core_leave_at_once_and_torch_is_told() -> None:
    machine = Machine(cores=3)
    team = machine.team(8)
    assert machine.run(team, 1.0)[-1] == 3
    assert torch.get_num_threads() == 3


def test_steps_that_a_crowd_makes_very_long_are_no_pauses() -> None:
    machine = Machine(cores=1)
    assert machine.run(machine.team(2), 600, step=3.0).count(1) > 150


def test_the_last_thread_stays() -> None:
    machine = Machine(cores=0)
    assert machine.run(machine.team(2), 100)[-1] == 1


def test_threads_come_back_when_there_is_room() -> None:
    machine = Machine(cores=1)
    team = machine.team(8)
    machine.run(team, 5)
    machine.cores = 8
    assert machine.run(team, 3 * LONGEST_PAUSE)[-1] == 8


def test_room_is_tried_more_and_more_rarely_while_there_is_none() -> None:
    machine = Machine(cores=1)
    team = machine.team(2)
    sizes = machine.run(team, 600)
    tries = sum(before < after for before, after in itertools.pairwise(sizes))
    assert 600 / LONGEST_PAUSE <= tries <= 600 / LONGEST_PAUSE + 6
    assert sizes.count(2) < 0.02 * len(sizes)
    machine.cores = 2
    machine.run(team, LONGEST_PAUSE + PAUSE)
    machine.run(team, 30)
    machine.cores = 1
    assert machine.run(team, 2 * PAUSE).count(2) < 100  # and a new crowd begins with short pauses
    machine.cores = 2
    assert machine.run(team, 2 * PAUSE)[-1] == 2


def test_what_is_waited_for_while_nothing_is_computed_does_not_count() -> None:
    machine = Machine(cores=2)
    team = machine.team(2)
    for _ in range(20):
        machine.run(team, 0.2)
        machine.now += 5
        machine.waited += 5
    assert team.size == 2


def test_a_system_that_does_not_say_leaves_the_team_alone() -> None:
    now = 0.0
    team = ThreadScaler(2, waited=lambda: None, clock=lambda: now)
    for _ in range(100):
        now += 0.1
        team.look()
    assert team.size == 2


@pytest.mark.skipif(waited_for_cores() is None, reason="this system does not say how long threads wait")
def test_threads_that_share_a_core_are_seen_to_wait() -> None:
    code = """
import hashlib, os, threading, time
from server.engine.compute_threads import waited_for_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
block = bytes(10**6)
def work():
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        hashlib.sha256(block).digest()  # releases the GIL
threads = [threading.Thread(target=work) for _ in range(2)]
before = waited_for_cores()
[thread.start() for thread in threads]
time.sleep(0.3)
print(waited_for_cores() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) > 0.05


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", None), ("100000 100000", 1), ("150000 100000", 1), ("20000 100000", 1), ("6400000 100000", None)],
)
def test_a_container_has_the_cores_of_its_quota(tmp_path: Path, quota: str, cores: int | None) -> None:
    """None: those that the process may run on."""
    everything = usable_cores(tmp_path / "none")
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores(tmp_path / "cpu.max") == min(cores or everything, everything)


def test_work_of_one_key_holds_one_thread_however_much_there_is() -> None:
    threads, go_on, order = KeyedThreads(2, "test"), threading.Event(), []
    slow = [threads.submit("slow", lambda i=i: (go_on.wait(10), order.append(i))) for i in range(6)]
    assert threads.submit("other", lambda: 7).result(10) == 7, "it finds a free thread"
    dropped = slow[3].cancel()
    go_on.set()
    for future in slow[:3] + slow[4:]:
        future.result(10)
    assert dropped
    assert order == [0, 1, 2, 4, 5]
    with pytest.raises(ZeroDivisionError):
        threads.submit("slow", lambda: 1 // 0).result(10)
    assert threads.submit("slow", lambda: 8).result(10) == 8
    assert not threads._waiting, "nothing is kept of keys that are done"


def test_a_thread_uses_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for name in ("cpu", "cuda:1", "cuda:0", "cuda"):
        use_device(torch.device(name))
    assert used == [torch.device("cuda:1"), torch.device("cuda:0")]
