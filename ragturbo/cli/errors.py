"""Report an error of a command: one line on stderr in the words of the command line, JSON on stdout, an exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container
from typing import Any

import typer

# Names in Python whose option is called differently.
_OPTIONS = {
    "num_inference_steps": "steps", "guidance_scale": "guidance", "num_images_per_prompt": "num-images",
}  # fmt: skip
# `name=value`, and a name that a sentence is about: "w has no effect", "w is the blend".
_ASSIGNED = re.compile(r"(?<![\w'`/.])([a-z][a-z_]*)=(True\b|False\b|None\b|'[^']*'|\([^)]*\)|[-\w.+…]+)?")
_SUBJECT = re.compile(
    r"^(num_inference_steps|guidance_scale|negative_prompt|num_images_per_prompt|num_neighbors|min_score|w|lam|query|per|"
    r"compose|output_type|seed|height|width)(?= (has|is|must|lists)\b)"
)
# Typer's words for a value that is not a number.
_NUMBERS = {
    "Input should be a valid integer, unable to parse string as an integer": "a whole number",
    "Input should be a valid number, unable to parse string as a number": "a number",
}
_PROMPT = 'prompts are arguments: ragturbo generate "a red circle"'
# Options that users of other tools try.
_HABITS = {
    "--prompt": _PROMPT, "-p": _PROMPT, "--num-inference-steps": "use --steps", "--guidance-scale": "use --guidance",
    "--num-images-per-prompt": "use -n", "--size": "use --width and --height", "--w": "use -w",
    "--torch-dtype": "use --dtype", "--output": "use --out", "--neighbors": "use -k",
}  # fmt: skip
# What only Python has.
_PYTHON_ONLY = re.compile(r" or (?:load_adapter|use_database)\(\)(?:\) or neighbors=(?P<end>))?")


def in_cli_words(message: str, known: Container[str]) -> str:
    """Replace Python's names of options: "num_inference_steps=9" -> "--steps 9".

    known: the names of the command's own options; others stay as they are.
    """

    def is_known(name: str) -> bool:
        return _OPTIONS.get(name, name).replace("-", "_") in known

    def option(name: str) -> str:
        return "-w" if name == "w" else f"--{_OPTIONS.get(name, name).replace('_', '-')}"

    def assigned(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if not is_known(name):
            return match[0]
        if value in ("True", "False"):
            switch = {("distilled", "False"): "--undistilled", ("local_files_only", "True"): "--local-files-only"}
            off = f"--no-{name.replace('_', '-')}"
            return switch.get((name, value), option(name) if value == "True" else off)
        plain = "" if value is None else value.strip("'")
        return f"{option(name)} {plain}".rstrip()

    text = _PYTHON_ONLY.sub(lambda match: "" if match["end"] is None else ")", message)
    text = _SUBJECT.sub(lambda match: option(match[1]) if is_known(match[1]) else match[0], text)
    return _ASSIGNED.sub(assigned, text)


def _path(arguments: list[str]) -> list[str]:
    """The words of a command line that name the command."""
    from ragturbo.cli import app

    path: list[str] = []
    command: Any = typer.main.get_command(app)
    for word in arguments:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return path


def options_of(arguments: list[str]) -> set[str]:
    """The names of the options of the command that a command line calls."""
    from ragturbo.cli import app

    command: Any = typer.main.get_command(app)
    for word in _path(arguments):
        command = command.commands[word]
    return {str(parameter.name).removeprefix("as_") for parameter in command.params}


def _usage(error: Any) -> str:
    """The message of an error in the command line's syntax; for an option of other tools, it names ours."""
    message = str(error.format_message())
    for numbers, words in _NUMBERS.items():
        message = message.replace(f": {numbers}", f": it must be {words}")
    message = re.sub(r": Input should be greater than or equal to (\S+)", r": it must be at least \1", message)
    instead = _HABITS.get(getattr(error, "option_name", ""))
    return message if instead is None else f"No such option: {error.option_name}; {instead}"


def exit_code(error: BaseException) -> int:
    """2 usage, 3 unusable model, database or file, 4 device or generation failure."""
    from ragturbo.errors import DatabaseError, InvalidRequest, ModelError

    if isinstance(error, InvalidRequest):
        return 2
    return 3 if isinstance(error, (DatabaseError, ModelError, OSError)) else 4


def report(error: BaseException, arguments: list[str]) -> int:
    """Print an error and return the exit code. With --json, stdout has it as {"error": {...}}."""
    from ragturbo.errors import RagTurboError

    code, kind, hint = exit_code(error), type(error).__name__, ""
    if isinstance(error, CLICK_ERROR):
        if kind == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        code, kind, message = int(getattr(error, "exit_code", 2)), "UsageError", _usage(error)
        hint = f"\nTry `{' '.join(['ragturbo', *_path(arguments)])} --help`."
    elif isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
    else:
        message = str(error)
    if isinstance(error, RagTurboError):
        message = in_cli_words(message, options_of(arguments))
    print(f"ragturbo: {message}{hint}", file=sys.stderr)
    if "--json" in arguments:
        facts: dict[str, Any] = {"type": kind, "message": message, "exit_code": code}
        print(json.dumps({"error": facts}, indent=2))
    return code


# The class is click's, or that of typer's own copy of click, depending on typer's version.
CLICK_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
