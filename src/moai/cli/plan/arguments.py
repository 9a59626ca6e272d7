"""The command line of `moai plan` and `moai profile`, on which a script's arguments and our own stand together.

In: what was typed. Out: for click, our options first and the script with all that is its own behind "--".

Our options are ours wherever they stand, but for those that only go with --model: behind a script's name these are the
script's. What stands behind "--" is the script's, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import click


class PlanCommand(click.Command):
    """`model_options`: names of parameters that describe a model, and are the script's own where there is a script."""

    model_options: frozenset[str] = frozenset({"model", "batch_size", "block_size", "dtype"})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        takes_value = {name: not p.is_flag for p in options for name in p.opts}
        models = {name for p in options if p.name in self.model_options for name in p.opts}
        return super().parse_args(ctx, separated(args, takes_value, models))


def separated(arguments: Sequence[str], takes_value: dict[str, bool], models: set[str]) -> list[str]:
    """`arguments` with our options first. `takes_value`: our options, and whether each takes a value; `models`: those
    that are ours before the script's name only."""
    ours: list[str] = []
    script: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            script += waiting
            break
        name, equals, _ = argument.partition("=")
        if name in takes_value and not (script and name in models):
            ours.append(argument)
            if takes_value[name] and not equals:
                ours += [value for value in [next(waiting, None)] if value is not None]
        elif script or not argument.startswith("-"):
            script.append(argument)
        else:
            ours.append(argument)  # not known: click says so
    return [*ours, "--", *script]
