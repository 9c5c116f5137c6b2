"""Arrays out of .npz and .npy files, a few rows at a time: memory does not grow with the file, nothing is unpickled.

A .npz is a zip of .npy members; its sizes are checked against each member's own header before anything is allocated.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from lowbit.errors import DataError
from lowbit.storage.atomic import replacing

LARGEST_ROW = 2 * 2**30  # bytes of one sample; more than that is a damaged or hostile header
LARGEST_MEMBER, LARGEST_RATIO = 2**30, 1000  # a member above both unpacks to far more than real data do


@dataclass(frozen=True)
class StoredArray:
    """One array of a file, known by its header; its numbers are read when asked for.

    file is a .npy (member is "") or a zip that has the member
    numbers lie from byte `start` of the (decompressed) member, in C order unless `fortran`
    where there is a scale, what is read is (code - zero_point) * scale in float32
    """

    file: Path
    member: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    fortran: bool = False
    scale: float | None = None
    zero_point: int = 0

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Slices of at most `count` rows along the first axis, in order."""
        if self.fortran:  # its first axis runs fastest, so that no slice of rows lies together
            array = self.whole()
            yield from (array[first : first + count] for first in range(0, len(array), count))
            return
        with _opened(self.file, self.member) as stream:
            stream.read(self.start)
            for first in range(0, self.shape[0], count):
                yield self._read(stream, (min(count, self.shape[0] - first), *self.shape[1:]))

    def whole(self) -> np.ndarray:
        """All of it, in memory."""
        with _opened(self.file, self.member) as stream:
            stream.read(self.start)
            return self._read(stream, self.shape)

    def _read(self, stream: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
        size = prod(shape) * self.dtype.itemsize
        try:
            raw = stream.read(size)
        except Exception as problem:  # zlib.error and lzma.LZMAError share no base class
            raise DataError(f"'{self.file}' is damaged at '{self.member}': {problem}.") from problem
        if len(raw) != size:
            raise DataError(f"'{self.file}' ends too early: '{self.member}' lacks {size - len(raw)} bytes.")
        codes = np.frombuffer(raw, self.dtype).reshape(shape, order="F" if self.fortran else "C")
        if self.scale is None:
            return codes
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


def stored_arrays(file: Path) -> dict[str, StoredArray]:
    """The arrays of a .npz by name; a .npy holds one, named ''."""
    if file.suffix == ".npy":
        return {"": _header(file, "", file.stat().st_size)}
    with checked_zip(file) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    if other := [info.filename for info in members if not info.filename.endswith(".npy")]:
        raise DataError(f"'{file}' holds '{other[0]}', which is not an array. A .npz holds .npy members only.")
    return {info.filename[: -len(".npy")]: _header(file, info.filename, info.file_size) for info in members}


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Write a .npz, or a .npy of the only array, aside and renamed; returns bytes on disk. A leading / is dropped."""
    with replacing(file) as aside:
        if file.suffix == ".npy":
            with aside.open("wb") as stream:
                np.lib.format.write_array(stream, next(iter(arrays.values())), allow_pickle=False)
        else:
            with zipfile.ZipFile(aside, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name.lstrip('/')}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
        return aside.stat().st_size


def checked_zip(file: Path) -> zipfile.ZipFile:
    """An open zip; a member that points outside, is encrypted, listed twice or a bomb is a DataError that names it."""
    try:
        archive = zipfile.ZipFile(file)
    except FileNotFoundError:
        raise DataError(f"there is no file '{file}'.") from None
    except Exception as problem:  # besides BadZipFile, damaged bytes raise NotImplementedError, UnicodeDecodeError, …
        raise DataError(f"'{file}' is not a readable zip: {problem}.") from problem
    seen: set[str] = set()
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or info.filename[1:2] == ":":
            raise DataError(f"'{file}' has a member that points outside of it: '{info.filename}'.")
        if info.flag_bits & 0x1:
            raise DataError(f"'{file}' is encrypted ('{info.filename}'); give it decrypted.")
        if info.file_size > LARGEST_MEMBER and info.file_size > LARGEST_RATIO * info.compress_size:
            raise DataError(
                f"'{file}' would unpack '{info.filename}' from {info.compress_size} to {info.file_size} bytes; "
                f"refused as a zip bomb. Store it with less compression if it is meant."
            )
        if info.filename in seen:
            raise DataError(f"'{file}' lists '{info.filename}' twice.")
        seen.add(info.filename)
    return archive


def _opened(file: Path, member: str) -> IO[bytes]:
    if not member:
        return file.open("rb")
    # The member keeps the zip's file object alive; closing the member is enough.
    return zipfile.ZipFile(file).open(member)


def _header(file: Path, member: str, size: int) -> StoredArray:
    """Read and check a .npy header; its declared size must be the member's size."""
    what = f"'{file}'" + (f", array '{member}'" if member else "")
    try:
        with _opened(file, member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
            start = stream.tell()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file '{file}'.") from None
    except Exception as problem:  # numpy, zlib and lzma raise what they like on damaged bytes
        raise DataError(
            f"{what} is not a NumPy array: {str(problem).splitlines()[0] if str(problem) else problem!r}"
        ) from None
    if dtype.hasobject:
        raise DataError(f"{what} holds pickled Python objects, which are never read. Save numbers: array.astype(…).")
    declared = prod(shape) * dtype.itemsize
    if declared != size - start:
        raise DataError(f"{what} declares {declared} bytes of numbers, but has {size - start}.")
    if shape and prod(shape[1:]) * dtype.itemsize > LARGEST_ROW:
        raise DataError(f"{what} has {prod(shape[1:]) * dtype.itemsize} bytes a sample; the most is {LARGEST_ROW}.")
    return StoredArray(file, member, dtype, shape, start, bool(fortran_order) and len(shape) > 1)
