"""Tests `--extend-prompt`: what the program gets, what is taken, what is refused, and what `--from` repeats."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Outcome
from tests.server.running import until
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.planning import prompt_extension
from wanfast.runtime.planning.prompt_extension import extended

Wanfast = Callable[..., Outcome]
MAKE = ("generate", "--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "1", "--json")
GIVEN = ("--image", "cat.png", "--prompt", "a cat")


@pytest.fixture
def program(workdir: Path) -> str:
    """Writes a program that extends a prompt by its argument and the name of the image, and counts its runs."""
    lines = (
        "import os, pathlib, sys",
        "open('runs', 'a').write('x')",
        "image = pathlib.Path(os.environ.get('WANFAST_IMAGE', 'none'))",
        "print(sys.stdin.read() + sys.argv[1], image.name, image.is_absolute(), '\\n')",
    )
    Path("my extend.py").write_text("\n".join(lines))
    return f"{sys.executable} 'my extend.py' ', $(HOME);'"


def test_both_prompts_are_stored_and_from_runs_no_program(wanfast: Wanfast, workdir: Path, program: str) -> None:
    first = wanfast(*MAKE, *GIVEN, "--extend-prompt", program)
    assert first.exit_code == 0, first.err
    new = "a cat, $(HOME); cat.png True"
    assert f"note: --extend-prompt: the prompt is '{new}'" in first.err
    made, runs = first.document, Path("runs")
    assert made["effective"]["video"]["prompt"] == new and made["plan"]["written_prompts"] == ["a cat"]
    again = wanfast(*MAKE[:1], "--from", "out.json", "--output", "again.mp4", "--json").document
    assert again["output_sha256"] == made["output_sha256"] and runs.read_text() == "x"
    assert again["plan"]["written_prompts"] == ["a cat"] and again["effective"]["video"]["extend_prompt"] is None

    dry = ("generate", "--from", "again.json", "--dry-run", "--json")
    anew = wanfast(*dry, "--extend-prompt", program).document
    assert anew["effective"]["video"]["prompt"] == new and runs.read_text() == "xx"
    other = wanfast(*dry, "--prompt", "a dog").document
    assert other["effective"]["video"]["prompt"] == "a dog" and other["plan"]["written_prompts"] == []


def test_only_the_first_clip_has_an_image(wanfast: Wanfast, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANFAST_IMAGE", "/of/another/program.png")
    made = wanfast(*MAKE, *GIVEN, "--prompt", "a dog", "--extend-prompt", program, "--dry-run").document
    assert made["effective"]["video"]["prompt"] == ["a cat, $(HOME); cat.png True", "a dog, $(HOME); none False"]
    assert made["plan"]["written_prompts"] == ["a cat", "a dog"]


@pytest.mark.parametrize("machine", [0, 1])
def test_of_several_machines_only_the_first_one_runs_the_program(
    wanfast: Wanfast, workdir: Path, program: str, machine: int
) -> None:
    """All machines make the first one's jobs, so that its prompt is that of the video."""
    nodes = ("--nnodes", "2", "--rdzv-endpoint", "a:1", "--node-rank", str(machine))
    made = wanfast(*MAKE, *GIVEN, *nodes, "--extend-prompt", program, "--dry-run")
    prompt, note = made.document["effective"]["video"]["prompt"], "the program runs on machine 0, and all machines use"
    assert prompt == ("a cat" if machine else "a cat, $(HOME); cat.png True")
    assert Path("runs").exists() == (machine == 0) and (note in made.err) == (machine == 1)
    assert made.document["plan"]["written_prompts"] == ([] if machine else ["a cat"])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(' ')", "printed nothing: print the new prompt on stdout"),
        ("import os; os.write(1, bytes([1]))", "printed nothing"),
        ("print('a\\nb')", "printed 2 lines: print only the new prompt, on one line"),
        ("print('a' * 5001)", "printed 5001 characters: print at most 5000"),
        ("import os; os.write(1, bytes([255]))", "its output is not UTF-8: print the new prompt as UTF-8"),
        ("import sys; sys.exit('one\\n\\ntwo')", "ended with code 1 (two): correct the program, or drop --ext"),
        ("raise SystemExit(3)", "ended with code 3 (nothing on stderr): correct the program"),
        ("while True: print('a' * 9999)", "its output does not stop: print only the new prompt, on one line"),
        ("import sys; sys.exit('x' * 99_999 + '\\nlast')", "ended with code 1 (last): correct the program"),
        ("print('a\\0b')", "printed the control character '\\x00': print only text"),
        ("print('\\33[1mbold')", "printed the control character '\\x1b': print only text"),
        ("import os; os.fork() or __import__('time').sleep(60)", "printed nothing"),
        ("import time; time.sleep(60)", "did not end within 0.5 s: use a faster program, or drop --extend-prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep(" in code:
        monkeypatch.setattr(prompt_extension, "TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError) as refused:
        extended(f'{sys.executable} -S -c "{code}"', "a cat", None)
    assert str(refused.value).startswith(f"--extend-prompt {sys.executable}: ") and words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_that_the_program_started_is_left(tmp_path: Path) -> None:
    """A child of the program would hold its stdin, and perhaps a GPU."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, time\nchild = os.fork()\nprint(child) if child else (os.close(1), os.close(2), time.sleep(9))\n"
    )
    started = time.monotonic()
    pid = int(extended(f"{sys.executable} -S {script}", "a" * 200_000, None))  # more than a pipe holds; nobody reads it
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5)
    assert time.monotonic() - started < 8


def test_a_process_in_its_own_session_may_hold_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a process is a server that the program started for later prompts: it goes on, and nobody waits for it."""
    monkeypatch.setattr(prompt_extension, "TIMEOUT_S", 3)
    script = tmp_path / "server.py"
    script.write_text(
        "import os, time\nchild = os.fork()\nif child: print(child)\nelse:\n    os.setsid()\n    time.sleep(20)\n"
    )
    started = time.monotonic()
    server = psutil.Process(int(extended(f"{sys.executable} -S {script}", "a cat", None)))
    assert time.monotonic() - started < 8 and server.is_running()
    server.kill()


def test_a_process_that_prints_just_after_the_end_is_waited_for() -> None:
    """A shell does not wait for the process that its output is redirected to."""
    command = "bash -c 'exec > >(sleep 0.2; cat); echo from the pipeline'"
    assert extended(command, "a cat", None) == "from the pipeline"


def test_the_program_runs_after_all_checks(wanfast: Wanfast, workdir: Path, program: str) -> None:
    """It may take minutes, and a wrong option is known before."""
    for wrong in (("--magcache", "preset"), ("--output", "none/out.mp4"), ("--frames", "6")):
        assert wanfast(*MAKE, *GIVEN, "--extend-prompt", program, *wrong, "--dry-run").exit_code == 2
    assert not Path("runs").exists()


def test_a_command_with_a_nul_is_one_line(wanfast: Wanfast, workdir: Path) -> None:
    Path("jobs.jsonl").write_text(json.dumps({"extend_prompt": "a\0b"}))
    (line,) = wanfast(*MAKE, *GIVEN, "--jobs", "jobs.jsonl", "--dry-run").document["results"]
    assert line["error"].startswith("--extend-prompt") and "holds a NUL character: remove it" in line["error"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "--extend-prompt : has an empty value: give a program and its arguments"),
        ("a 'b", "--extend-prompt a 'b: has a quote that is not closed: write the command as for a shell"),
        ("./none x", "--extend-prompt ./none: cannot be started (No such file or directory): give the path of a"),
    ],
)
def test_a_command_that_cannot_run_is_one_line(wanfast: Wanfast, command: str, words: str) -> None:
    outcome = wanfast(*MAKE, *GIVEN, "--extend-prompt", command, "--dry-run")
    assert outcome.exit_code == 2 and words in outcome.err and len(outcome.err.splitlines()) == 1
