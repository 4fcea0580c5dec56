"""`ragturbo convert`: pickled weights, a file or a model folder, to safetensors.

A pickle runs code when it is loaded. Here it is loaded by torch with weights_only, which allows little but tensors, and
in a child process (`python -m ragturbo.convert IN OUT …`), so that a damaged or oversized file kills only the child.
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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.folders import make_folder
from ragturbo.model.pickles import PICKLES, safetensors_name

# Imported where it is used: the parent process only checks names and starts the child.
if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ragturbo")

# The keys of checkpoints that hold the weights, next to optimizers and step counts, in the order of the search.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")
# The prefixes that distributed training and torch.compile add to every name.
_PREFIXES = ("module.", "_orig_mod.")
# Weights of other frameworks in a model folder, which are not copied.
_NOT_COPIED = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> list[Path]:
    """Convert a pickled file to a .safetensors file, or a model folder to a new folder. Dtypes are kept.

    Args:
        src: a file, or a folder whose other files are copied.
        dst: a new file or folder, written only if everything can be converted; or an existing folder for the file.

    Returns:
        The safetensors files written.

    Raises:
        InvalidRequest: `dst` exists or is not a valid name, or `src` is safetensors.
        ModelError: `src` does not exist or cannot be converted.
    """
    source, target = Path(src).expanduser(), Path(dst).expanduser()
    if source.is_file():
        if source.suffix == ".safetensors":
            raise InvalidRequest(f"{source} is already a safetensors file")
        if target.is_dir():
            target = target / safetensors_name(source.name)
        if target.suffix != ".safetensors":
            raise InvalidRequest(f"{target}: the name of the file to write must end in .safetensors")
    elif not source.is_dir():
        raise ModelError(f"there is no file or folder {source}")
    if target.exists():
        raise InvalidRequest(f"{target} already exists: remove it or give another name")
    if source.resolve() in target.resolve().parents:
        raise InvalidRequest(f"{target} is inside {source}: give a folder outside it")
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as temporary:
        part = Path(temporary) / target.name
        try:
            if source.is_dir():
                written = [target / name for name in _convert_folder(source, part)]
            else:
                _convert_files([(source, part)])
                written = [target]
            part.rename(target)
        except OSError as error:
            raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error
    return written


def _convert_folder(source: Path, target: Path) -> list[Path]:
    """Convert a folder's pickles and copy its other files; return the converted files' names."""
    found = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    files = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    # Weights at a pipeline's root are single-file copies of the whole model in another layout.
    pipeline = (source / "model_index.json").exists()
    candidates = [name for name in files if name.suffix in PICKLES and not (pipeline and len(name.parts) == 1)]
    renamed = {name: name.with_name(safetensors_name(name.name)) for name in candidates}
    pickles = {name: new for name, new in renamed.items() if new not in files}
    if not pickles:
        raise ModelError(f"{source} has no pickled weights ({', '.join(PICKLES)}) without a safetensors copy")
    copied = [name for name in files if name.suffix not in (*PICKLES, *_NOT_COPIED)]
    for name in (*copied, *pickles):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    _convert_files([(source / name, target / new) for name, new in pickles.items()])
    for name in copied:
        if name.name.endswith(".bin.index.json"):
            _convert_index(source / name, (target / name).parent)
        else:
            shutil.copyfile(source / name, target / name)
    return list(pickles.values())


def _convert_index(source: Path, folder: Path) -> None:
    """Change the file names in an index of sharded weights."""
    try:
        index = json.loads(source.read_text("utf-8"))
        index["weight_map"] = {key: safetensors_name(name) for key, name in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} is not an index of sharded weights: {error!r}") from error
    name = safetensors_name(source.name.removesuffix(".index.json")) + ".index.json"
    (folder / name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _convert_files(pairs: list[tuple[Path, Path]]) -> None:
    """Convert (pickle, safetensors file) pairs in one child process."""
    for source, _ in pairs:
        _check_pickle(source)
    names = [str(path.resolve()) for pair in pairs for path in pair]
    command = [sys.executable, "-m", "ragturbo.convert", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for line in filter(None, done.stdout.splitlines()):
        log.warning(line)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        failed = next((source for source, target in pairs if not target.exists()), pairs[-1][0])
        raise ModelError(f"{failed} cannot be converted: loading it ended with {name} (out of memory, or damaged)")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelError(last[0])


def _check_pickle(path: Path) -> None:
    """Raise ModelError if a file begins neither as a pickle nor as the zip file that torch.save makes."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    # An empty file is told by torch to be truncated.
    if start and start != b"PK" and start[:1] != b"\x80":
        raise ModelError(f"{path} is not a pickled checkpoint")


def state_dict_of(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The named tensors of a loaded checkpoint, without wrappers and prefixes, and the names of what was left out."""
    import torch
    from torch import Tensor

    state, inside = loaded, "the file"
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        wrapper = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if wrapper is None:
            keys = ", ".join(map(str, list(state)[:8])) or "nothing"
            raise ModelError(f"{inside} holds no named tensors, only: {keys}")
        state, inside = state[wrapper], f"{wrapper!r}"
    if not isinstance(state, Mapping):
        raise ModelError(f"the file holds a {type(state).__name__}, not a state dict")
    dropped = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ModelError(f"{name} is a {kind} tensor, which safetensors cannot store")
    # Copied: safetensors stores neither views nor shared memory.
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return copies, dropped


def _child(names: list[str]) -> None:
    """Convert files given as IN OUT IN OUT …; stdout gets what was left out, the last line of stderr an error."""
    import torch
    from safetensors.torch import save_file

    for source, target in zip(names[::2], names[1::2], strict=True):
        try:
            # Memory-mapped, a file larger than memory is read tensor by tensor. Files of the old format cannot be.
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
            state, dropped = state_dict_of(loaded)
            save_file(state, target, metadata={"format": "pt"})
        except Exception as error:
            sys.exit(f"{source} cannot be converted: {_reason(error)}")
        if dropped:
            more = " …" if len(dropped) > 8 else ""
            print(f"{source}: left out, not tensors: {', '.join(dropped[:8])}{more}")


def _reason(error: Exception) -> str:
    """The error in one line. torch's messages explain at length how to load such a file anyway."""
    text = " ".join(str(error).split())
    if isinstance(error, ModelError):
        return text
    if isinstance(error, (EOFError, IndexError)) or "PytorchStreamReader" in text:
        return "it is truncated or damaged"
    if "TorchScript" in text:
        return "it is a TorchScript program, not a state dict"
    if found := re.search(r"unsupported global:? (?:GLOBAL )?(\S+)|unsupported GLOBAL (\S+)", text, re.IGNORECASE):
        return f"it holds more than tensors, and loading {found[1] or found[2]} could run code"
    if found := re.search(r"WeightsUnpickler error: (.{1,80}?)(?= Check the| Please|$)", text):
        return f"it is not a pickle of tensors, or damaged ({found[1]})"
    return f"{type(error).__name__}: {text[:200]}"


if __name__ == "__main__":
    _child(sys.argv[1:])
