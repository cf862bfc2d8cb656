"""The command ``qwenlong``: a table of subcommands, each imported only when it runs.

``qwenlong --help`` imports neither torch nor transformers, and a subcommand whose optional
dependency is missing says which extra to install instead of breaking the others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwenlong.errors import InputError


class Subcommand(NamedTuple):
    target: str  # "module:attribute", a function or a typer.Typer
    extra: str  # the optional dependencies it needs, as in pip install 'qlkernels[EXTRA]'
    help: str


SUBCOMMANDS = {
    "score": Subcommand(
        "qwenlong.score:score", "score", "Log-prob and entropy of every token of a document."
    ),
    "demo": Subcommand(
        "qwenlong.demo:demo", "demo", "Score a real document with a small real model."
    ),
    "synth": Subcommand(
        "qwenlong.data.commands:app", "synth", "Long-context training samples from documents."
    ),
    "agent": Subcommand(
        "qwenlong.agent_command:app", "agent", "Questions about texts of any length."
    ),
    "merge": Subcommand("qwenlong.merge_command:merge", "score", "Merge models of one base (SCE)."),
    "eval": Subcommand(
        "qwenlong.eval_command:app", "synth", "Long-context questions, asked, scored and drawn."
    ),
    "train": Subcommand(
        "qwenlong.train_command:train_command", "train", "Train a policy by a recipe, or a ladder."
    ),
    "train-demo": Subcommand(
        "qwenlong.train_demo:train_demo", "train-demo", "Train a small real model on real text."
    ),
}


def _load(name: str) -> Any:
    """Import the subcommand ``name`` and build its command."""
    import typer

    module, attribute = SUBCOMMANDS[name].target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    app = typer.Typer(add_completion=False)
    app.command(name=name)(target)
    return typer.main.get_command(app)


def _make_group() -> Any:
    from typer.core import TyperCommand, TyperGroup

    class LazyGroup(TyperGroup):
        """Lists its subcommands from the table; imports one when it is dispatched to."""

        def list_commands(self, ctx: Any) -> list[str]:
            return list(SUBCOMMANDS)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            # What help pages and completion need; `resolve_command` puts the real one in its place.
            if cmd_name not in SUBCOMMANDS:
                return None
            return TyperCommand(cmd_name, help=SUBCOMMANDS[cmd_name].help)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            if name in SUBCOMMANDS:
                command = _load(name)
            return name, command, rest

    return LazyGroup(
        name="qwenlong",
        help="Long-context reinforcement learning of language models: scoring, data, training.",
        no_args_is_help=True,
    )


def _missing_package(error: ImportError, args: Sequence[str]) -> str:
    name = next((arg for arg in args if arg in SUBCOMMANDS), None)
    command = f"qwenlong {name}" if name else "qwenlong"
    extra = SUBCOMMANDS[name].extra if name else "score"
    package = (error.name or "").split(".")[0]
    return f"{command} needs the package '{package}': pip install 'qlkernels[{extra}]'"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence for wrong usage or input."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        _make_group().main(args, prog_name="qwenlong")
    except InputError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        # A module of ours that is missing is a bug and keeps its traceback.
        if error.name is None or error.name.split(".")[0] in ("qwenlong", "qlkernels"):
            raise
        sentence = _missing_package(error, args)
    print(f"qwenlong: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
