"""Tests how a launcher forks ranks that wait to be started; small programs stand for launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from torch._inductor.async_compile import AsyncCompile

from tests.forked import ForkedPopen
from tests.processes.test_launch import PACKAGE, gone

FORKS = """
import os, signal, sys, time
from wanfast.runtime.processes.forks import fork
os.environ["WANFAST_PARENT"] = str(os.getpid())
ranks = fork(2)
if not ranks:
    print(os.environ["RANK"], os.getsid(0) == os.getpid(), os.getppid() == int(os.environ["WANFAST_PARENT"]))
    print("error", file=sys.stderr)
    sys.exit(3 + int(os.environ["RANK"]))
"""
STARTS = """
for number, rank in enumerate(ranks):
    with open(f"{number}.out", "w") as out, open(f"{number}.err", "w") as err:
        rank.start(os.environ | {"RANK": str(number)}, out, err)
print([rank.wait(10) for rank in ranks], [rank.poll() for rank in ranks])
"""


def launcher(folder: Path, code: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    return subprocess.Popen(
        [sys.executable, "-c", FORKS + code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_rank_gets_its_environment_session_and_streams(tmp_path: Path) -> None:
    out, _ = launcher(tmp_path, STARTS).communicate(timeout=20)
    assert out == "[3, 4] [3, 4]\n"
    assert [(tmp_path / f"{rank}.out").read_text() for rank in (0, 1)] == ["0 True True\n", "1 True True\n"]
    assert [(tmp_path / f"{rank}.err").read_text() for rank in (0, 1)] == ["error\n"] * 2


def test_a_rank_that_died_before_its_start_is_reported(tmp_path: Path) -> None:
    kill = "os.kill(ranks[0].pid, signal.SIGKILL); os.waitid(os.P_PID, ranks[0].pid, os.WEXITED | os.WNOWAIT)"
    out, _ = launcher(tmp_path, kill + STARTS).communicate(timeout=20)
    assert out == "[-9, 4] [-9, 4]\n"


def test_ranks_that_wait_die_with_their_launcher(tmp_path: Path) -> None:
    with launcher(tmp_path, "print('forked', flush=True); time.sleep(100)") as process:
        assert process.stdout and process.stdout.readline() == "forked\n"
        ranks = psutil.Process(process.pid).children()
        process.kill()
    assert len(ranks) == 2 and gone(ranks, 5)


def test_a_signal_that_comes_with_the_fork_of_a_command_ends_it() -> None:
    """Else a launcher that was stopped at once stayed, and was killed eight seconds later."""
    now = [True]
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM) if now else None)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a command leaves it to this process
    try:
        command = ForkedPopen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    finally:
        signal.signal(signal.SIGTERM, before)
        now.clear()
    assert command.wait(10) == -signal.SIGTERM


def test_the_exit_functions_of_a_forked_command_close_no_file_of_its_own() -> None:
    """Ranks aborted at their end, when pytest's log file was closed by its number, which gloo had got since."""
    code = (
        "import atexit, os; files = [os.open('/dev/null', os.O_RDONLY) for _ in range(50)]; atexit._run_exitfuncs(); "
    )
    command = ForkedPopen([sys.executable, "-c", code + "[os.fstat(file) for file in files]"], stderr=subprocess.PIPE)
    assert command.wait(10) == 0


def test_a_forked_command_compiles_with_threads_of_its_own() -> None:
    """It waited without end for a compiler, because the threads of the process that forked it had not come along."""
    AsyncCompile.pool().submit(int).result()
    code = "from torch._inductor.async_compile import AsyncCompile; print(AsyncCompile.pool().submit(int).result(9))"
    command = ForkedPopen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert command.communicate()[0] == "0\n"


def test_a_command_whose_test_is_out_of_time_is_killed() -> None:
    with (
        pytest.raises(TimeoutError),
        ForkedPopen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE) as command,
    ):
        raise TimeoutError
    assert command.returncode == -signal.SIGKILL
