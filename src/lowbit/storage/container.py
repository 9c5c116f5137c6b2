"""`.lowbit`: a model in one small file that gives back the original files bit for bit.

The contents of tensors are cut out of the model's own bytes and entropy-coded; what is left (names, operators,
metadata) is compressed as it is. Nothing is parsed and written anew, so nothing can come back different.
docs/container.md specifies every byte.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lowbit.errors import InputError
from lowbit.storage import envelope
from lowbit.storage.atomic import refuse_overwriting_input, replacing
from lowbit.storage.choose import choose
from lowbit.storage.codecs import WIDTHS, Codec
from lowbit.storage.configs import write_config
from lowbit.storage.envelope import Envelope
from lowbit.storage.index import MAX_INDEX_BYTES, ONNX, SAFETENSORS, Cut, File, Index, Unit, read_blob, write_blob
from lowbit.storage.plan import Plan, mapped, plan, safe_name
from lowbit.storage.products import multiplied

CACHED_UNIT_BYTES = 1 << 20


def pack(source: Any, out: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> int:
    """Write the container `out` and return its bytes on disk.

    source     an ONNX or safetensors file (with the external files it names), its bytes, a Model, or a state dict:
               a mapping of names to torch tensors or numpy arrays
    progress   called with (bytes coded, bytes to code)

    Every unit is decoded again and compared before it is written. InputError where the source is neither, or where
    `out` is one of the files that are read.
    """
    out = Path(out)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        refuse_overwriting_input(out, path)
        data = mapped(path)
        planned = plan(data, _kind(data, str(path)), ONNX, path.parent)
        refuse_overwriting_input(out, *(path.parent / file.name for file in planned.files[1:]))
        return _write(planned, out, progress)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = memoryview(source)
        return _write(plan(data, _kind(data, "the model"), ONNX, None), out, progress)
    if isinstance(source, Mapping):
        data = memoryview(_state_dict_bytes(source))
        return _write(plan(data, SAFETENSORS, ONNX, None), out, progress)
    if hasattr(source, "save") and hasattr(source, "program"):
        with TemporaryDirectory() as folder:
            source.save(Path(folder) / "model.onnx")
            return pack(Path(folder) / "model.onnx", out, progress)
    raise InputError(
        f"cannot pack a {type(source).__name__}: give an ONNX or safetensors file, a Model or a state dict."
    )


def unpack(path: str | os.PathLike[str], out: str | os.PathLike[str], max_bytes: int | None = None) -> int:
    """Write the file that was packed as `out`, its external files beside it, and return their bytes.

    Each is written aside and checked against its SHA-256 before any is renamed. InputError where the container is
    damaged, or unpacks to more than `max_bytes` (by default 1 GiB or 1024 times its size, whichever is more).
    """
    out = Path(out)
    refuse_overwriting_input(out, path)
    with Container(path, max_bytes) as container, ExitStack() as pending:
        for number, file in enumerate(container.index.files):
            target = out.parent / safe_name(file.name) if number else out
            refuse_overwriting_input(target, path)
            if number and target.resolve() == out.resolve():
                raise InputError(
                    f"the model and its external file would both be written to '{out}'; choose another name."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = pending.enter_context(replacing(target))
            with aside.open("wb") as writer:
                for part in container.stream(number):
                    writer.write(part)
        return sum(file.size for file in container.index.files)


def unpacked_bytes(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """The packed file's bytes; InputError if it keeps weights in external files."""
    with Container(path, max_bytes) as container:
        if len(container.index.files) > 1:
            raise InputError(f"'{path}' holds {len(container.index.files)} files; unpack it to a folder instead.")
        return b"".join(container.stream(0))


class Container:
    """An open container: its index is read and checked, its payloads are read when they are asked for."""

    def __init__(self, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"'{path}' is not a file that can be read.")
        self.size = self.path.stat().st_size
        self.max_bytes = max(1 << 30, 1024 * self.size) if max_bytes is None else max_bytes
        self.handle = self.path.open("rb")
        try:
            self.envelope = Envelope.read(self.handle, self.size, str(path))
            data_start, data_stop = self.envelope.parts["data"]
            index = read_blob(self._part("index"), MAX_INDEX_BYTES, f"the index of '{path}'")
            self.index = Index.read(index, data_stop - data_start, self.max_bytes)
            self.index_size = len(index)
            self.program = memoryview(read_blob(self._part("program"), self.max_bytes, f"the program of '{path}'"))
            if len(self.program) != sum(file.rest_size for file in self.index.files):
                raise InputError(f"'{path}' is damaged: its program is {len(self.program)} bytes long.")
        except BaseException:
            self.handle.close()
            raise
        uses = Counter(cut.unit for file in self.index.files for cut in file.cuts)
        self.shared = {unit for unit, count in uses.items() if count > 1}
        self.cache: dict[int, bytes] = {}

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()

    def _part(self, name: str) -> bytes:
        start, stop = self.envelope.parts[name]
        self.handle.seek(start)
        return self.handle.read(stop - start)

    def payload(self, unit: Unit) -> bytes:
        """The coded bytes of a unit."""
        start, stop = unit.payload
        self.handle.seek(self.envelope.parts["data"][0] + start)
        return self.handle.read(stop - start)

    def unit_bytes(self, number: int) -> bytes:
        """The decoded bytes of a unit, checked against their CRC-32."""
        if number in self.cache:
            return self.cache[number]
        unit = self.index.units[number]
        data = unit.codec.decode(self.payload(unit), unit.size // unit.codec.width).tobytes()
        if len(data) != unit.size or zlib.crc32(data) != unit.crc:
            raise InputError(f"'{self.path}' is damaged: the checksum of tensor data {number} does not fit.")
        if number in self.shared and unit.size <= CACHED_UNIT_BYTES:
            self.cache[number] = data
        return data

    def cut_bytes(self, cut: Cut) -> bytes:
        """The bytes of a cut."""
        data = self.unit_bytes(cut.unit)[cut.offset : cut.offset + cut.length]
        return data if cut.factor is None else multiplied(np.frombuffer(data, np.float32), cut.factor).tobytes()

    def rest(self, number: int) -> memoryview:
        """What is left of a file where its cuts were taken out."""
        start = sum(file.rest_size for file in self.index.files[:number])
        return self.program[start : start + self.index.files[number].rest_size]

    def stream(self, number: int) -> Iterator[bytes | memoryview]:
        """The bytes of a file in order; at the end they are checked against its SHA-256."""
        file = self.index.files[number]
        digest = sha256()
        for part in self._pieces(file, self.rest(number), 0, file.size):
            digest.update(part)
            yield part
        if digest.digest() != file.sha256:
            raise InputError(
                f"'{self.path}' is damaged: what it unpacks to does not have the checksum of what was packed."
            )

    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes from start to stop of a file, decoding only what lies there."""
        file = self.index.files[number]
        if not 0 <= start <= stop <= file.size:
            raise InputError(f"'{self.path}': bytes {start} to {stop} of a file of {file.size} were asked for.")
        return b"".join(self._pieces(file, self.rest(number), start, stop))

    def _pieces(self, file: File, rest: memoryview, start: int, stop: int) -> Iterator[bytes | memoryview]:
        position = missing = 0
        for cut in file.cuts:
            if cut.start >= stop:
                break
            if cut.start > start and cut.start > position:
                yield rest[max(start, position) - missing : cut.start - missing]
            position = cut.start + cut.length
            missing += cut.length
            if position > start:
                low, high = max(start, cut.start) - cut.start, min(stop, position) - cut.start
                yield self.cut_bytes(cut)[low:high]
        if stop > position:
            yield rest[max(start, position) - missing : stop - missing]


def _write(planned: Plan, out: Path, progress: Callable[[int, int], None] | None) -> int:
    """Code every unit and write the container."""
    known: list[Codec] = []
    units: list[Unit] = []
    total, done = sum(unit.size for unit in planned.units), 0
    most = 1024 + 2 * sum(file.size + 256 * len(file.cuts) for file in planned.files)  # coded, nothing doubles
    with envelope.writing(out, most) as writer:
        for wanted in planned.units:
            data = planned.unit_bytes(wanted)
            width = max(1, wanted.bits // 8)
            elements = np.frombuffer(data, WIDTHS[width])
            codec = choose(elements, known, packed_bits=min(wanted.bits, 8), numbers=wanted.varints)
            payload = codec.encode(elements)
            if codec.decode(payload, len(data) // codec.width).tobytes() != data:
                raise InputError(
                    f"codec '{codec.name}' did not give a tensor back; nothing was written. Please report it."
                )
            write_config(codec, known)
            start = writer.data_bytes
            writer.add(payload)
            units.append(Unit(codec, len(data), zlib.crc32(data), (start, writer.data_bytes)))
            done += len(data)
            if progress:
                progress(done, total)
        index = Index(planned.kind, planned.files, units)
        writer.finish(write_blob(planned.rest()), write_blob(index.write()))
    return out.stat().st_size


def _kind(data: memoryview, name: str) -> int:
    """Whether bytes are an ONNX or a safetensors file."""
    if len(data) < 9:
        raise InputError(f"{name!r} is {len(data)} bytes long: neither an ONNX nor a safetensors file.")
    if bytes(data[8:9]) != b"{" or int.from_bytes(data[:8], "little") > len(data):
        if bytes(data[:4]) in (b"PK\x03\x04", b"\x80\x02}q", b"\x80\x02\x8a\n"):
            raise InputError(
                f"{name!r} is a pickle or a zip file, which is never opened; save it as safetensors or ONNX."
            )
        return ONNX
    if b'"lowbit"' in bytes(data[:64]):
        raise InputError(f"{name!r} is packed already.")
    return SAFETENSORS


def _state_dict_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A state dict as the bytes of a safetensors file."""
    import torch
    from safetensors.torch import save

    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = torch.from_numpy(np.ascontiguousarray(tensor))
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"a state dict maps names to tensors; {name!r} is a {type(tensor).__name__}.")
        # cloned: safetensors refuses tensors that share memory, as tied weights do; equal bytes are stored once anyway
        plain[name] = tensor.detach().cpu().contiguous().clone()
    return bytes(save(plain))
