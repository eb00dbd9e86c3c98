"""`wanfast generate`: makes one video, or with --jobs many videos, and loads the models once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wanfast.commands import dispatch, options
from wanfast.commands.report import Report
from wanfast.runtime.config.option import GPUS, MAKE
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.planning import past_runs, sidecar
from wanfast.runtime.planning.request_files import read_requests
from wanfast.runtime.planning.requests import Planned, plan_requests
from wanfast.runtime.processes import cluster


@options.takes_options("generate")
def generate(
    context: typer.Context,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a UTF-8 text file.", rich_help_panel=MAKE)
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Repeat an earlier video from its .json; options that you give override the recorded options.",
            rich_help_panel=MAKE,
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="Make many videos: each line of this file is a JSON object with the options of one video. These "
            "options override the command line. Relative paths of images, videos, experts and LoRAs start in the "
            "folder of this file.",
            rich_help_panel=MAKE,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="<address>",
            help="Make the videos of --jobs on the machines of a Ray cluster: HOST:PORT of its head, or auto for the "
            "cluster to which this machine belongs. --num-gpus is then the number of ranks of one video.",
            rich_help_panel=GPUS,
        ),
    ] = None,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Make a video from an image and a prompt, or from a prompt alone."""
    if ray is not None and jobs is None:
        raise ConfigError("--ray is for a list of videos: add --jobs, or drop --ray")
    report = Report(as_json=json_)
    with asked_once():
        requests = read_requests(options.given(context), prompt_file, from_, jobs)
        planned = plan_requests(requests, needs_weights=not dry_run)
        first = next((item.plan for item in planned if item.plan), None)
        if ray is not None and first is not None:
            cluster.require_one_group(first)
        report.plans(planned, always=dry_run and not json_)
        dry = [dry_result(item) for item in planned] if dry_run else []
    report.close(planned, dry or run(planned, report, ray))


def dry_result(item: Planned) -> dict[str, Any]:
    if item.plan is None:
        return item.outcome()
    return sidecar.planned(item.plan) | {"predicted_s": past_runs.predicted_seconds(item.plan)}


def run(planned: list[Planned], report: Report, ray: str | None) -> list[dict[str, Any]]:
    """Makes the video of each request in `planned`, and returns one result for each request, in order.

    A request without a plan gets no video. Its result is an error, or a note that the video exists already.
    `ray`: the address of a Ray cluster whose machines make the videos, or None.
    """
    ready = [item for item in planned if item.plan is not None]
    made: list[int] = []

    def on_result(index: int, result: dict[str, Any]) -> None:
        if "error" not in result:
            made.append(index)
        report.result(ready[index], result)

    worked: list[dict[str, Any]] = []
    try:
        if ready:
            worked = dispatch.run_jobs(
                "generate",
                [item.job() for item in ready],
                [item.plan for item in ready if item.plan],
                of_list=ready[0].request.line is not None,
                on_result=on_result,
                ray=ray,
            )
    except (KeyboardInterrupt, SystemExit):
        if ready[0].request.line is not None:
            print(_interruption(len(made), ready), file=sys.stderr)
        raise
    done = iter(worked)
    return [next(done) if item.plan else item.outcome() for item in planned]


def _interruption(made: int, ready: list[Planned]) -> str:
    """Returns a note on how many videos of a list were made before the command was stopped, and how to make the others.

    If a video replaces an earlier file, --skip-existing would skip this video too, and so no command is named.
    """
    replaces = any(item.plan and item.plan.config.output.overwrite for item in ready)
    advice = "" if replaces else f"; {options.to_continue('--skip-existing')}"
    return f"note: videos made: {made} of {len(ready)}{advice}"
