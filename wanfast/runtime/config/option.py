"""Describes a command-line option as an annotated field of a config.

The annotation holds the option's help text, the check of its value, and the commands that have the option.

    steps: Annotated[int, Option("Denoising steps.", SAMPLING, own=True, check=between(1, 1000, "use 1 to 1000"))]

Here, --help shows the option in the panel SAMPLING, and `own=True` means that the model has its own default.
The field's type is the type of the effective value. If a user may give another type, the argument `asked` of `Option`
names this type: for example, --num-gpus takes a number or "auto", and its effective value is a number. An option of the
type tuple[str, ...] may be given several times.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Command

MAKE, SAMPLING, EXACT, LOSSY, GPUS, SERVER, FILES = (
    "What to make", "Sampling", "Exact speed", "Lossy speed", "Several GPUs", "Server", "Files and output"
)  # fmt: skip

WITH_KERNEL: tuple[Command, ...] = ("calibrate-magcache", "bench", "serve")  # these run with any exact attention
MEASURE: tuple[Command, ...] = (*WITH_KERNEL, "calibrate-attention")  # these make many videos
COMPILED: tuple[Command, ...] = (*MEASURE, "warmup")  # these run forwards
ALL: tuple[Command, ...] = (*COMPILED, "doctor")

# The options on which the ratios and errors that a calibration measures depend.
OF_MEASUREMENT = (
    "model", "high_noise_expert", "low_noise_expert", "lora", "lora_high_noise", "lora_low_noise", "precision",
    "quantize", "tf32", "solver", "steps", "shift", "guidance_high_noise", "guidance_low_noise", "size", "frames",
    "last_image",
)  # fmt: skip

_MOST_SHOWN = 60  # characters of a value that a message shows
_PROMPTS = ("prompt", "negative_prompt")  # they are cleaned of control characters

Options = Mapping[str, Any]  # option name -> value
Check = Callable[[Any], str | None]  # value -> None, or how to fix the value


@dataclass(frozen=True, kw_only=True)
class _Facts:
    own: bool = False  # the model has its own default
    default: str | None = None  # what --help shows instead of the field's default
    also: tuple[Command, ...] = ()  # commands that have it, beside generate
    asked: Any = None
    metavar: str | None = None
    envvar: str | None = None
    check: Check | None = None
    of_this_run: bool = False  # `--from` never repeats it: where files lie, and how ranks meet
    of_these_ranks: bool = False  # `--from` repeats it only on as many ranks
    follows: tuple[str, ...] = ()  # if it is not given, its value is derived from these options
    choice: str | None = None  # at most one option of a choice may be given
    path: bool = False
    names: tuple[str, ...] = ()  # of a path option: values that are no path


@dataclass(frozen=True)
class Option(_Facts):
    """This annotation makes a config's field an option, and holds the option's help and further properties.

    The option's name, type and default are those of the field.
    """

    help: str
    panel: str


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """This class describes one option completely: name, type of the given value, default and annotation."""

    name: str
    option: Option
    asked: Any  # the type that may be typed
    default: Any  # dataclasses.MISSING if there is none

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def follows(self) -> frozenset[str]:
        """Returns the options from which the value is derived if the option is not given."""
        return frozenset((*self.option.follows, *(("model",) if self.option.own else ())))

    @property
    def is_repeatable(self) -> bool:
        return typing.get_origin(self.asked) is tuple

    def accept(self, value: Any) -> Any:
        """Checks a value that a user gave, and returns it; None is accepted and means the default.

        If the option is a float, an int becomes a float. A path object becomes a str. For a repeatable option, a list
        or a single value becomes a tuple. Raises ConfigError if the type or the range is wrong.
        """
        if self.is_repeatable and value is not None:
            value = tuple(value) if isinstance(value, list | tuple) else (value,)
        if self.option.path:
            value = tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        if value is not None and not _is_instance(value, self.asked):
            fix = did_you_mean(value, choices_of(self.asked), f"{_describe(self.asked)} is needed")
            raise ConfigError(f"{self.flag} {value!r:.60}: {fix}")
        self.check_range(value)
        return float(value) if isinstance(value, int) and float in (self.asked, *typing.get_args(self.asked)) else value

    def complete(self, value: Any) -> Any:
        """Checks the range of an effective value, and returns the value; a path becomes absolute.

        Raises ConfigError if the value is out of range.
        """
        if self.is_repeatable:
            values = self.accept(value)
            return tuple(absolute(each, self.flag) for each in values) if self.option.path else values
        self.check_range(value)
        is_path = self.option.path and value and value.strip() and value not in self.option.names
        return absolute(value, self.flag) if is_path else value

    def check_range(self, value: Any) -> None:
        """Raises ConfigError if `value` is out of range, or is a text that is not valid.

        A valid text can be encoded as UTF-8, and holds no NUL character unless it is a prompt.
        """
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str):
                _check_text(self.name, each)
            if each is not None and self.option.check is not None and (fix := self.option.check(each)):
                shown = str(each) if len(str(each)) <= _MOST_SHOWN else f"{each!s:.{_MOST_SHOWN - 3}}..."
                raise ConfigError(f"{self.flag} {shown}: {fix}")


def options_of(part: Any) -> dict[str, OptionField]:
    """Returns {name: option} for the fields of a config class, in order; fields that are no options are left out."""
    return _options_of(part)


@functools.cache
def _options_of(part: Any) -> dict[str, OptionField]:
    hints = typing.get_type_hints(part, include_extras=True)
    found = {}
    for field in dataclasses.fields(part):
        hint = hints[field.name]
        option = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Option)), None)
        if option is not None:
            asked = option.asked or hint.__origin__
            found[field.name] = OptionField(name=field.name, option=option, asked=asked, default=field.default)
    return found


def flag(name: str) -> str:
    """Returns an option's flag on the command line: "--num-gpus" for "num_gpus"."""
    return "--" + name.replace("_", "-")


def words(name: str, value: Any) -> tuple[str, ...]:
    """Returns the command-line arguments that set the option `name` to `value`.

    Examples: ("--steps", "40"), ("--compile",), ("--no-compile",). For a tuple, the option is given once for each
    element.
    """
    if isinstance(value, list | tuple):
        return tuple(word for each in value for word in (flag(name), str(each)))
    if isinstance(value, bool):
        return (flag(name) if value else flag(f"no_{name}"),)
    return flag(name), f"{value:.15g}" if isinstance(value, float) else str(value)


def absolute(path: str, option: str) -> str:
    """Makes a path absolute and expands `~` or `~USER`.

    If USER is unknown, raises ConfigError with `option` in the message.
    """
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise ConfigError(
            f"{option} {path}: this machine has no user with the name after ~: write the path without ~"
        ) from None


def at_least(low: int, fix: str) -> Check:
    """Returns a check that accepts values of at least `low`.

    For other values, the error message gives the advice `fix`.
    """
    return lambda value: None if value >= low else fix


def between(low: float, high: float, fix: str) -> Check:
    """Returns a check that accepts values from `low` to `high`, inclusive.

    For other values, the error message gives the advice `fix`.
    """
    return lambda value: None if low <= value <= high else fix


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ConfigError if a name in `given` is not in `known`; the error suggests similar names."""
    if unknown := sorted(given.keys() - known.keys()):
        fix = did_you_mean(unknown[0], known, f"the options are {', '.join(sorted(known))}")
        raise ConfigError(f"unknown option {unknown[0]!r}: {fix}")


def did_you_mean(unknown: Any, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """Returns a question such as "did you mean NAME?"; returns `otherwise` if no name in `known` is similar.

    The question offers up to three names that begin with `unknown`, or else up to three similar names. `prefix` stands
    before each name.
    """
    from difflib import get_close_matches

    if not isinstance(unknown, str) or not unknown.strip():
        return otherwise
    unknown, known = unknown.lower(), sorted(known)
    near = [name for name in known if name.startswith(unknown)][:3] or get_close_matches(unknown, known)
    return f"did you mean {' or '.join(f'{prefix}{name}' for name in near)}?" if near else otherwise


def _is_instance(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_is_instance(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return all(isinstance(each, str) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def choices_of(hint: Any) -> list[str]:
    """Returns the strings of all Literal types in the type `hint`."""
    if typing.get_origin(hint) is Literal:
        return [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
    return [name for choice in typing.get_args(hint) for name in choices_of(choice)]


def _describe(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(choices)
    if typing.get_origin(hint) is tuple:
        return "a text or a list of texts"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "nothing"}
    return " or ".join(_describe(choice) for choice in choices if choice is not types.NoneType) or names[hint]


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_text(name: str, value: str) -> None:
    """Raises ConfigError for a text that no file and no path can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{flag(name)} {value!a:.60} is not valid text: write it as UTF-8") from None
    if "\0" in value and name not in _PROMPTS:
        raise ConfigError(f"{flag(name)} {value!a:.60} holds a NUL character: remove it")


class Part:
    """This class is the base of the parts of a config, such as `RanksConfig`.

    When a part is made, each option's range is checked, and each path becomes absolute. Raises ConfigError.
    """

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.complete(getattr(self, option.name)))
