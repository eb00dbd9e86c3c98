"""Tests the names of run folders and of the files in them."""

from __future__ import annotations

from pathlib import Path

from wanfast.runtime.processes.run_folder import batch_file, frames_file, new_run_folder, result_file


def test_run_folders_never_meet(tmp_path: Path) -> None:
    folders = {new_run_folder(tmp_path, {"n": 1}) for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)


def test_no_two_files_of_a_run_folder_meet(tmp_path: Path) -> None:
    """A run has many batches and jobs, counted from 0."""
    files = [tmp_path / batch_file(index) for index in range(3)]
    files += [of(tmp_path, index) for of in (result_file, frames_file) for index in range(3)]
    assert len({*files}) == 9 and {file.relative_to(tmp_path).parts[0] for file in files} == {
        "job.json", "job-0001.json", "job-0002.json", "results", "frames",
    }  # fmt: skip
