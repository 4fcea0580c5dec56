"""Keys of texts for a search, by the text encoder of the model that built a database; the rest of it is not loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.find import Hub, resolve
from ragturbo.retrieval.encoder import CLIP_KEY, text_for
from ragturbo.retrieval.origin import origin

if TYPE_CHECKING:
    from ragturbo.model.text import TextEncoder

_BATCH = 32
Check = Callable[[Mapping[str, str], str], None]


class TextKeys:
    """The text side of a model. The same weights that built a database give keys that fit its keys."""

    def __init__(self, text: TextEncoder) -> None:
        self._text = text

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return (B, K) float32, normalised."""
        import torch

        device = next(self._text.text_encoder.parameters()).device
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                input_ids = self._text.tokenize(texts[start : start + _BATCH]).input_ids.to(device)
                parts.append(self._text.encode(input_ids).key.float().cpu())
        return torch.cat(parts).numpy()

    def unknown(self, text: str) -> tuple[str, ...]:
        """The words of a text that the model does not know."""
        return self._text.tokenize([text]).unknown[0]


def load_text_keys(model: Any, folder: Path, key_kind: str, check: Check, hub: Hub | None = None) -> TextKeys:
    """Load the text encoder of a database's model.

    Args:
        model: a bundle, a loaded pipeline, a name or a folder; None: the model that built the database.
        folder, key_kind: of the database.
        check: called with the text encoder's fingerprints and key; raises if they are not the database's.
        hub: where to look for the model.

    Raises:
        InvalidRequest: it is not known which model built the database, or that model is not on this machine.
        ModelError: there is no such model.
        DatabaseMismatch: another model built the database.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        return _of_loaded(model, key_kind, check)
    if model is not None:
        return _of_folder(resolve(model, hub or Hub()), key_kind, check)
    name = origin(folder)
    try:
        # Without a download: a search must not load gigabytes that nobody asked for.
        home = resolve(name, hub or Hub(local_files_only=True))
    except ModelError as error:
        raise InvalidRequest(
            f"{folder} was built by {name}, which is not on this machine: pass model=, its name or folder ({error})",
            option="model",
        ) from error
    return _of_folder(home, key_kind, check)


def _of_loaded(model: Any, key_kind: str, check: Check) -> TextKeys:
    from ragturbo.model.bundle import Bundle

    bundle = model if isinstance(model, Bundle) else Bundle.from_pipeline(model)
    text = text_for(bundle, key_kind)
    check(_text_parts(bundle.fingerprint(), key_kind), text.key_kind)
    return TextKeys(text)


def _of_folder(folder: Path, key_kind: str, check: Check) -> TextKeys:
    if key_kind == "clip" and not (folder / CLIP_KEY).is_file():
        raise ModelError(f"the database has 'clip' keys, and {folder} has no {CLIP_KEY}")
    import torch

    from ragturbo.model import source
    from ragturbo.model.clip_key import ClipKey
    from ragturbo.model.fingerprint import fingerprint
    from ragturbo.model.text import TextEncoder

    parts: dict[str, Any] = {"text_encoder": source.load_text_encoder(folder)}
    if key_kind == "clip":
        parts["clip_key"] = ClipKey.load(folder)
    # Fingerprints are of the weights as they are stored.
    check({name: fingerprint(module) for name, module in parts.items()}, key_kind)
    for module in parts.values():
        torch.nn.Module.to(module, "cpu", torch.float32).requires_grad_(False).eval()
    return TextKeys(TextEncoder(source.load_tokenizer(folder), parts["text_encoder"], parts.get("clip_key")))


def _text_parts(fingerprints: Mapping[str, str], key_kind: str) -> dict[str, str]:
    wanted = ("text_encoder", "clip_key") if key_kind == "clip" else ("text_encoder",)
    return {name: fingerprints[name] for name in wanted if name in fingerprints}
