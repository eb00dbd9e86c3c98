"""Times the start and the end of a command: what happens between Enter and ready ranks, and after the result.

    python benchmarks/start.py --ranks 4 --device cuda
    python benchmarks/start.py --ranks 2 --rounds 3                          # a quick check, on a CPU
    python benchmarks/start.py --checkout OLDER --checkout .                 # two versions in turn

Each start runs `wanfast generate` on the tiny model. A `sitecustomize` module in every process records the time of each
event. "ready" means that all ranks have imported the worker and formed the process group; no GPU was used yet. Each
checkout starts in two ways: "bytecode" reads the bytecode of an earlier start, and "none" neither reads nor writes
bytecode. A row has the times of the fastest start: the start with the lowest sum of "ready" and "end". All times are in
seconds after Enter, except "end", which counts from the result. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import hooked

from wanfast.runtime.machine import gpus, host
from wanfast.runtime.machine.packages import commit, versions

PICTURE = Path(__file__).parents[1] / "wanfast/assets/examples/star.png"
MARKS = """
def mark(name):
    note(f"{time.time()} {os.getpid()} {name}")

def before(module, name, text):
    work = getattr(module, name)
    def marked(*arguments, **named):
        mark(text)
        return work(*arguments, **named)
    setattr(module, name, marked)

def after(module):
    name = "join" if hasattr(module, "join") else "rank_group"  # an older version has only the second one
    work = getattr(module, name)
    def joined(*arguments):
        ranks = work(*arguments)
        mark("group formed")
        return ranks
    @contextlib.contextmanager
    def within(*arguments):
        with work(*arguments) as ranks:
            mark("group formed")
            yield ranks
        mark("group parted")
    setattr(module, name, joined if name == "join" else within)

def worker(module):
    mark("worker imported")
    before(module, "run", "ready")

def leaving(module):
    leave = module.leave
    def marked(code):
        mark("ranks leave" if "RANK" in os.environ else "launchers leave")
        leave(code)
    module.leave = marked

AFTER = {
    "wanfast.runtime.processes.forks": leaving,
    "wanfast.commands.dispatch": lambda module: before(module, "run_jobs", "plan made"),
    "torch": lambda module: mark("torch imported"),
    "torch.distributed.launcher.api": lambda module: mark("launcher imported"),
    "wanfast.runtime.distributed.ranks": after,
    "wanfast.runtime.jobs.generate": worker,
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--checkout",
        type=Path,
        action="append",
        help="folder with a version of wanfast, may be given several times; by default the folder of this file",
    )
    options = parser.parse_args()
    checkouts = [path.resolve() for path in options.checkout or [Path(__file__).parents[1]]]
    starts: dict[tuple[Path, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 + options.rounds):
            for checkout in checkouts:
                for way in ("bytecode", "none"):
                    seconds = _start(Path(scratch), checkout, way, options)
                    if number:  # the first one writes bytecode, and reads files that the page cache lacks
                        starts[checkout, way].append(seconds)
                        print(checkout, way, json.dumps(seconds), file=sys.stderr)
    rows = [
        {"commit": _commit(checkout), "bytecode": way == "bytecode", "seconds": min(found, key=_sum)}
        | {"ready_s": sorted(one["ready"] for one in found), "end_s": sorted(one["end"] for one in found)}
        for (checkout, way), found in starts.items()
    ]
    hardware = {"cpu": platform.processor() or platform.machine(), "cores": host.cores()}
    hardware["gpus"] = [gpu.name for gpu in gpus.visible_gpus()] if options.device == "cuda" else []
    facts = {"ranks": options.ranks, "device": options.device, "rounds": options.rounds, "hardware": hardware}
    print(json.dumps({**facts, "versions": versions(), "commit": commit(), "rows": rows}))


def _commit(checkout: Path) -> str | None:
    if checkout == Path(__file__).parents[1].resolve():
        return commit()
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _sum(seconds: dict[str, float]) -> float:
    return seconds["ready"] + seconds["end"]


def _start(scratch: Path, checkout: Path, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds after Enter of each moment; "end" is from the result to the end of the last process."""
    marks = scratch / "marks"
    marks.unlink(missing_ok=True)
    artifacts = scratch / f"artifacts-{time.time_ns()}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        **hooked(scratch, MARKS, checkout),
        "PYTHONPYCACHEPREFIX": str(scratch / way),
        **({"PYTHONDONTWRITEBYTECODE": "1"} if way == "none" else {}),
    }
    command = [sys.executable, "-m", "wanfast", "generate", "--model=tiny", f"--image={PICTURE}", "--prompt=a star"]
    command += ["--seed=1", "--size=64x64", "--frames=5", "--steps=1", f"--output={scratch / 'out.mp4'}", "--overwrite"]
    command += [f"--device={options.device}", f"--num-gpus={options.ranks}", f"--artifacts-dir={artifacts}"]
    began = time.time()
    process = subprocess.Popen(command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    gone = _watch(process, artifacts, marks)
    exited = time.time()
    if process.returncode:
        raise SystemExit(process.stdout.read().decode())
    results = [*artifacts.glob("runs/*/results/*.json")] or [scratch / "out.json"]  # one rank is the command's process
    written = max(file.stat().st_mtime for file in results)
    moments: dict[str, float] = {}
    for line in marks.read_text().splitlines():
        at, _, name = line.split(" ", 2)
        moments[name] = max(moments.get(name, 0), float(at))  # of the last process
    if started := [file.stat().st_mtime for file in artifacts.glob("runs/*/ranks/*/pid")]:
        moments["ranks started"] = max(started)
    moments |= {"result written": written, "last other process gone": gone, "exit": exited}
    seconds = {name: round(at - began, 3) for name, at in sorted(moments.items(), key=lambda item: item[1])}
    return seconds | {"end": round(max(gone, exited) - written, 3)}


def _watch(process: subprocess.Popen[bytes], artifacts: Path, marks: Path) -> float:
    """Waits for the end of all processes; returns when the last one except the command ended."""
    while process.poll() is None and not list(artifacts.glob("runs/*/results/*.json")):
        time.sleep(0.05)
    others = {int(line.split()[1]) for line in marks.read_text().splitlines()} if marks.exists() else set()
    others |= {int(file.read_text()) for file in artifacts.glob("runs/*/ranks/*/pid")}
    others -= {process.pid}
    gone = time.time()
    while process.poll() is None or others:
        others = {pid for pid in others if Path("/proc", str(pid)).exists()}
        gone = time.time() if others else gone
        time.sleep(0.005)
    return gone


if __name__ == "__main__":
    main()
