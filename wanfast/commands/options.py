"""Builds the command line: the options of each command are fields of the config."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from wanfast.runtime.config import OPTIONS
from wanfast.runtime.config.option import (
    EXACT,
    FILES,
    GPUS,
    LOSSY,
    MAKE,
    SAMPLING,
    SERVER,
    OptionField,
    choices_of,
    did_you_mean,
)
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Command
from wanfast.runtime.facts.model_spec import A14B

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Typer does not export it by name

PANELS = (MAKE, SAMPLING, EXACT, LOSSY, GPUS, SERVER, FILES)

Model = Annotated[str, typer.Option(help=OPTIONS["model"].option.help, rich_help_panel=MAKE)]
ArtifactsDir = Annotated[
    str,
    typer.Option(
        envvar=OPTIONS["artifacts_dir"].option.envvar,
        help=OPTIONS["artifacts_dir"].option.help,
        rich_help_panel=FILES,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document as the last line of stdout.", rich_help_panel=FILES),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and stop. No weights are needed.", rich_help_panel=FILES)
]
SeedOfClips = Annotated[
    int, typer.Option(help="Seed of the first clip; the next clip gets seed + 1.", rich_help_panel=MAKE)
]


def files(name: str) -> Any:
    """Returns the Typer option `name`, whose values are files of experts or LoRAs."""
    facts = OPTIONS[name].option
    return typer.Option(metavar=facts.metavar, help=facts.help, rich_help_panel=facts.panel)


def clip_set(by_default: str) -> Any:
    """Returns the option --set of a command that reads a set of clips; `by_default` describes the default set."""
    return typer.Option(
        "--set",
        help="A folder with a file clips.jsonl. Each line of the file is a JSON object with the key prompt. If the "
        "model takes images, a line also needs the key image; the key last_image is optional.",
        show_default=by_default,
        rich_help_panel=MAKE,
    )


def takes_options(command: Command) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds the options of `command` to the parameters of a Typer function.

    In the decorated function, `given(context)` returns the options that the user gave.
    """
    chosen = [option for option in OPTIONS.values() if command == "generate" or command in option.option.also]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
        ]
        added = sorted(map(_parameter, chosen), key=_panel)

        def run(context: typer.Context, **values: Any) -> None:
            function(context, **{parameter.name: values[parameter.name] for parameter in own[1:]})

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature([own[0], *added, *own[1:]])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(option: OptionField) -> inspect.Parameter:
    facts, asked = option.option, option.asked
    spellings = (
        (f"{option.flag}/--no-{option.flag[2:]}",) if bool in (asked, *typing.get_args(asked)) else (option.flag,)
    )
    default = None if option.default is dataclasses.MISSING else option.default
    choices: dict[str, Any] = {}
    if option.is_repeatable:
        asked = list[str]
    if option.name == "num_gpus":  # typer has no type for "a number or a word"
        asked, choices = Any, {"parser": _number_or_auto}
    shown: str | bool = True
    if facts.own:
        shown = f"the model's own; a14b: {_short(getattr(A14B, option.name))}"
    elif facts.default is not None:
        shown = facts.default
    info = typer.Option(
        *spellings,
        help=facts.help,
        metavar=facts.metavar,
        envvar=facts.envvar,
        rich_help_panel=facts.panel,
        show_default=shown,
        **choices,
    )
    annotation: Any = Annotated[asked if default is not None else asked | None, info]
    return inspect.Parameter(
        option.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )


def _panel(parameter: inspect.Parameter) -> int:
    (info,) = parameter.annotation.__metadata__
    return PANELS.index(info.rich_help_panel)


def _short(value: Any) -> str:
    return f"{value:.12}..." if isinstance(value, str) and len(value) > 20 else str(value)


def _number_or_auto(value: int | str) -> int | str:
    if value == "auto" or isinstance(value, int):
        return value
    if not value.isdecimal():
        raise typer.BadParameter("a number or auto is needed")
    return int(value)


def given(context: typer.Context) -> dict[str, Any]:
    """Returns {option: value} for the options that the user typed.

    Options that are set by environment variables are not included: the config reads them itself. The value of a
    repeatable option is a list, except if the user typed the option only once.
    """
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in context.params.items()
        if name in OPTIONS and (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def to_continue(*added: str) -> str:
    """Returns the advice after an interruption: to run the same command again, with the `added` options."""
    typed = sys.argv[1:]
    line = shlex.join(["wanfast", *typed, *(option for option in added if option not in typed)])
    return f"to continue, run `{line}`"


def one_line(error: Any, arguments: list[str]) -> ConfigError:
    """Turns Typer's usage error into a ConfigError; the ConfigError names the option and the fix in one line.

    `arguments`: the words of the command line after `wanfast`.
    """
    see_help = f"see `{error.ctx.command_path if error.ctx else f'wanfast {arguments[0]}'} --help`"
    kind, param = type(error).__name__, typing.cast("Any", getattr(error, "param", None))
    if kind == "NoSuchOption":
        visible = [option for option in error.ctx.command.params if not getattr(option, "hidden", False)]
        known = [word.lstrip("-") for option in visible for word in (*option.opts, *option.secondary_opts)]
        fix = did_you_mean(error.option_name.lstrip("-"), known, see_help, prefix="--")
        return ConfigError(f"unknown option {error.option_name}: {fix}")
    if kind == "MissingParameter":
        return ConfigError(f"{param.opts[0]} is missing: {see_help}")
    if param is None:
        words = " ".join(error.format_message().split()).rstrip(".")
        return ConfigError(f"{words[:1].lower()}{words[1:]}{' or' if words.endswith('?') else ':'} {see_help}")
    if param.name in OPTIONS:
        try:
            OPTIONS[param.name].accept(_typed(param.opts, arguments))
        except ConfigError as refusal:
            return refusal
    if choices := choices_of(getattr(getattr(param, "type_descriptor", None), "annotation", None)):
        typed = _typed(param.opts, arguments)
        fix = did_you_mean(typed, choices, f"one of {', '.join(choices)} is needed")
        return ConfigError(f"{param.opts[0]} {typed!r:.60}: {fix}")
    return ConfigError(f"{param.opts[0]}: {error.message.removeprefix('Value error, ').rstrip('.')}")


def _typed(spellings: list[str], arguments: list[str]) -> str:
    """Returns the last value of an option on the command line."""
    typed = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in spellings:
            typed = value if equals else following
    return typed
