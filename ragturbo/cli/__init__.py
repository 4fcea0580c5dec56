"""The `ragturbo` command, one module per command or group of commands."""

from __future__ import annotations

import sys

import typer

from ragturbo.cli import bench, convert, data, db, eval, generate, info, profile, serve, train

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
def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if show:
        from ragturbo.version import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command. Errors of the library are printed on one line.

    Exit codes: 0 success, 2 usage, 3 unusable model or database, 4 device or generation failure, 130 interrupted.
    """
    from ragturbo.errors import DatabaseError, InvalidRequest, ModelError, RagTurboError

    try:
        app()
    except RagTurboError as error:
        print(f"ragturbo: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidRequest) else 3 if isinstance(error, (DatabaseError, ModelError)) else 4)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout ended, as in `ragturbo … | head`.
        sys.stderr.close()
        sys.exit(141)
