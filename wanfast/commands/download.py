"""`wanfast download`: fetches a published model, or a published pair of LoRAs, into the artifacts folder."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.commands import options
from wanfast.runtime.config.option import FILES, MAKE
from wanfast.runtime.facts.choices import Layout
from wanfast.runtime.store.hub_cache import PublishedModel
from wanfast.runtime.store.lora_pairs import PAIRS


def download(
    model: Annotated[
        PublishedModel | None,
        typer.Option(
            help="Published model to download: a14b makes videos from an image and text, t2v-a14b from text alone.",
            show_default="a14b",
            rich_help_panel=MAKE,
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            help="Repository on the Hugging Face Hub.",
            show_default="the repository of --model and --layout, such as Wan-AI/Wan2.2-I2V-A14B",
            rich_help_panel=MAKE,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Commit, branch or tag to download. A file beside the weights records the commit.",
            show_default="for a published model, the commit that wanfast was made for; else main",
            rich_help_panel=MAKE,
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Layout of the files in --repo: original is Wan-AI's layout, diffusers is the layout of Diffusers.",
            show_default="original",
            rich_help_panel=MAKE,
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Instead of the model, fetch two LoRAs, one for each expert, which allow videos in four steps: "
            f"{' or '.join(PAIRS)}.",
            metavar="<name>",
            rich_help_panel=MAKE,
        ),
    ] = None,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files with their sizes and stop.", rich_help_panel=FILES)
    ] = False,
    json_: options.Json = False,
) -> None:
    """Fetch the published weights, or a published pair of LoRAs.

    Only files that wanfast reads are fetched.
    At the end, the size of every file and the sha256 of every large file are verified.
    After a failure, run the command again: complete files are not fetched again.
    """
    from wanfast.runtime.store import hub as worker  # huggingface_hub begins here: 0.3 s

    request = worker.DownloadRequest.of(repo, revision, layout, artifacts_dir, lora, model)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    if dry_run:
        result = worker.plan(request)
        for name, size in result["files"].items():
            console.print(f"{size / 1e9:9.3f} GB  {name}", markup=False)
        console.print(f"{_summary(result)}, {result['missing_bytes'] / 1e9:.1f} GB to fetch", markup=False)
    else:
        result = worker.download(request, progress=sys.stderr.isatty())
        console.print(f"{_summary(result)}, {result['seconds']:.0f} s", markup=False)
    if "options" in result:
        console.print(f"`wanfast generate` uses this pair of LoRAs with {result['options']}", markup=False)
    if json_:
        print(json.dumps(result))


def _summary(result: dict[str, Any]) -> str:
    size = f"{len(result['files'])} files, {result['bytes'] / 1e9:.1f} GB"
    return f"{result['folder']}: {size}, {result['repo']} at {result['commit'][:12]}"
