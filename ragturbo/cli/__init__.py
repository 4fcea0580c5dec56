"""The `ragturbo` command, one module per command or group of commands."""

from __future__ import annotations

import sys

import typer

from ragturbo.cli import bench, convert, data, db, eval, generate, info, profile, serve, train

app = typer.Typer(
    name="ragturbo",
    help="Retrieval-augmented one-step text-to-image generation.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    """Run the command. An error is one line; with --json, also an object on stdout.

    Exit codes: 0 success, 2 usage, 3 unusable model, database or file, 4 device or generation failure, 130 interrupted.
    """
    from ragturbo.cli.errors import CLICK_ERROR, report
    from ragturbo.errors import RagTurboError

    try:
        code = app(standalone_mode=False)
    except BrokenPipeError:
        # The reader of stdout ended, as in `ragturbo … | head`.
        sys.stderr.close()
        sys.exit(141)
    except (RagTurboError, CLICK_ERROR, OSError) as error:
        sys.exit(report(error, sys.argv[1:]))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
