"""A folder or a zip of image files, with labels from a table beside them or from the folders' names.

labels.csv / labels.txt   one line an image: its file name and its class; or one class a line in the files' order
a/1.jpg b/2.jpg           the folder is the class: its number, or its place in alphabetical order
images/…                  where there is a folder of this name, the images are in it alone, and it is no class
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from lowbit.data.archive import checked_zip
from lowbit.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
LARGEST_IMAGE = 100_000_000  # pixels; a header that declares more is taken for a decompression bomb
LARGEST_FILE = 2**28
LABEL_COLUMNS = ("label", "labels", "class_index", "class_id", "class", "target", "category")


@dataclass(frozen=True)
class ImageFiles:
    """Images in the order of their names (numbers in names count as numbers), decoded one at a time.

    names are paths inside `place`, with / between folders
    labels is None or an integer for each name
    """

    place: Path
    names: tuple[str, ...]
    labels: np.ndarray | None

    @classmethod
    def at(cls, place: Path) -> "ImageFiles":
        """The images of a folder or of a zip."""
        listed = _listed(place)
        names = [name for name in listed if PurePosixPath(name).suffix.lower() in SUFFIXES and not _hidden(name)]
        if in_images := [name for name in names if "images" in PurePosixPath(name).parts[:-1]]:
            names = in_images
        if not names:
            raise DataError(f"'{place}' holds no images ({', '.join(sorted(SUFFIXES))}) and is no .npz or .npy.")
        names.sort(key=_natural)
        return cls(place, tuple(names), _labels(place, names, listed))

    def pixels(self, skip: int = 0) -> Iterator[tuple[np.ndarray, int | None]]:
        """(height, width, 3) uint8 RGB and the label, or None, of each image after the first `skip`."""
        from PIL import Image, UnidentifiedImageError

        read = _reader(self.place)
        for index, name in enumerate(self.names[skip:], skip):
            raw = read(name)
            try:
                with Image.open(io.BytesIO(raw)) as image:
                    if image.width * image.height > LARGEST_IMAGE:
                        raise DataError(f"'{name}' in '{self.place}' declares {image.width} x {image.height} pixels.")
                    rgb = np.asarray(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
                raise DataError(f"'{name}' in '{self.place}' is no readable image: {problem}.") from None
            yield rgb, None if self.labels is None else int(self.labels[index])


def _listed(place: Path) -> list[str]:
    if place.is_dir():
        files = [path for path in place.rglob("*") if path.is_file()]
        return [path.relative_to(place).as_posix() for path in files]
    with checked_zip(place) as archive:
        return [info.filename for info in archive.infolist() if not info.is_dir()]


def _reader(place: Path) -> Callable[[str], bytes]:
    """A function that gives the bytes of a file in the folder or zip; a zip is opened once."""
    archive = None if place.is_dir() else checked_zip(place)

    def read(name: str) -> bytes:
        size = archive.getinfo(name).file_size if archive else (place / name).stat().st_size
        if size > LARGEST_FILE:
            raise DataError(f"'{name}' in '{place}' has {size} bytes; the most for one file is {LARGEST_FILE}.")
        try:
            return archive.read(name) if archive else (place / name).read_bytes()
        except Exception as problem:  # OSError, zlib.error, LZMAError and BadZipFile share no base class
            raise DataError(f"'{place}' cannot be read at '{name}': {problem}.") from None

    return read


def _labels(place: Path, names: Sequence[str], listed: Sequence[str]) -> np.ndarray | None:
    tables = [name for name in listed if PurePosixPath(name).name in ("labels.csv", "labels.txt")]
    if tables:
        table = min(tables, key=lambda name: name.count("/"))
        text = _reader(place)(table).decode("utf-8-sig", errors="replace")
        return _from_table(text, names, f"'{table}' in '{place}'")
    folders = sorted({PurePosixPath(name).parent.name for name in names})
    if len(folders) < 2:
        return None
    numbered = all(folder.isdigit() for folder in folders)
    classes = {folder: int(folder) if numbered else index for index, folder in enumerate(folders)}
    return np.asarray([classes[PurePosixPath(name).parent.name] for name in names], np.int64)


def _from_table(text: str, names: Sequence[str], what: str) -> np.ndarray:
    """Classes of the named images out of a table with a comma, a tab or a blank between its columns."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{what} is empty.")
    separator = next((mark for mark in (",", "\t", ";", " ") if mark in lines[0]), ",")
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)]
    if len(rows[0]) == 1:
        if len(rows) != len(names):
            raise DataError(f"{what} has {len(rows)} lines for {len(names)} images; give 'file,class' in each.")
        return _classes([row[0] for row in rows])
    known = {PurePosixPath(name).name for name in names} | set(names) | {PurePosixPath(name).stem for name in names}
    column = 1
    if rows[0][0] not in known:
        header = [cell.lower() for cell in rows.pop(0)]
        column = next((header.index(name) for name in LABEL_COLUMNS if name in header), 1)
    if short := next((row for row in rows if len(row) <= column), None):
        raise DataError(f"{what}: the line '{separator.join(short)}' has no class.")
    by_name = dict(zip([row[0] for row in rows], _classes([row[column] for row in rows]), strict=True))
    found = [next((by_name[key] for key in _keys(name) if key in by_name), None) for name in names]
    if None in found:
        raise DataError(f"{what} has no line for '{names[found.index(None)]}'.")
    return np.asarray(found, np.int64)


def _classes(cells: Sequence[str]) -> np.ndarray:
    """Integers as they are; words by their place in alphabetical order."""
    if all(re.fullmatch(r"-?\d{1,18}", cell) for cell in cells):
        return np.asarray([int(cell) for cell in cells], np.int64)
    places = {word: place for place, word in enumerate(sorted(set(cells)))}
    return np.asarray([places[cell] for cell in cells], np.int64)


def _keys(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    return (name, path.name, path.stem)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
