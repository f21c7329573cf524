"""Repacking: the weights of a model written once, layer by layer, in the form in which they are streamed.

What is written stays: an attempt that was stopped goes on with the layer that it was at. Knows nothing of how the files
are read.
"""

import hashlib
import json
import shutil
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..console import Bar
from ..files import cache_folder
from ..target.weights import may_be_packed
from .forms import Device, write_blocks, write_panels
from .layout import FORMAT, FileWriter, StreamFolder, is_full, not_written
from .origin import Origin
from .record import StreamError
from .source import Source, layer_stack, path_of

RESIDENT, EMBEDDINGS = "resident", "embeddings"


def stamps(origin: Origin) -> list[list]:
    """By which a change of a model's files is seen."""
    return [[path.name, (about := path.stat()).st_size, about.st_mtime_ns] for path in origin.files]


def source_of(origin: Origin) -> str:
    """The folder or the file that a model is in."""
    folder, asked = origin.files[0].resolve().parent, Path(origin.asked.where)
    return str(folder / asked.name if asked.is_file() else folder)


def folder_of(origin: Origin, device: Device) -> StreamFolder:
    """The folder for a model in the form for a device: another one wherever its files, what its configuration makes of
    them, or what is written differ."""
    frame = origin.skeleton()
    shapes = [[name, list(tensor.shape)] for name, tensor in frame.state_dict().items()]
    written = [device.described, origin.asked.weights.name]
    tied = sorted(frame.all_tied_weights_keys.items())
    key = json.dumps([FORMAT, source_of(origin), stamps(origin), shapes, tied, written])
    return StreamFolder(cache_folder() / "streams" / hashlib.sha256(key.encode()).hexdigest()[:16])


def repacked(origin: Origin, folder: StreamFolder, device: Device, name: str) -> dict[str, Any]:
    """What stream.json says of a model, which is repacked first where the folder is not whole. Raises StreamError where
    the disk is, or becomes, too full, or the model's files change under way, and ValueError for a model that cannot be
    streamed."""
    if (said := folder.model()) is not None:
        return said
    with folder.locked():
        if (said := folder.model()) is not None:  # by another process, meanwhile
            return said
        files = stamps(origin)
        if folder_of(origin, device).path != folder.path:  # while another process was waited for
            raise _changed(origin)
        _check_room(origin, folder, device, name, folder.begin(source_of(origin), files))
        with ExitStack() as stack:
            try:
                source = stack.enter_context(origin.source(folder.path / "converted"))
            except Exception as error:
                if is_full(error):
                    raise not_written(folder.path / "converted", error) from error
                raise
            job = _Job(origin, files, source, device)
            names = [*job.layers, RESIDENT, EMBEDDINGS]
            with Bar(total=len(names), desc=f"repacking {name}", unit="file") as bar:
                for each in names:
                    if folder.record(each) is None:
                        folder.write(each, partial(job.fill, each))
                    bar.update()
            folder.finish({"layers": job.layers, "embeddings": job.table}, names)
    said = folder.model()
    if said is None:
        raise StreamError(f"{folder.path} does not keep what is written to it; set PACELINE_CACHE to another folder")
    return said


def _changed(origin: Origin) -> StreamError:
    return StreamError(f"{source_of(origin)} has changed while it was being repacked; load the model again")


def _check_room(origin: Origin, folder: StreamFolder, device: Device, name: str, old: list[StreamFolder]) -> None:
    """Say what repacking writes, and that `old` folders are of no use. Raises StreamError where there is no room."""
    written = sum(file.stat().st_size for file in folder.path.glob("*.bin"))
    needed, free = max(0, origin.bytes_repacked(device.in_panels) - written), shutil.disk_usage(folder.path).free
    line = f"repacking {name} for streaming: about {needed / 1e9:.2f} GB more in {folder.path}"
    print(f"{line} ({free / 1e9:.1f} GB are free)", file=sys.stderr)
    if old:
        paths, size = ", ".join(str(each.path) for each in old), sum(each.bytes for each in old)
        print(
            f"the model's files have changed: delete what was repacked before, {size / 1e9:.2f} GB: {paths}",
            file=sys.stderr,
        )
    if needed > free:
        raise StreamError(
            f"{folder.path} has room for {free / 1e9:.1f} GB and the repacked weights of {name} take another "
            f"{needed / 1e9:.1f}; make room, or set PACELINE_CACHE to a folder on another disk"
        )


class _Job:
    """What is written of a model."""

    def __init__(self, origin: Origin, files: list[list], source: Source, device: Device):
        self.origin, self.files = origin, files  # whose stamps these are to be
        self.source, self.device, self.frame = source, device, source.frame
        self.stack = layer_stack(self.frame)
        layers = self.frame.get_submodule(self.stack)
        assert isinstance(layers, nn.ModuleList)
        self.layers = {f"layer-{number:03}": f"{self.stack}.{number}" for number in range(len(layers))}
        embeddings = self.frame.get_input_embeddings()
        self.table = path_of(self.frame, embeddings) if isinstance(embeddings, nn.Embedding) else None
        self.head = path_of(self.frame, self.frame.get_output_embeddings())

    def fill(self, name: str, to: FileWriter) -> None:
        """Write the content of a file. Raises StreamError where the model cannot be read, or has changed."""
        try:
            if name == EMBEDDINGS:
                self._write_embeddings(to)
            elif name == RESIDENT:
                self._write_resident(to)
            else:
                self._write_layer(self.layers[name], to)
            if stamps(self.origin) != self.files:
                raise _changed(self.origin)
        except OSError as error:
            raise StreamError(
                f"{source_of(self.origin)} cannot be read ({error.strerror or error}); check the disk, and load the "
                "model again: what is repacked stays"
            ) from error

    def _kind(self, path: str, module: nn.Module) -> Literal["blocks", "panels"] | None:
        """The form in which a module is written; None where its parameters are written as they are."""
        if not may_be_packed(path, module):
            return None
        if self.source.in_blocks(path):
            return "blocks"
        return "panels" if self.device.in_panels else None

    def _write_layer(self, root: str, to: FileWriter) -> None:
        """The linear layers of a decoder layer, and what else is large there."""
        for inner, module in self.frame.get_submodule(root).named_modules():
            path = f"{root}.{inner}".removesuffix(".")
            if (kind := self._kind(path, module)) is not None:
                self._write_linear(path, kind, to)
                continue
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.ndim > 1:
                    to.put(name, self.source.read(name))

    def _write_linear(self, path: str, kind: str, to: FileWriter) -> None:
        if kind == "blocks":
            write_blocks(to, path, self.source.blocks(path).to(self.device.device))
        else:
            write_panels(to, path, self.frame.get_submodule(path), self.source, self._named(f"{path}.weight"))

    def _named(self, name: str) -> str:
        """The name by which the source has a parameter: a head that is tied to the embeddings has none of its own."""
        embeddings = self.frame.get_input_embeddings().weight
        if self.table is not None and name == f"{self.head}.weight" and self.frame.get_parameter(name) is embeddings:
            return f"{self.table}.weight"
        return name

    def _write_resident(self, to: FileWriter) -> None:
        """What is outside of the decoder layers, but for the embeddings, and what is small in them."""
        for path, module in self.frame.named_modules():
            inside, kind = path.startswith(f"{self.stack}."), self._kind(path, module)
            if kind is not None and not inside:
                self._write_linear(path, kind, to)
            for name, parameter in module.named_parameters(path, recurse=False):
                in_a_form = kind == "panels" or (kind == "blocks" and parameter.ndim > 1)
                in_a_file = path == self.table or (inside and parameter.ndim > 1)  # of its layer, or of embeddings
                if not in_a_form and not in_a_file:
                    to.put(name, self.source.read(self._named(name)))
        kept, buffers = self.frame.state_dict().keys(), dict(self.frame.named_buffers())
        for name in buffers.keys() & kept:
            to.put(name, self.source.read(name))
        for name, signs in self.source.signs().items():
            to.put(name, signs)

    def _write_embeddings(self, to: FileWriter) -> None:
        if self.table is None:
            return
        weight, name = self.frame.get_submodule(self.table).weight, f"{self.table}.weight"
        step = max(1, (1 << 24) // weight.shape[1])
        pieces = (
            self.source.rows(name, start, min(start + step, len(weight))) for start in range(0, len(weight), step)
        )
        to.put_rows(name, weight.dtype, tuple(weight.shape), pieces)
