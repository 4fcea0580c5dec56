"""`ragturbo …`. One file a group of commands; nothing else in the package imports this one."""

from __future__ import annotations

import sys

import typer

from ragturbo.cli import bench, convert, data, db, eval, generate, info, profile, serve, train
from ragturbo.cli.errors import exit_code

app = typer.Typer(
    name="ragturbo",
    help="Retrieval-augmented one-step text-to-image generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.add_typer(db.app, name="db")
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.add_typer(bench.app, name="bench")
app.command("convert")(convert.convert)
app.command("serve")(serve.serve)
app.command("profile")(profile.profile)
app.command("info")(info.info)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if show:
        from ragturbo import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Errors the library means to raise end in one line on stderr and the exit code of their kind."""
    from ragturbo.errors import RagTurboError

    try:
        app()
    except RagTurboError as error:
        print(f"ragturbo: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`ragturbo … | head`): nothing to say, nobody to say it to.
        sys.stderr.close()
        sys.exit(141)
