"""`ragturbo convert`: pickled UNets, adapters, latent LPIPS, aesthetic heads and open_clip models as safetensors.

A pickle runs code when it is read. Here it is read by torch's weights-only loader, which knows tensors and little else,
in a child process (`python -m ragturbo.convert IN OUT`): what is refused, damaged or too large harms only the child.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.weights import PICKLES, safetensors_name

log = logging.getLogger("ragturbo")

# Where training scripts put the weights among optimizers and step counts, in the order they are looked for.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")
# What distributed training and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
# Other frameworks' copies of the same weights stay behind when a folder is converted.
_LEFT_BEHIND = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> list[Path]:
    """A pickled file to a .safetensors file, or a model folder to a new folder; the weights' dtypes stay as they are.

    Returns the safetensors files written. Nothing appears at `dst` unless all of it is good, and nothing there is
    overwritten.
    """
    source, target = Path(src).expanduser(), Path(dst).expanduser()
    if source.is_dir():
        return _convert_folder(source, target)
    if not source.is_file():
        raise ModelError(f"there is no file or folder {source}")
    if source.suffix == ".safetensors":
        raise InvalidRequest(f"{source} is safetensors already")
    if target.is_dir():
        target = target / safetensors_name(source.name)
    if target.suffix != ".safetensors":
        raise InvalidRequest(f"{target}: the name of the file to write must end in .safetensors")
    if target.exists():
        raise InvalidRequest(f"{target} exists already: remove it or give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _convert_files([(source, part)])
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return [target]


def _convert_files(pairs: list[tuple[Path, Path]]) -> None:
    """(pickle, safetensors file) by (pickle, safetensors file), in one child."""
    names = [str(path.resolve()) for pair in pairs for path in pair]
    command = [sys.executable, "-m", "ragturbo.convert", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for line in filter(None, done.stdout.splitlines()):
        log.warning(line)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        at = next((source for source, target in pairs if not target.exists()), pairs[-1][0])
        raise ModelError(f"{at} cannot be converted: reading it ended with {name} (out of memory, or damaged)")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelError(last[0])


def _convert_folder(source: Path, target: Path) -> list[Path]:
    """A model's folder: pickles become safetensors, everything else is copied."""
    if target.exists():
        raise InvalidRequest(f"{target} exists already: remove it or give another name")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidRequest(f"{target} lies inside {source}: give a folder outside it")
    files = [Path(path).relative_to(source) for path in _files(source)]
    pickles = _pickles_of(source, files)
    if not pickles:
        raise ModelError(f"{source} holds no pickled weights ({', '.join(PICKLES)}) without a safetensors twin")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        part.chmod(0o755)
        pairs = [(source / name, part / name.with_name(safetensors_name(name.name))) for name in pickles]
        for _, file in pairs:
            file.parent.mkdir(parents=True, exist_ok=True)
        _convert_files(pairs)
        for name in files:
            if name.suffix not in (*PICKLES, *_LEFT_BEHIND):
                _copy(source / name, part / name)
        part.rename(target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [target / name.with_name(safetensors_name(name.name)) for name in pickles]


def _files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _pickles_of(source: Path, files: list[Path]) -> list[Path]:
    """The pickles that are the model's: with no safetensors beside them, and in a component where there are any.

    A pipeline's root often holds the whole model once more as one file in another layout.
    """
    pipeline = (source / "model_index.json").exists()
    there = set(files)
    return [
        name
        for name in files
        if name.suffix in PICKLES
        and name.with_name(safetensors_name(name.name)) not in there
        and not (pipeline and len(name.parts) == 1)
    ]


def _copy(source: Path, target: Path) -> None:
    """Indexes of sharded weights name their files, so their text changes with the names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.name.endswith(".bin.index.json"):
        shutil.copyfile(source, target)
        return
    try:
        index = json.loads(source.read_text("utf-8"))
        index["weight_map"] = {key: safetensors_name(name) for key, name in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} is no index of sharded weights: {error!r}") from error
    name = safetensors_name(source.name.removesuffix(".index.json")) + ".index.json"
    target.with_name(name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def state_dict_of(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of what a pickle held, by name, and what was left out. Unwraps training checkpoints and prefixes."""
    state, inside = loaded, "the file"
    while isinstance(state, Mapping) and not any(isinstance(value, torch.Tensor) for value in state.values()):
        wrapper = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if wrapper is None:
            keys = ", ".join(map(str, list(state)[:8])) or "nothing"
            raise ModelError(f"{inside} holds no tensors by name, but: {keys}")
        state, inside = state[wrapper], f"{wrapper!r}"
    if not isinstance(state, Mapping):
        raise ModelError(f"the file holds a {type(state).__name__}, not a state dict")
    dropped = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return {name: _plain(name, value) for name, value in tensors.items()}, dropped


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Memory of its own: safetensors has no views and no sharing."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ModelError(f"{name} is a {kind} tensor, which safetensors cannot hold")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _child(names: list[str]) -> None:
    """Reads pickles, writes safetensors. Lines on stdout are what was left out; an error is the last one on stderr."""
    for source, target in zip(names[::2], names[1::2], strict=True):
        try:
            # Memory-mapped, a file larger than memory is read tensor by tensor; the older format cannot be.
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
            state, dropped = state_dict_of(loaded)
            save_file(state, target, metadata={"format": "pt"})
        except Exception as error:
            sys.exit(f"{source} cannot be converted: {_reason(error)}")
        if dropped:
            more = " …" if len(dropped) > 8 else ""
            print(f"{source}: left out, being no tensors: {', '.join(dropped[:8])}{more}")


def _reason(error: Exception) -> str:
    """One line for people: torch explains at length how to load such a file anyway."""
    text = " ".join(str(error).split())
    if isinstance(error, ModelError):
        return text
    if isinstance(error, EOFError) or "PytorchStreamReader" in text:
        return "it is cut short or damaged"
    if "TorchScript" in text:
        return "it is a TorchScript program, not a state dict"
    if found := re.search(r"unsupported global:? (?:GLOBAL )?(\S+)|unsupported GLOBAL (\S+)", text, re.IGNORECASE):
        return f"it holds more than tensors, and reading {found[1] or found[2]} could run code"
    if found := re.search(r"WeightsUnpickler error: (.{1,80}?)(?= Check the| Please|$)", text):
        return f"it is no pickle of tensors, or damaged ({found[1]})"
    return f"{type(error).__name__}: {text[:200]}"


if __name__ == "__main__":
    _child(sys.argv[1:])
