"""Names the files of a run folder; by these files, the parent and the ranks exchange jobs, progress and results.

This module does not import torch.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from wanfast.runtime.store.artifacts import key_of, replace_text, writing_to

JOB = "job.json"  # the first batch of jobs
RESULT = "result.json"  # the results of all jobs, after the last one
RESULTS = "results"  # the result of each job
CLAIMS = "claims"  # which rank group took which job
PROGRESS = "progress"  # how far each rank group is
RANKS = "ranks"  # the process id, the progress and the error of each rank
SETUP = "setup.json"  # how ranks are set up
CANCEL = "cancel"  # which batches are cancelled
CLOSE = "close"  # exists if no batch will follow


def batch_file(number: int) -> str:
    """Returns a file name in the run folder; the file holds the jobs of batch `number`, counted from 0."""
    return JOB if number == 0 else f"job-{number:04d}.json"


def frames_file(run_folder: Path, index: int) -> Path:
    """Returns the path of the .npy file with the frames of job `index`; jobs with a video file write no .npy file."""
    return run_folder / "frames" / f"{index}.npy"


def result_file(run_folder: Path, index: int) -> Path:
    """Returns the path of the file with the result of job `index`."""
    return run_folder / RESULTS / f"{index}.json"


def new_run_folder(root: Path, inputs: dict[str, Any]) -> Path:
    """Makes a new folder in `root`/runs, and returns its path.

    The folder's name is <UTC time>-<first 8 hex digits of the sha256 of `inputs`>. If a folder of this name exists, a
    number is appended. `inputs`: a JSON object that describes the run. Raises ConfigError if the folder cannot be made.
    """
    stem = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{key_of(inputs)[:8]}"
    with writing_to(root):
        (root / "runs").mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            folder = root / "runs" / (f"{stem}-{attempt}" if attempt else stem)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise AssertionError("unreachable: itertools.count never ends")


def write_result(run_folder: Path, index: int, result: dict[str, Any]) -> None:
    """Writes the result of job `index` into the run folder. Raises ConfigError if the file cannot be written."""
    replace_text(result_file(run_folder, index), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
