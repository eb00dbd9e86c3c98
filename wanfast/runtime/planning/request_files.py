"""Reads the options of each video from the command line, and from the files that the command line names.

The files are a text with the prompt (--prompt-file), the JSON of an earlier video (--from) or a list of videos
(--jobs). An option on the command line overrides the same option of the earlier video. An option in a line of the list
overrides the same option on the command line.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfast.runtime.config import OPTIONS, EffectiveConfig, Options, OutputConfig, RanksConfig
from wanfast.runtime.config.option import absolute, flag, options_of
from wanfast.runtime.config.precedence import repeated, without_overridden
from wanfast.runtime.config.skipping import spelled_out
from wanfast.runtime.errors import ConfigError, foreign
from wanfast.runtime.facts.choices import EXPERTS

_SIDECAR = "give the .json that wanfast writes beside a video"  # for --from
_FEW_LINES = 5  # more bad lines than these are reported together, if no line is good
EXPERT_OPTIONS = [f"{expert}_expert" for expert in EXPERTS]
_LORAS = [name for name, option in OPTIONS.items() if option.is_repeatable and option.option.path]
SOURCES = {  # of a video, with the words by which an error names them
    "image": "image",
    "last_image": "last image",
    "continue_from": "continued video",
}
# The options that are the same for all lines of a list, because one mesh makes all of them.
_LAUNCH_OPTIONS = [name for name in options_of(RanksConfig) if name != "device"]


class _NotAnObjectError(ConfigError):
    """This error means that a line of a list is no JSON object."""


@dataclass(frozen=True)
class Request:
    """A request holds the options of one video, and the files from which these options were read."""

    options: dict[str, Any]
    line: int | None = None  # its number in the jobs file
    sources: tuple[Path, ...] = ()  # files that the options came from; never overwritten
    written: tuple[str, ...] = ()  # the prompts that the run of --from extended
    sha256: dict[str, str] = field(default_factory=dict)  # of the images that --from needs, by their option
    weights: dict[str, str] | None = None  # fingerprints of the weights of the run that --from names
    expert_sha256: tuple[str, ...] | None = None  # of the experts that options of that run name
    lora_sha256: tuple[str, ...] | None = None  # of the LoRAs of that run
    engines: str | None = None  # the name of cuDNN's engines in that run, if this one makes the same video
    asked: dict[str, Any] | None = None  # the options that were given, now or for the run of --from; None: all
    notes: tuple[str, ...] = ()  # on the files of --from, and on a last image that is left out
    error: ConfigError | None = None  # the line could not be read


def read_requests(
    typed: dict[str, Any], prompt_file: Path | None, from_file: Path | None, jobs_file: Path | None
) -> list[Request]:
    """Returns one request for each line of `jobs_file`, or a single request if `jobs_file` is None.

    `typed`: the options that the user typed on the command line. `prompt_file`, `from_file` and `jobs_file`: the files
    of --prompt-file, --from and --jobs.
    Raises ConfigError if a typed option is wrong, or if a file cannot be used. A wrong line of `jobs_file` raises no
    error: the request of this line holds the error, and the other lines are read. But if the file has more than five
    lines, and none of them is a JSON object, ConfigError is raised.
    """
    prompt_file, from_file = _whole(prompt_file, "--prompt-file"), _whole(from_file, "--from")
    jobs_file = _whole(jobs_file, "--jobs")
    if prompt_file is not None:
        if "prompt" in typed:
            raise ConfigError("--prompt and --prompt-file both give the prompt: drop one of the two")
        typed = {**typed, "prompt": _read(prompt_file, "--prompt-file").strip()}
    for name, value in typed.items():  # before they are given to each line
        OPTIONS[name].accept(value)
    earlier = Request({}) if from_file is None else _read_earlier(from_file, typed)
    base = dataclasses.replace(
        earlier,
        options={**earlier.options, **typed},
        asked={**(earlier.asked or {}), **typed},
        sources=tuple(file for file in (prompt_file, jobs_file) if file is not None),
        written=() if typed.keys() & {"prompt", "extend_prompt"} else earlier.written,
        sha256={name: sha256 for name, sha256 in earlier.sha256.items() if name in earlier.options.keys() - typed},
        weights=None if {"model", *EXPERT_OPTIONS} & typed.keys() else earlier.weights,
        expert_sha256=None if {*EXPERT_OPTIONS} & typed.keys() else earlier.expert_sha256,
        lora_sha256=earlier.lora_sha256,
        engines=earlier.engines if typed.keys() <= {*options_of(OutputConfig), "artifacts_dir"} else None,
    )
    if jobs_file is None:
        return [base]
    if from_file is not None:
        raise ConfigError(
            "--from and --jobs exclude each other: write the options of the earlier run into the lines of --jobs"
        )
    requests = list(_read_jobs(jobs_file, base))
    if not requests:
        raise ConfigError(f"--jobs {jobs_file} has no lines: write a JSON object of options on each line")
    first = requests[0]
    if len(requests) > _FEW_LINES and all(isinstance(request.error, _NotAnObjectError) for request in requests):
        raise ConfigError(
            f"--jobs {jobs_file}: none of its {len(requests)} lines is a JSON object of options (line {first.line}: "
            f"{first.error}): give a file with one JSON object on each line"
        )
    return requests


def _read_earlier(file: Path, typed: dict[str, Any]) -> Request:
    """Reads the effective options of an earlier run, so that no default and no random seed changes the video."""
    text = _read(file, "--from")
    try:
        document = json.loads(text)
        effective = EffectiveConfig.from_json(document["effective"])
        weights, engines = document["weights"], document.get("cudnn_engines")
        if not isinstance(weights, dict | None) or not isinstance(engines, str | None):
            raise TypeError(weights, engines)
        asked = _asked(document["requested"])
    except ConfigError as error:
        raise ConfigError(
            f"--from {file} holds an option that cannot be used: {error}; correct this option in the file, or use the "
            ".json of another video"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--from {file} is not the .json of a video: {_SIDECAR}") from None
    same_ranks = effective.ranks.nnodes == 1 and not {"num_gpus", "nnodes"} & typed.keys()
    reused = {
        name
        for name, field in OPTIONS.items()
        if not field.option.of_this_run and (same_ranks or not field.option.of_these_ranks)
    }
    ran = {name: value for name, value in effective.options().items() if name in reused}
    asked = {name: ran[name] if OPTIONS[name].option.path else asked[name] for name in asked.keys() & reused}
    options, asked = repeated(ran, asked, typed)  # with paths as in `ran`, which are absolute
    has_its_loras = all(name in options and options[name] == ran[name] for name in _LORAS)
    if has_its_loras:  # those that the model brought are found again, because its folder may have another path now
        options = {name: value for name, value in options.items() if name not in _LORAS or name in asked}
    if "extend_prompt" in typed and effective.video.written_prompts:
        options["prompt"] = effective.video.written_prompts
    return Request(
        options,
        asked=asked,
        written=effective.video.written_prompts,
        sha256={name: sha256 for name in SOURCES if (sha256 := getattr(effective.video, f"{name}_sha256"))},
        weights=weights,
        expert_sha256=effective.models.expert_sha256,
        lora_sha256=effective.models.lora_sha256 if has_its_loras else None,
        engines=engines,
        notes=(*_notes_on_video(file, document), *_notes_on_last_image(ran, options, typed)),
    )


def _notes_on_video(file: Path, document: dict[str, Any]) -> tuple[str, ...]:
    """Returns a note if the mp4 beside the .json of --from is another video than that of the .json.

    Another program may have replaced the mp4 alone. If no mp4 is there, or if it cannot be read, there is no note.
    """
    video = file.with_suffix(".mp4")
    try:
        with video.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return ()
    if document.get("output_sha256") in (None, found):
        return ()
    return (f"--from: {file} describes another video than {video}, which was replaced or changed later",)


def _notes_on_last_image(before: Options, after: Options, nearer: Options) -> list[str]:
    """Returns a note if several prompts in `nearer` override the last image, which `before` has and `after` lacks."""
    if before.get("last_image") is None or {"last_image"} & (after.keys() | nearer.keys()):
        return []
    return [
        f"--prompt is given {len(nearer['prompt'])} times, so the last image {before['last_image']} is left out: a "
        "last image is for a single clip"
    ]


def _asked(requested: dict[str, Any]) -> dict[str, Any]:
    """Returns the options in `requested` of an earlier run's .json that this version has. Raises ConfigError."""
    known = {name: value for name, value in requested.items() if name in OPTIONS and value is not None}
    for name, value in known.items():
        OPTIONS[name].accept(value)
    return known | spelled_out(known.get("magcache", ""))


def _read_jobs(file: Path, base: Request) -> Iterator[Request]:
    """Yields a request for each line, except blank lines and # lines. Line 7 writes out-0007.mp4 by default."""
    stem = Path(base.options.get("output", "out.mp4"))
    for number, line in enumerate(_read(file, "--jobs").split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            own = _read_line(line, file.parent, base)
        except ConfigError as error:
            yield Request({}, number, error=error)
            continue
        options = without_overridden(base.options, own)
        own_name = str(stem.with_stem(f"{stem.stem}-{number:04d}"))
        yield dataclasses.replace(
            base,
            options={**options, "output": own_name, **own},
            asked=None,
            line=number,
            notes=(*base.notes, *_notes_on_last_image(base.options, options, own)),
        )


def _read_line(line: str, folder: Path, base: Request) -> dict[str, Any]:
    """Returns the options of a line; null leaves an option as the command line has it. Raises ConfigError.

    The paths of a line's images, experts and LoRAs are relative to the list's own folder, because they move together
    with the list.
    """
    try:
        own = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _NotAnObjectError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _NotAnObjectError(f"not JSON: {error!s:.80}") from None
    if not isinstance(own, dict):
        raise _NotAnObjectError('not a JSON object: write one, such as {"prompt": ...}')
    own = {name: value for name, value in own.items() if value is not None}
    if other := [name for name in _LAUNCH_OPTIONS if name in own and own[name] != base.options.get(name)]:
        raise shared_by_all(other[0])
    for name in own.keys() & {*SOURCES, *EXPERT_OPTIONS}:
        if isinstance(path := own[name], str) and path and not path.startswith("~"):
            own[name] = str(folder / path)
    for name in own.keys() & _LORAS:
        given = OPTIONS[name].accept(own[name])
        own[name] = tuple(each if each.startswith("~") else str(folder / each) for each in given)
    return own


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON. Raises ConfigError if it has one key twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{twice!r:.60} is given twice in the line: keep one")
    return dict(pairs)


def _whole(file: Path | None, option: str) -> Path | None:
    return None if file is None else Path(absolute(str(file), option))


def _read(file: Path, option: str) -> str:
    named, fix = f"{option} {file}", _SIDECAR if option == "--from" else "give a UTF-8 text file that can be read"
    with foreign(named, fix):
        is_missing = not file.exists()
    if is_missing:
        raise ConfigError(f"{named}: no such file; check the path")
    with foreign(named, fix):
        return file.read_text(encoding="utf-8-sig")


def shared_by_all(name: str) -> ConfigError:
    """Returns an error: option `name` must be the same in all lines of a list, but one line changes it."""
    return ConfigError(
        f"{flag(name)} must be the same for the whole list: give it on the command line, or make a second list"
    )
