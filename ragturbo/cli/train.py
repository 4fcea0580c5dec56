"""`ragturbo train`: run the LADD trainer with a configuration."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ragturbo.terminal import quiet_libraries


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, statistics and the export.")],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or a built-in one: paper, one-gpu or shapes. With --resume: by default the saved one.",
            show_default=False,
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, as with --set.", show_default=False)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop at this optimiser step, counted from the start of the run.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as loop.batch=64.")
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Also write a complete model with its database to OUT/bundle.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory and FLOPs, and stop.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Number of processes, for --dry-run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default the launcher's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train an adapter and decoder LoRA, or a one-step student. Several GPUs: torchrun --no-python … ragturbo train"""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Before torch is imported, which takes seconds.
    from ragturbo.config import check_device
    from ragturbo.train.config import to_yaml
    from ragturbo.train.start import check_run, count_processes, read_settings

    out = out.expanduser()
    source, words = _divide([] if config is None else [config, *(more or [])])
    changes = [*(changes or []), *words]
    settings = read_settings(source, out, changes, resume=resume, processes=processes or count_processes())
    if dry_run:
        quiet_libraries()
        from ragturbo.train.estimate import estimate

        report = estimate(settings, out, processes or 1)
        typer.echo(json.dumps(report, indent=2) if as_json else _readable(report))
        return
    check_device(device)
    check_run(settings, out, resume=resume)
    quiet_libraries()
    from ragturbo.messages import many
    from ragturbo.train.ladd import LADDTrainer

    trainer = LADDTrainer(settings, out, device=device, resume=resume)
    first = trainer.processes.is_main_process
    # After everything that can refuse the run, so that an error is not buried.
    if first and not as_json:
        typer.echo(to_yaml(settings), err=True)
    folder = trainer.train(max_steps)
    if bundle:
        folder = trainer.export(out / "bundle", whole=True)
    if first:
        facts = {"export": str(folder), "steps": trainer.step, "skipped": trainer.skipped}
        typer.echo(json.dumps(facts) if as_json else f"wrote {folder} after {many(trainer.step, 'step')}")


def _divide(words: list[str]) -> tuple[str | None, list[str]]:
    """The configuration, if there is one, and the settings."""
    sources = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(sources) > 1:
        raise typer.BadParameter(f"unexpected {sources[1]!r}: settings are written key=value, such as loop.batch=64")
    return next(iter(sources), None), [word for word in words if word not in sources]


def _readable(report: dict[str, Any]) -> str:
    lines = [f"note: {note}" for note in report["notes"]]
    for kind, parts in report["parameters"].items():
        lines += [f"{kind:<10} {name:<44} {count:>15,}" for name, count in parts.items()]
    lines += [f"{'memory':<10} {name:<44} {n / 2**30:>11.2f} GiB" for name, n in report["memory_bytes"].items()]
    flops, parts = report["flops_per_step"] / 1e12, report["micro_batches_per_step"]
    lines += [f"{'per sample':<10} {k:<44} {n / 1e9:>9,.2f} GFLOP" for k, n in report["flops_per_sample"].items()]
    lines.append(f"per step: {flops:,.2f} TFLOP, {parts} micro-batch{'es' if parts != 1 else ''} on each process")
    rate = report["samples_per_s"]
    lines.append("samples/s: not measured" if rate is None else f"samples/s, median of the run in --out: {rate:.1f}")
    return "\n".join(lines)
