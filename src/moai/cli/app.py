"""`moai`: our own command. Runs a script; shows what runs now, what has run, and whether this environment can run any.

In: the command line. Out: tables for people, or JSON for programs.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class, shell_complete

from moai.cli import as_json, snapshot
from moai.cli.command import FAILED, complain, run
from moai.cli.plan.arguments import PlanCommand
from moai.version import __version__

if TYPE_CHECKING:
    from moai.dry.messages import ModelStep

PROGRAM = "moai"
COMPLETE_VARIABLE = "_MOAI_COMPLETE"  # set by a shell that asks for completions, as Click's scripts do
JOBS_SHOWN = 20
PLAN_SECONDS = 600.0  # for a script to come to its first step
DTYPES = ("float32", "bfloat16", "float16", "float64")

in_json = click.option("--json", "in_json", is_flag=True, help="Print JSON.")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; `arguments` without the command's name, sys.argv's by default. Returns the exit status."""
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    completion_asked = os.environ.get(COMPLETE_VARIABLE)
    if completion_asked:
        return shell_complete(moai, {}, PROGRAM, COMPLETE_VARIABLE, completion_asked)
    try:
        with moai.make_context(PROGRAM, arguments) as context:
            return moai.invoke(context) or 0
    except click.exceptions.Exit as exit:  # of --help and --version
        return exit.exit_code
    except click.UsageError as error:
        complain(f"{error.format_message()} See moai --help.")
        return error.exit_code


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def moai(context: click.Context) -> None:
    """MoAI: one virtual accelerator for plain PyTorch scripts."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@moai.command("run", context_settings={"allow_interspersed_args": False})
@click.option("--plan", metavar="KEY=VALUE,...", help="How to use the accelerator's devices, as in dp=2,tp=2,micro=4.")
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.argument("script", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_script(script: str, arguments: tuple[str, ...], plan: str | None, is_module: bool) -> None:
    """Run a Python script on the accelerator.

    As `python SCRIPT ARGUMENTS` does, with the accelerator as "cuda" after `import torch`. The exit status is the
    script's, and so are options behind SCRIPT.
    """
    from moai.cli.script import replace_process

    replace_process(script, arguments, plan, is_module, os.environ)


def _naming_a_step(command: Any) -> Any:
    """The options and the argument that name a training step: a script, or a model with its batch."""
    for add in (
        click.argument("script", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGUMENTS]]"),
        click.option("--verbose", is_flag=True, help="Show on stderr what SCRIPT prints."),
        click.option(
            "--timeout", default=PLAN_SECONDS, show_default=True, type=click.FloatRange(1), help="Seconds for SCRIPT."
        ),
        click.option("--dtype", type=click.Choice(DTYPES), help="With --model: of its weights, if not its config's."),
        click.option("--block-size", type=click.IntRange(min=1), help="With --model: tokens of a sample."),
        click.option("--batch-size", type=click.IntRange(min=1), help="With --model: samples of a step."),
        click.option(
            "--model", metavar="DIR|HUB_ID|FILE", help="Instead of SCRIPT: a model of transformers, by its config."
        ),
    ):
        command = add(command)
    return command


def _step(
    script: tuple[str, ...], model: str | None, batch_size: int | None, block_size: int | None, dtype: str | None
) -> ModelStep | tuple[str, ...] | None:
    """The step that is named, if one is. Raises UsageError."""
    from moai.dry.messages import ModelStep

    if script and model is not None:
        raise click.UsageError("Give a SCRIPT or a --model, not both.")
    if model is not None and (batch_size is None or block_size is None):
        raise click.UsageError("--model needs --batch-size and --block-size.")
    if model is None and (batch_size or block_size or dtype):
        raise click.UsageError(
            "--batch-size, --block-size and --dtype go with --model; the script's stand behind its name."
        )
    return (script or None) if model is None else ModelStep(model, batch_size or 0, block_size or 0, dtype)


@moai.command("plan", cls=PlanCommand, context_settings={"help_option_names": ["--help"]})
@_naming_a_step
@click.option("--flavor", metavar="NAME", help="Where it would run, if not on the accelerator of this environment.")
@click.option("--cluster", metavar="NAME[:N]|FILE", help="Where it would run: a description of hardware.")
@click.option("--set", "restricted", metavar="KEY=VALUE", multiple=True, help="A key that the plan must have so.")
@click.option("--why", metavar="KEY=VALUE,...", help="Also show what the best plan with these keys would cost.")
@click.option("--html", metavar="FILE", help="Also draw the plan into FILE.")
@in_json
def plan_step(
    script: tuple[str, ...],
    model: str | None,
    batch_size: int | None,
    block_size: int | None,
    dtype: str | None,
    flavor: str | None,
    cluster: str | None,
    restricted: tuple[str, ...],
    why: str | None,
    html: str | None,
    timeout: float,
    verbose: bool,
    in_json: bool,
) -> None:
    """Show which plan a training step would get, and why.

    SCRIPT runs up to its first training step, without weights and without devices. The options here may stand behind
    SCRIPT, too; what stands behind -- is the script's, whatever it is called.
    """
    from moai.cli.plan import request, run

    step = _step(script, model, batch_size, block_size, dtype)
    if step is None:
        raise click.UsageError("Give a SCRIPT, or a --model.")
    asked = request.of(script[0] if script else None, flavor, cluster, restricted, why, html, os.environ)
    run.plan(step, asked, timeout, in_json, verbose, os.environ)


@moai.command()
@in_json
def status(in_json: bool) -> None:
    """Show the accelerators and what runs on them."""
    look = snapshot.take(os.environ)
    if in_json:
        _print_json(as_json.status(look))
        return
    from moai.cli import reports

    reports.show(reports.status(look))


@moai.command()
@in_json
@click.option("-n", "--last", default=JOBS_SHOWN, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
def jobs(in_json: bool, last: int, everything: bool) -> None:
    """Show what has run, newest first.

    Each job with its command, flavor, plan, start, duration, exit, tokens a second and peak memory.
    """
    from moai.platform import jobs as platform

    history = tuple(reversed(platform.history(os.environ)))
    if not everything:
        history = history[:last]
    if in_json:
        _print_json([asdict(job) for job in history])
        return
    from moai.cli import reports

    reports.show(reports.jobs(history))


@moai.command()
@in_json
def doctor(in_json: bool) -> int:
    """Check this environment. Exits with 1 if it finds a problem."""
    from moai.cli.doctor import examine

    checks = examine(os.environ)
    if in_json:
        _print_json([{**asdict(check), "ok": check.ok} for check in checks])
    else:
        from moai.cli import reports

        reports.show(reports.doctor(checks))
    return 0 if all(check.ok for check in checks) else FAILED


@moai.command(cls=PlanCommand, context_settings={"help_option_names": ["--help"]})
@_naming_a_step
@in_json
def profile(
    script: tuple[str, ...],
    model: str | None,
    batch_size: int | None,
    block_size: int | None,
    dtype: str | None,
    timeout: float,
    verbose: bool,
    in_json: bool,
) -> None:
    """Measure the accelerator's devices, and the layers of a model on them.

    Takes a minute or two. Plans are predicted from what is measured, as long as the accelerator has these devices, and
    best for the step of SCRIPT or of a --model, a few of whose layers are run here. SCRIPT itself runs up to its first
    training step, without weights and without devices.
    """
    from moai.cli import profile as command

    step = _step(script, model, batch_size, block_size, dtype)
    made, file = command.measure(os.environ, step, timeout, verbose)
    if in_json:
        _print_json(made.to_json())
        return
    from moai.cli import reports

    reports.show(command.summary(made))
    print(f"Kept in {file}")


@moai.command()
@in_json
@click.argument("description")
def token(in_json: bool, description: str) -> None:
    """Make a new token, with an accelerator of its own.

    Who sets MOREH_SDA_TOKEN to it uses its accelerators instead of the local user's.
    """
    from moai.platform import tokens

    made = tokens.create(description, os.environ)
    if in_json:
        _print_json({"token": made, "description": description})
    else:
        print(made)


@moai.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: add `eval "$(moai completion bash)"` to ~/.bashrc.
    """
    make = get_completion_class(shell)
    assert make is not None
    print(make(moai, {}, PROGRAM, COMPLETE_VARIABLE).source())


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    sys.exit(main())
