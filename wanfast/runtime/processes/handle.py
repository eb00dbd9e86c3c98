"""The Python API's handle starts ranks, which hold loaded models, and sends them videos to make.

Torch-free, because other processes do the work. Any thread may call every method; videos are made one at a time. If a
rank dies, the video that it was making fails, and the ranks are started again for the next video.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wanfast.runtime.config import NO_VIDEO, ModelsConfig, OutputConfig, RanksConfig, parse_size
from wanfast.runtime.config.option import options_of
from wanfast.runtime.errors import ConfigError, from_failure
from wanfast.runtime.machine.packages import require_attention
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.placement import FreeMemory, check_skips, measure, place
from wanfast.runtime.planning.plan import Plan, effective, model_of, output_paths, resolve
from wanfast.runtime.processes.launch import RankGroups
from wanfast.runtime.store.artifacts import new_run_folder
from wanfast.runtime.store.quantized import require_experts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ProgressFn = Callable[[str, int, int], None]  # (stage, steps done, of all steps)

_WORKER = "wanfast.runtime.jobs.generate"
_OF_HANDLE = {*options_of(ModelsConfig), *options_of(RanksConfig)}
_OF_A_VIDEO = ("frames", "size")  # `open` accepts these too, for the largest video that will be made


@dataclasses.dataclass(frozen=True)
class Video:
    """A video that was made."""

    frames: npt.NDArray[np.uint8]
    """[F, H, W, 3], 0..255."""
    document: dict[str, Any]
    """The JSON that is written beside a saved video: options, plan, seconds, versions."""

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that ran: sizes, steps, guidance, skips, mesh, notes."""
        plan: dict[str, Any] = self.document["plan"]
        return plan

    def save(self, path: str | Path, *, overwrite: bool = False, contact_sheet: bool = False) -> None:
        """Writes the mp4 and its JSON, which `wanfast generate --from` can run again. Raises ConfigError."""
        from wanfast.runtime.media import media_io

        output = OutputConfig(output=str(Path(path).absolute()), overwrite=overwrite, contact_sheet=contact_sheet)
        outputs = output_paths(str(output.output), contact_sheet)
        for target in outputs:
            if target.exists() and not overwrite:
                raise ConfigError(f"{target} exists: choose another name, or save with overwrite=True")
        media_io.check_output(str(path), overwrite=overwrite, needed_bytes=self.frames.nbytes // 4, option="save")
        document = self.document | {
            "output": output.output,
            "effective": self.document["effective"] | {"output": dataclasses.asdict(output)},
            "plan": self.plan | {"outputs": [str(target) for target in outputs]},
        }
        sidecar.write_video(self.frames, document, outputs, overwrite=overwrite)


class Handle:
    """A handle owns ranks with loaded models. `wanfast.open` makes one; `close` it, or use it in a `with` block."""

    def __init__(self, **options: Any) -> None:
        """Starts the ranks; they become ready while the first video is planned. Raises WanFastError.

        `options`: the options of `wanfast generate` for models and ranks, by their Python names, and the `size` and
        `frames` of the largest video.
        """
        _refuse(options, options.keys() - _OF_HANDLE - set(_OF_A_VIDEO), "a video: give it to make")
        if options.get("nnodes", 1) != 1:
            raise ConfigError("a handle uses one machine: drop nnodes")
        placed, self._free_memory = _placed({**NO_VIDEO, **options})
        ranks = placed.config.ranks
        self._asked, self._options, self._lock = options, {**options, **_fixed(ranks)}, threading.Lock()
        self._folder = new_run_folder(Path(placed.config.models.artifacts_dir), {"verb": "open", **options})
        self._ranks: RankGroups | None = RankGroups(self._folder, ranks, groups=1)

    def make(self, *, on_progress: ProgressFn = lambda stage, done, total: None, **options: Any) -> Video:
        """Makes one video and waits for it.

        `options`: `image`, `prompt` and the other options of `wanfast generate` for a video or for skips, by their
        Python names. Raises ConfigError and other WanFastErrors: RankFailedError if a rank died, CancelledError after
        `cancel`.
        """
        _refuse(options, options.keys() & _OF_HANDLE, "the handle: give it to wanfast.open")
        _refuse(options, options.keys() & options_of(OutputConfig).keys(), "a file: give it to save")
        plan, files = resolve({**self._options, **options}, writes=False)
        plan = dataclasses.replace(plan, requested={**self._asked, **options})
        (plan,) = place([plan], self._free_memory)  # the models that the ranks hold now are part of the sum
        check_skips(plan)
        files.require()
        require_experts(files, plan.config.models)
        with self._lock:
            if self._ranks is None:
                raise ConfigError("this handle is closed: open another")
            (result,) = self._ranks.run(
                "generate",
                _WORKER,
                [plan.job().to_json()],
                [],
                on_result=lambda index, result: None,
                on_progress=lambda index, stage, done, total: on_progress(stage, done, total),
            )
        if "error" in result:
            raise from_failure(result)
        return _read(result)

    def cancel(self) -> None:
        """Ends the current video between two steps; its `make` raises CancelledError."""
        if self._ranks is not None and self._lock.locked():
            self._ranks.cancel()

    def close(self) -> None:
        """Ends the ranks, after the current video."""
        with self._lock:
            if self._ranks is not None:
                self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make(**options: Any) -> Video:
    """Opens a handle, makes one video and closes the handle; accepts the options of both `open` and `make`."""
    opened = {name: value for name, value in options.items() if name in {*_OF_HANDLE, *_OF_A_VIDEO}}
    with Handle(**opened) as handle:
        return handle.make(
            **{name: value for name, value in options.items() if name not in opened or name in _OF_A_VIDEO}
        )


def _placed(given: dict[str, Any]) -> tuple[Plan, FreeMemory]:
    """Returns a placed plan of a video of the given size, or of the model's own size. Raises WanFastError."""
    files = model_of(given)
    config = effective(given, files, image_sha256="")
    require_attention(config.models.attention, config.ranks.device)
    files.require()
    files.identify()
    require_experts(files, config.models)
    plan = Plan.of(config, files.spec, parse_size(config.video.size))
    free_memory = measure(config.ranks)
    (plan,) = place([dataclasses.replace(plan, requested=given)], free_memory)
    if plan.mesh.replica > 1:
        raise ConfigError(f"a handle makes one video at a time: use --num-gpus {plan.mesh.group_size}")
    return plan, free_memory


def _fixed(ranks: RanksConfig) -> dict[str, Any]:
    """Returns the ranks' options as they were decided; every video of a handle has them."""
    return {name: getattr(ranks, name) for name in options_of(RanksConfig)}


def _refuse(options: dict[str, Any], refused: set[str], belongs_to: str) -> None:
    if refused:
        raise ConfigError(f"{next(name for name in options if name in refused)} is an option of {belongs_to}")


def _read(result: dict[str, Any]) -> Video:
    import numpy as np

    file = Path(result["frames"])
    frames = np.load(file)
    file.unlink()
    return Video(frames, {name: value for name, value in result.items() if name != "frames"})
