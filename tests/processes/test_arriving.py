"""Tests that frames are read from a file while another process writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wanfast.runtime.jobs.generate import FramesFile
from wanfast.runtime.processes.arriving import ArrivingFrames

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)  # each is less than a buffer


def test_frames_arrive_before_the_file_is_complete(tmp_path: Path) -> None:
    file, pieces = tmp_path / "frames/0.npy", []
    with ArrivingFrames(pieces.append) as arriving:
        arriving.look(file)
        with FramesFile(file, len(FRAMES), tmp_path) as written:
            for first, end in ((0, 1), (1, 5), (5, 9)):
                written.add(FRAMES[first:end])
                arriving.look(file)
                arriving.look(file)
                assert np.array_equal(np.concatenate(pieces), FRAMES[:end]) and not file.exists()
            written.finish({})
        file.unlink()
        arriving.look(file)
        assert len(pieces) == 3 and np.array_equal(arriving.frames, FRAMES)


def test_a_complete_file_is_read_at_once(tmp_path: Path) -> None:
    file, pieces = tmp_path / "0.npy", []
    np.save(file, FRAMES)
    with ArrivingFrames(pieces.append) as arriving:
        arriving.look(file)
        assert len(pieces) == 1 and np.array_equal(arriving.frames, FRAMES)


def test_frames_that_are_missing_are_no_video(tmp_path: Path) -> None:
    file = tmp_path / "frames/0.npy"
    with ArrivingFrames(lambda frames: None) as arriving, FramesFile(file, len(FRAMES), tmp_path) as written:
        written.add(FRAMES[:5])
        arriving.look(file)
        with pytest.raises(AssertionError):
            _ = arriving.frames
