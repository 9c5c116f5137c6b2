"""`.lowbit`: a model in one small file that gives back the original files bit for bit.

The contents of tensors are cut out of the model's own bytes and entropy-coded; what is left (names, operators,
metadata) is compressed as it is. Nothing is parsed and written anew, so nothing can come back different.
docs/container.md specifies every byte.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lowbit.errors import InputError
from lowbit.storage.atomic import refuse_overwriting_input, replacing
from lowbit.storage.choose import choose
from lowbit.storage.codecs import WIDTHS
from lowbit.storage.index import Cut, File, Index, Unit, expand, squeeze
from lowbit.storage.plan import Pending, Plan, external_files, mapped, safe_name
from lowbit.storage.products import multiplied
from lowbit.storage.tensors import Tensor, onnx_tensors, safetensors_tensors
from lowbit.storage.wire import Reader

VERSION = "2"
MAX_HEADER_BYTES = 4096
MAX_INDEX_BYTES = 1 << 26
CACHED_UNITS = 8
"""Small tensors of a kind share a unit: the pools of a few kinds are asked for in turn."""


def pack(source: Any, out: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> int:
    """Write the container `out` and return its bytes on disk.

    source     an ONNX or safetensors file (with the external files it names), its bytes, a Model, or a state dict:
               a mapping of names to torch tensors or numpy arrays
    progress   called with (bytes coded, bytes to code)

    Every unit is decoded again and compared before it is written. InputError where the source is neither, or where
    `out` is one of the files that are read.
    """
    out = Path(out)
    if hasattr(source, "save") and hasattr(source, "program"):
        with TemporaryDirectory() as folder:
            source.save(Path(folder) / "model.onnx")
            return pack(Path(folder) / "model.onnx", out, progress)
    name, folder_read = "the model", None
    if isinstance(source, (str, os.PathLike)):
        name, folder_read = str(source), Path(source).parent
        refuse_overwriting_input(out, source)
        data = mapped(Path(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = memoryview(source)
    elif isinstance(source, Mapping):
        data = memoryview(_state_dict_bytes(source))
    else:
        raise InputError(
            f"cannot pack a {type(source).__name__}: give an ONNX or safetensors file, a Model or a state dict."
        )
    tensors = _tensors(data, name)
    external = external_files(tensors, folder_read)
    refuse_overwriting_input(out, *external.values())
    plan = Plan()
    for file, contents in {"": data, **{file: mapped(path) for file, path in external.items()}}.items():
        plan.add(file, contents, [tensor for tensor in tensors if tensor.location == file])
    return _write(plan, out, progress)


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


def unpacked_bytes(path: str | os.PathLike[str]) -> bytes:
    """The packed file's bytes; InputError if it keeps weights in external files."""
    with Container(path) as container:
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
        self._open = _opened(self.path)
        self.data = self._open.get_slice("data")
        self.squeezed = self._open.get_tensor("index").tobytes()
        inside = expand(self.squeezed, self.max_bytes + MAX_INDEX_BYTES, f"the index of '{path}'")
        source = Reader(inside, f"the index of '{path}'")
        self.index = Index.read(source, self.data.get_shape()[0], self.max_bytes)
        self.program = source.take(source.left)
        if len(self.program) != sum(file.rest_size for file in self.index.files):
            raise InputError(f"'{path}' is damaged: its program is {len(self.program)} bytes long.")
        self.payloads = np.cumsum([0, *(unit.payload_bytes for unit in self.index.units)]).tolist()
        self.unit_bytes = lru_cache(CACHED_UNITS)(self._unit_bytes)

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(None, None, None)

    def payload(self, unit: int) -> bytes:
        """The coded bytes of a unit."""
        return bytes(self.data[self.payloads[unit] : self.payloads[unit + 1]].tobytes())

    def _unit_bytes(self, number: int) -> bytes:
        """The decoded bytes of a unit, checked against their CRC-32."""
        unit = self.index.units[number]
        data = unit.codec.decode(self.payload(number), unit.size // unit.codec.width).tobytes()
        if len(data) != unit.size or zlib.crc32(data) != unit.crc:
            raise InputError(f"'{self.path}' is damaged: the checksum of tensor data {number} does not fit.")
        return data

    def cut_bytes(self, cut: Cut) -> bytes:
        """The bytes of a cut."""
        data = self.unit_bytes(cut.unit)[cut.offset : cut.offset + cut.length]
        return multiplied(np.frombuffer(data, np.float32), cut.factor).tobytes() if cut.factor else data

    def stream(self, number: int) -> Iterator[bytes | memoryview]:
        """The bytes of a file in order; at the end they are checked against its SHA-256."""
        file = self.index.files[number]
        digest = sha256()
        for part in self._pieces(file, 0, file.size, self.cut_bytes):
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
        return b"".join(self._pieces(file, start, stop, self.cut_bytes))

    def tensors(self) -> list[Tensor]:
        """The tensors of the model, without decoding one: each cut is filled with bytes that occur nowhere else."""

        def filler(cut: Cut) -> bytes:
            return (cut.start.to_bytes(8, "little") * (cut.length // 8 + 1))[: cut.length]

        file = self.index.files[0]
        return _tensors(memoryview(b"".join(self._pieces(file, 0, file.size, filler))), str(self.path))

    def _pieces(
        self, file: File, start: int, stop: int, contents: Callable[[Cut], bytes]
    ) -> Iterator[bytes | memoryview]:
        """The bytes from start to stop of a file, those of its cuts as `contents` says."""
        base = sum(other.rest_size for other in self.index.files[: self.index.files.index(file)])
        position = 0
        for cut in file.cuts:
            yield self.program[base + max(0, start - position) : base + max(0, min(cut.start, stop) - position)]
            base, position = base + cut.start - position, cut.start + cut.length
            if cut.start < stop and position > start:
                yield contents(cut)[max(0, start - cut.start) : stop - cut.start]
        yield self.program[base + max(0, start - position) : base + max(0, stop - position)]


def _opened(path: Path) -> Any:
    """The envelope: a safetensors file of the byte arrays `data` and `index`."""
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
            raise InputError(f"'{path}' is not a .lowbit container: its header is over {MAX_HEADER_BYTES} bytes long.")
    try:
        opened: Any = safe_open(path, "numpy")
        version = (opened.metadata() or {}).get("lowbit", "")
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        shapes = {name: (part.get_dtype(), len(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is not a .lowbit container, or it is damaged or cut short: {error}.") from None
    if version and version != VERSION:
        raise InputError(
            f"'{path}' is a container of version {version!r:.20}; this lowbit reads {VERSION}. Upgrade it."
        )
    if not version or shapes != {"data": ("U8", 1), "index": ("U8", 1)}:
        raise InputError(f"'{path}' is not a .lowbit container, or its header is damaged.")
    return opened


def _header(data: int, index: int) -> bytes:
    """The safetensors header of parts of these lengths."""
    entries = {"data": (0, data), "index": (data, data + index)}
    header: dict[str, Any] = {"__metadata__": {"lowbit": VERSION}}
    for name, (start, stop) in entries.items():
        header[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    return json.dumps(header, separators=(",", ":")).encode()


def _write(plan: Plan, out: Path, progress: Callable[[int, int], None] | None) -> int:
    """Code every unit and write the container; the header stands in front and is written last."""
    units: list[Unit] = []
    total, done = sum(unit.size for unit in plan.units), 0
    most = 1024 + 2 * sum(file.size for file in plan.files)
    header_bytes = -(-len(_header(most, most)) // 8) * 8
    with replacing(out) as aside, aside.open("wb") as writer:
        writer.write(bytes(8 + header_bytes))
        for pending in plan.units:
            unit, payload = _coded(pending)
            writer.write(payload)
            units.append(unit)
            done += unit.size
            if progress:
                progress(done, total)
        index = squeeze(b"".join([Index(units, plan.files).write(), *plan.program]))
        writer.write(index)
        header = _header(sum(unit.payload_bytes for unit in units), len(index)).ljust(header_bytes)
        writer.seek(0)
        writer.write(header_bytes.to_bytes(8, "little") + header)
    return out.stat().st_size


def _coded(pending: Pending) -> tuple[Unit, bytes]:
    """A unit and its payload, which gives its bytes back."""
    data = b"".join(pending.parts)
    elements = np.frombuffer(data, WIDTHS[max(1, pending.bits // 8)])
    codec = choose(elements, min(pending.bits, 8))
    payload = codec.encode(elements)
    if codec.decode(payload, elements.size).tobytes() != data:
        raise InputError(f"codec '{codec.name}' did not give a tensor back; nothing was written. Please report it.")
    return Unit(codec, len(data), len(payload), zlib.crc32(data)), payload


def _tensors(data: memoryview, name: str) -> list[Tensor]:
    """The tensors of an ONNX or a safetensors file; InputError if it is neither."""
    if len(data) < 9:
        raise InputError(f"{name!r} is {len(data)} bytes long: neither an ONNX nor a safetensors file.")
    if data[8] == ord("{") and int.from_bytes(data[:8], "little") <= len(data):
        if b'"lowbit"' in bytes(data[:64]):
            raise InputError(f"{name!r} is packed already.")
        return safetensors_tensors(data)
    if bytes(data[:4]) in (b"PK\x03\x04", b"\x80\x02}q", b"\x80\x02\x8a\n"):
        raise InputError(f"{name!r} is a pickle or a zip file, which is never opened; save it as safetensors or ONNX.")
    return onnx_tensors(bytes(data))


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
