"""A folder of images, each with a .txt file of the same name, as a source of pairs."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ragturbo.errors import InvalidRequest
from ragturbo.messages import many
from ragturbo.retrieval.items import IMAGE_TYPES, MAX_CAPTION, Item, utf16
from ragturbo.retrieval.report import Notes


class ImageFolder:
    """The images below `path`, in the order of their paths. Linked folders are not entered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: list[Path] = []
        texts: list[Path] = []
        others: list[Path] = []
        links: list[Path] = []
        for folder, inner, names in os.walk(path):
            here = Path(folder)
            links += [(here / name).relative_to(path) for name in inner if (here / name).is_symlink()]
            for name in names:
                file, kind = (here / name).relative_to(path), Path(name).suffix.lower()
                found = self.images if kind in IMAGE_TYPES else texts if kind == ".txt" else others
                found.append(file)
        self.images.sort()
        if not self.images:
            raise InvalidRequest(f"{path}: no images ({', '.join(IMAGE_TYPES)}) and no .tar shards")
        captioned = Counter(image.with_suffix(".txt") for image in self.images)
        self._shared = sorted(text for text, images in captioned.items() if images > 1)
        self._alone = sorted(text for text in texts if text not in captioned)
        self._others = sorted(file for file in others if not file.name.startswith("."))
        self._links = sorted(links)

    def items(self, notes: Notes | None = None) -> Iterator[Item]:
        if notes is not None:
            self._note(notes)
        for image in self.images:
            caption, problem = read_caption((self.path / image).with_suffix(".txt"))
            if problem is None:
                yield Item(caption, self.path / image, str(image))
            else:
                yield Item(source=str(image), problem=problem)

    def _note(self, notes: Notes) -> None:
        texts = set(self._shared)
        sharing: dict[Path, list[str]] = {}
        for image in self.images:
            if (text := image.with_suffix(".txt")) in texts:
                sharing.setdefault(text, []).append(image.name)
        for text in self._shared:
            notes.add("shared_text", f"{text} of {', '.join(sharing[text])}")
        for kind, files in (
            ("text_without_image", self._alone), ("linked_folder", self._links), ("ignored_file", self._others),
        ):  # fmt: skip
            for file in files:
                notes.add(kind, str(file))


def read_caption(path: Path) -> tuple[str, str | None]:
    """Return the text of a caption file, and why it cannot be read, or None."""
    try:
        size = path.stat().st_size
        if size > 4 * MAX_CAPTION:
            return "", f"no caption: {path.name} has {many(size, 'byte')}, more than {4 * MAX_CAPTION}"
        raw = path.read_bytes()
    except FileNotFoundError:
        return "", f"no caption: there is no {path.name}"
    except OSError as error:
        return "", f"no caption: {path.name}: {error.strerror}"
    if utf16(raw):
        return "", f"no caption: {path.name} is UTF-16; save it as UTF-8"
    try:
        # As text files are read: any of \n, \r\n and \r ends a line.
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read().strip(), None
    except UnicodeDecodeError as error:
        return "", f"no caption: {path.name} is not UTF-8: byte {error.object[error.start]:#x} at {error.start}"
