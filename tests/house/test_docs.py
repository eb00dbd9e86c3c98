"""Every command, file and figure of README.md, CONTRIBUTING.md and docs/ is checked, so that the words follow the code.

Commands stand in ```sh blocks and in code spans. `wanfast generate` is planned without weights on eight GPUs that are
not there; every other program only parses its options. A figure is a number with a unit or with three decimals, and
each one is declared in an HTML comment:

    <!-- figures of benchmarks/results/forward-h100.json:
    9.41 s = ways/wanfast compiled fa3/ms / 1000; 70 % = ways/wanfast compiled fa3/mfu * 100 -->
    <!-- figures by the publisher: 250.7 s; 195.1 s -->

The first form names a file, and after each `=` a path into it: keys joined by `/`, then operators between spaces, from
left to right. A .jsonl file is a list. The second form names another source and has no file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from tests import lora_files
from tests.conftest import Machine, Outcome
from tests.media.test_earlier_video import write as write_video
from wanfast.cli import app
from wanfast.runtime.config.option import words as words_of
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.store.lora_pairs import PAIRS, folder_of

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands
OPTIONS = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
VIDEO = ["--image", "wanfast/assets/examples/cat.jpg", "--prompt", "The cat blinks."]  # that code spans leave out
Wanfast = Callable[..., Outcome]

COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")
UNIT = "GB/s|TFLOP/s|TOPS|GB|MB|ms|s|dB|%"
FIGURE = re.compile(rf"(?<![\w.,-])(?:\d[\d,]*(?:\.\d+)? ?(?:{UNIT})(?![\w/])|\d\.\d{{3,}}(?![\w.]*\d))")
OPERATORS = {"*": operator.mul, "/": operator.truediv, "+": operator.add, "-": operator.sub}
STORED = ("wanfast", "benchmarks", "tests", "training", "docs", "constraints", ".ci")  # folders of the repository


class Page:
    """One document, taken apart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        without_comments = COMMENT.sub("", self.text)
        self.blocks = FENCE.findall(without_comments)  # (language, lines)
        prose = FENCE.sub("", without_comments)
        self.spans = [" ".join(span.split()) for span in SPAN.findall(prose)]
        self.links = [link for link in LINK.findall(prose) if "://" not in link]
        remarks = re.findall(r"#.*", "\n".join(body for _, body in self.blocks))
        self.words = " ".join(" ".join([SPAN.sub("", prose), *remarks]).split())  # what is read as text

    def figures(self) -> Iterator[tuple[str, str, str]]:
        """(figure as written, its source, its path in that file or nothing) of each declaration."""
        for comment in COMMENT.findall(self.text):
            match = re.fullmatch(r"\s*figures (?:of|by) ([^:]+):(.*)", comment, re.DOTALL)
            assert match or "figure" not in comment, comment
            for item in filter(None, map(str.strip, re.split(r"[;\n]", match[2] if match else ""))):
                figure, _, path = item.partition(" = ")
                yield figure, match[1], path

    def commands(self) -> Iterator[list[str]]:
        """The words of each command; a code span of `wanfast generate` may leave out the image and the prompt."""
        for line in (line for language, body in self.blocks if language == "sh" for line in _lines(body)):
            yield from _split(line)
        for span in self.spans:
            if re.match(r"(wanfast|torchrun|make) |python (benchmarks/|-m )|[A-Z_]+=\S+ ", span):
                for words in _split(span):
                    has_video = words[:2] != ["wanfast", "generate"] or {
                        "--image",
                        "--continue-from",
                        "--jobs",
                        "--from",
                    } & {*words}
                    yield words if has_video or len(words) == 2 else words + VIDEO


def _lines(body: str) -> list[str]:
    return [line for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def _split(line: str) -> Iterator[list[str]]:
    for joins, words in itertools.groupby(shlex.split(line, comments=True), key="&&".__eq__):
        if not joins:
            yield list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))  # variables of the environment


PAGES = [Page(path) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))]
CASES = {f"{page.path.name}: {shlex.join(words)}": words for page in PAGES for words in page.commands()}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_a_command_is_one_that_its_program_takes(
    words: list[str], wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = words
    if program == "wanfast" and arguments[0] == "generate" and arguments[1:]:
        machine(8, 85)
        _files_of_examples(workdir, wanfast)
        outcome = wanfast(*arguments, "--dry-run")
        assert outcome.exit_code == 0, outcome.err
    elif program == "wanfast":
        _parse_wanfast(*arguments)
    elif program == "make":
        targets = " ".join(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "torchrun":
        assert arguments[0] == "--nproc-per-node"
        _parse_script(monkeypatch, arguments[2:])
    elif program == "python" and (arguments[0].startswith("benchmarks/") or arguments[1].startswith("wanfast")):
        _parse_script(monkeypatch, arguments)
    else:
        is_known = program in ("pip", "python3", ".", "until", "curl") or re.match(r"[a-z]+=", program)  # a variable
        assert is_known, f"nothing checks {program}"


@every_page
def test_each_example_writes_a_video_of_its_own(page: Page) -> None:
    """Two examples with one output would make the second one fail."""
    blocks = [line for language, body in page.blocks if language == "sh" for line in _lines(body)]
    commands = [words for line in blocks for words in _split(line) if words[:2] == ["wanfast", "generate"]]
    outputs = [words[words.index("--output") + 1] for words in commands if not {"--jobs", "--dry-run"} & {*words}]
    assert len(outputs) == len(set(outputs))


def test_no_example_replaces_the_video_of_another_page() -> None:
    """A program of Python or a client may replace an mp4 whose .json then describes another video."""
    written = re.compile(r"(?:save|write_to_file)\(\"([\w-]+\.mp4)\"")
    by_programs = [
        name
        for page in PAGES
        for language, body in page.blocks
        if language == "python"
        for name in written.findall(body)
    ]
    examples = [json.loads(line) for line in (ROOT / "wanfast/assets/examples/jobs.jsonl").read_text().splitlines()]
    others = {Path(example["output"]).name for example in examples}
    others |= {Path(name).name for page in PAGES for name in re.findall(r"--output (\S+\.mp4)", page.text)}
    assert len(by_programs) >= 2 and len({*by_programs} - others) == len(by_programs)


def _files_of_examples(workdir: Path, wanfast: Wanfast) -> None:
    """The files that examples name: the repository's, experts, LoRAs, a list of jobs, the .json of an earlier video."""
    (workdir / "wanfast").symlink_to(ROOT / "wanfast")
    (workdir / "out").mkdir()
    for example in (ROOT / "wanfast/assets/examples").iterdir():
        shutil.copy(example, workdir)
    pair = folder_of("lightning-seko-v1", Path("artifacts"))
    downloaded = [str(pair / file.removesuffix(".safetensors")) for file in PAIRS["lightning-seko-v1"].files.values()]
    for lora in ("motion", "high_noise_model", "low_noise_model", *downloaded):
        (workdir / lora).parent.mkdir(parents=True, exist_ok=True)
        lora_files.write(workdir / f"{lora}.safetensors", {"blocks.0.ffn.0.diff_b": torch.zeros(1)})
    for half in ("high", "low"):
        for expert in (f"wan2.2_i2v_{half}_noise_14B_fp16", f"{half}_noise_fp8"):
            lora_files.write(workdir / f"{expert}.safetensors", {"head.head.bias": torch.zeros(1)})
    outcome = wanfast("generate", "--model", "tiny", *VIDEO, "--dry-run", "--json")
    write_video(workdir / "cat.mp4", 832, 480)
    Path("cat.json").write_text(json.dumps(outcome.document | {"weights": None}))


def _parse_wanfast(name: str, *arguments: str) -> None:
    """Raises an error of Typer's. A name without options is a mention of the command."""
    assert name in COMMANDS
    if arguments:
        COMMANDS[name].make_context(name, list(arguments))


class _Parsed(Exception):  # noqa: N818  # no error: it ends the script once its options are parsed
    """Holds the arguments that the script leaves to another program."""


def _parse_script(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Runs a script up to its parser, which is argparse's."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: argparse.ArgumentParser) -> None:
        raise _Parsed(known(self)[1])

    def parse_args(self: argparse.ArgumentParser) -> None:
        if rest := known(self)[1]:
            self.error(f"unrecognized arguments: {rest}")
        raise _Parsed([])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    is_module = arguments[0] == "-m"
    monkeypatch.setattr(sys, "argv", arguments[is_module:])
    with pytest.raises(_Parsed) as parsed:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    if rest := parsed.value.args[0]:
        _parse_wanfast("generate", *rest)


@every_page
def test_options_in_code_spans_exist(page: Page) -> None:
    for span in page.spans:
        if span.startswith("--"):
            words = shlex.split(span)
            assert set(words) <= OPTIONS or any(_takes(name, words) for name in COMMANDS), span


def _takes(name: str, words: list[str]) -> bool:
    try:
        COMMANDS[name].make_context(name, list(words))  # which it empties
    except typer.BadParameter.__base__ as error:  # Typer does not export it by name
        return type(error).__name__ == "MissingParameter"  # the span says nothing of other options
    return True


def test_the_page_of_recipes_is_what_they_are() -> None:
    rows = re.findall(r"^\| `([^`]+)`( \+)? \| `([^`]+)`", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    sharding = {"dit_fsdp": "on", "t5_fsdp": "on"}
    stated = {name: (set(shlex.split(options)), bool(plus)) for name, plus, options in rows}
    defined = {
        name: (
            {word for item in recipe.options.items() for word in words_of(*item)},
            sharding.items() <= recipe.of_several_ranks.items(),
        )
        for name, recipe in RECIPES.items()
    }
    assert stated == defined
    assert all(recipe.of_several_ranks.get("cfg_parallel", 1) == 1 for recipe in RECIPES.values())


@every_page
def test_a_cited_file_exists(page: Page) -> None:
    """Paths that begin with `+` are files to be made: only their folder, or the one above it, must be there."""
    trees = [line.split()[0] for language, body in page.blocks if language != "sh" for line in _lines(body)]
    has_rooms = (ROOT / "wanfast/runtime/facts").is_dir()
    for cited in (*page.spans, *trees):
        path = cited.removeprefix("+ ")
        inside = path.partition("/")[0] in STORED and "/" in path and " " not in path
        if (inside or re.fullmatch(r"[A-Z]+\.md|Makefile|pyproject\.toml", path)) and (
            has_rooms or not path.startswith("wanfast/runtime/")
        ):
            is_new = cited.startswith("+ ")
            assert any(ROOT.glob(path.rstrip("/"))) or (is_new and (ROOT / path).parents[1].is_dir()), cited
    for link in page.links:
        assert (page.path.parent / link).exists(), link


@every_page
def test_a_figure_is_in_its_file(page: Page) -> None:
    for figure, source, path in page.figures():
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\w/]|\.\d)", page.words), f"{figure} is not in the text"
        if path:
            number = re.match(r"([\d,]+(?:\.(\d+))?)", figure)
            assert number, figure
            difference = abs(_value(source, path) - float(number[1].replace(",", "")))
            assert difference <= 0.501 * 10.0 ** -len(number[2] or ""), (figure, _value(source, path))


@every_page
def test_a_number_with_a_unit_has_a_source(page: Page) -> None:
    declared = {figure for figure, _, _ in page.figures()}
    assert [figure for figure in FIGURE.findall(page.words) if figure not in declared] == []


def _value(source: str, expression: str) -> float:
    text = (ROOT / source).read_text()
    document = [json.loads(line) for line in text.splitlines()] if source.endswith("l") else json.loads(text)
    first, *rest = re.split(r" ([*/+-]) ", expression)
    value = _operand(document, first)
    for sign, other in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATORS[sign](value, _operand(document, other))
    return value


def _operand(document: Any, path: str) -> float:
    if re.fullmatch(r"[\d.e]+", path):
        return float(path)
    return float(reduce(lambda at, key: at[int(key) if isinstance(at, list) else key], path.split("/"), document))


def test_figures_by_doctor_are_what_it_prints(wanfast: Wanfast) -> None:
    sums = wanfast("doctor").out.partition("GB a GPU")[2]
    printed = [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d", sums)]
    figures = [figure for page in PAGES for figure, source, _ in page.figures() if source == "wanfast doctor"]
    assert figures
    for figure in figures:
        number = figure.removesuffix(" GB")
        places = len(number.partition(".")[2])
        assert any(f"{value:.{places}f}" == number for value in printed), figure


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_picture_is_drawn_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import waterfall

    assert waterfall.picture() == (ROOT / "docs/waterfall.svg").read_text()


def test_contributing_names_the_commands_in_which_torch_begins() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (ignored,) = (each["ignore_imports"] for each in contracts if "torch" in each.get("forbidden_modules", ()))
    commands = {found[1] for line in ignored if (found := re.match(r"wanfast\.commands\.(\w+) -> ", line))}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (border,) = (part for part in text.split("\n* ") if part.startswith("**Two processes, one border.**"))
    assert commands == {"dispatch", "quantize", "doctor"} and all(f"`{name}`" in border for name in commands)
