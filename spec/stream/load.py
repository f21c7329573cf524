"""Loading a streamed model: repacked where it is not yet, put together from what stays in memory, and hooked to what is
fetched. Knows nothing of decoding.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from ..kernels.rotation import Rotation
from ..target.cache import bytes_per_token
from ..target.weights import refuse_casts, refuse_saving
from .budget import BUFFERS, bytes_of, free_bytes, place
from .disk import LayerFiles, Prefetcher
from .forms import Device, Parts, layer_of, nothing, put
from .host import CudaCopies, HostFeeder
from .layout import FileRecord, StreamFolder
from .origin import Asked, origin_of
from .reader import Reader, pages
from .record import Kind, StreamAbout
from .repack import EMBEDDINGS, RESIDENT, folder_of, repacked
from .rows import RowFile, look_up
from .streamer import Feeder, Streamer, activation_bytes, prompt_chunk, set_streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE = 0.5  # of the free memory that weights may take, where nothing is asked for


def load_streamed(
    asked: Asked,
    kind: Kind,
    resident: str | int | float | None,
    name: str,
    with_tokenizer: bool = False,
    buffers: int = BUFFERS,
) -> tuple["PreTrainedModel", Any]:
    """The model, in evaluation mode, its weights streamed from `kind`, with `resident` bytes of them in memory at most;
    and its tokenizer, which is loaded first, as it belongs to the memory that is announced. Says on stderr what is
    repacked, and what is where.

    Raises ValueError for what cannot be streamed, and StreamError where files cannot be written or read."""
    budget = None if resident is None else bytes_of(resident)
    origin = origin_of(asked)
    device = Device(asked.device, origin.dtype)
    folder = folder_of(origin, device)
    said = repacked(origin, folder, device, name)
    model, tokenizer = origin.skeleton(), origin.tokenizer() if with_tokenizer else None
    before = psutil.Process().memory_info().rss
    made = _Assembly(model, folder, said, asked.device)
    try:
        made.put_resident()
        budget = int(SHARE * free_bytes(asked.device)) if budget is None else budget
        streamer = made.streamed(budget, kind, buffers)
    except BaseException:
        made.reader.close()
        raise
    set_streamer(model.eval(), streamer)
    refuse_saving(model)
    refuse_casts(model)
    print(f"{name}: {_announced(model, streamer.about, made.records[RESIDENT].size, before)}", file=sys.stderr)
    return model, tokenizer


def _announced(model: "PreTrainedModel", about: StreamAbout, small: int, before: int) -> str:
    """What is where, in words; `before` is the memory of the process without any weights."""
    streamed = about.layers - about.resident_layers
    parts = [f"LM head, norms and biases {small / 1e6:.0f} MB"]
    if about.resident_layers:
        parts.append(f"{about.resident_layers} of {about.layers} layers")
    if streamed:
        parts.append(f"{about.buffers} buffers")
    fetched = (
        f"{streamed} layers of {about.layers}, {about.bytes_per_forward / 1e9:.2f} GB, are fetched from {about.kind}"
    )
    what = f"{fetched} for each forward" if streamed else "all layers stay in memory"
    if about.kind == "host":
        where, beside = "the GPU's memory", f"the host keeps {about.bytes_per_forward / 1e9:.2f} GB in its place"
    else:
        taken, reading = before + about.resident_bytes, prompt_chunk(model) * activation_bytes(model)
        where, beside = "memory", f"with them this process takes about {taken / 1e9:.2f} GB"
        beside += f", {(taken + reading) / 1e9:.2f} GB while a long prompt is read"
        beside += f", and {bytes_per_token(model) / 1e3:.0f} MB more for every 1,000 tokens"
    return f"{what}; in {where} are {about.resident_bytes / 1e6:.0f} MB of weights ({', '.join(parts)}), {beside}"


def checked_kind(kind: str, device: torch.device) -> Kind:
    """`kind`; raises ValueError for a place that weights cannot be streamed from, to this device."""
    if kind not in ("disk", "host"):
        raise ValueError(f"stream={kind!r} is no place to stream from; use 'disk', or on CUDA 'host'")
    if kind == "host" and device.type != "cuda":
        raise ValueError("stream='host' is for a GPU, whose weights wait in the host's memory; on a CPU use 'disk'")
    if kind == "disk" and device.type != "cpu":
        remedy = "stream='host'" if device.type == "cuda" else "device='cpu'"
        raise ValueError(f"stream='disk' is for a CPU and the device is {device}; use {remedy}")
    return "host" if kind == "host" else "disk"


def _check_free(needed: int, device: torch.device) -> None:
    """Raise ValueError where the memory of the device does not hold `needed` bytes."""
    if needed > (free := free_bytes(device)):
        raise ValueError(
            f"resident layers and buffers would take another {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            f"are free on {device}; allow fewer bytes by resident="
        )


def check_host(needed: int) -> None:
    """Raise ValueError where the host's memory does not hold `needed` bytes."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"stream='host' keeps {needed / 1e9:.1f} GB of weights in the host's memory, of which {free / 1e9:.1f} GB "
            "are free; allow more resident layers, or load it in fewer bits"
        )


class _Assembly:
    """A model without weights, and the folder that has them."""

    def __init__(self, model: "PreTrainedModel", folder: StreamFolder, said: Mapping[str, Any], device: torch.device):
        self.model, self.folder, self.said, self.device = model, folder, said, device
        self.reader = Reader()
        records = {name: folder.record(name) for name in (*said["layers"], RESIDENT, EMBEDDINGS)}
        self.records: dict[str, FileRecord] = {name: each for name, each in records.items() if each is not None}
        self.small: dict[str, Tensor] = {}  # what stays in memory, by name

    def put_resident(self) -> None:
        """Fill in what stays in memory, and let the embeddings look their rows up."""
        for module in self.model.modules():  # of these no weights are stored
            module._buffers.update(
                {name: each.to(self.device) for name, each in module._buffers.items() if each is not None}
            )
        self.small = self.records[RESIDENT].of(self._read(RESIDENT))
        self._put_layers(RESIDENT, self.small)
        if (table := self.said["embeddings"]) is not None:
            [(name, stored)] = self.records[EMBEDDINGS].tensors.items()
            embeddings = self.model.get_submodule(table)
            assert isinstance(embeddings, nn.Embedding)
            self._assign(name, nothing(stored, self.device))
            path, record = self.folder.file(EMBEDDINGS), self.records[EMBEDDINGS]
            look_up(embeddings, RowFile(path, record.size, stored))
            self.reader.verify(path, record.size, record.sums)

    def _read(self, name: str) -> Tensor:
        """The content of a file, in memory of the device."""
        record = self.records[name]
        memory = pages(record.size)
        self.reader.read(self.folder.file(name), record.sums, memory)
        return memory.to(self.device)

    def _put_layers(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Make the linear layers of a file that are in a form, and assign all other parameters in it."""
        forms = self.records[name].forms
        for path, form in forms.items():
            block = form.get("rotation")
            rotation = None if block is None else Rotation(self.small[f"signs.{form['inputs']}"], block)
            parts = {each: tensors[f"{path}.{each}"] for each in form["parts"]}
            self.model.set_submodule(path, layer_of(form, parts, self.small.get(f"{path}.bias"), rotation))
        for each, tensor in tensors.items():
            if each.rpartition(".")[0] not in forms and not each.startswith("signs."):
                self._assign(each, tensor)

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        if last in module._buffers:
            module._buffers[last] = tensor
        else:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)

    def streamed(self, budget: int, kind: Kind, buffers: int) -> Streamer:
        """Let the layers that do not fit into `budget` bytes be fetched, and read all others."""
        names = list(self.said["layers"])
        records = [self.records[name] for name in names]
        placed = place([record.size for record in records], self.records[RESIDENT].size, budget, buffers)
        _check_free(placed.bytes - self.records[RESIDENT].size, self.device)
        blanks = [{name: nothing(stored, self.device) for name, stored in each.tensors.items()} for each in records]
        for name, blank in zip(names, blanks):
            self._put_layers(name, blank)
        for number in placed.resident:
            for module, parts in self._parts(records[number].of(self._read(names[number]))).items():
                put(module, parts)
        layers = [self.model.get_submodule(path) for path in self.said["layers"].values()]
        chosen = [names[number] for number in placed.streamed]
        largest = max((self.records[name].size for name in chosen), default=0)
        memory = [self._memory(largest) for _ in range(placed.buffers)]
        tables = [[self._parts(self.records[name].of(buffer)) for name in chosen] for buffer in memory]
        between = [self._parts(blanks[number]) for number in placed.streamed]
        fetched, direct = sum(self.records[name].size for name in chosen), self.reader.direct
        about = StreamAbout(kind, len(names), len(placed.resident), fetched, placed.bytes, placed.buffers, direct)
        feeder = self._feeder(chosen, memory, kind) if chosen else None  # last: it begins to fetch
        if not chosen:
            self.reader.close()
        hooked = [layers[number] for number in placed.streamed]
        return Streamer(hooked, layers[0], tables, between, feeder, about, self.folder)

    def _parts(self, tensors: dict[str, Tensor]) -> dict[nn.Module, Parts]:
        """With what each module of a layer computes where the layer's tensors are these."""
        grouped: dict[nn.Module, Parts] = {}
        for each, tensor in tensors.items():
            path, _, last = each.rpartition(".")
            grouped.setdefault(self.model.get_submodule(path), {})[last] = tensor
        return grouped

    def _memory(self, size: int) -> Tensor:
        """A buffer."""
        if self.device.type == "cpu":
            return pages(size)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _feeder(self, names: list[str], memory: list[Tensor], kind: Kind) -> Feeder:
        """What fetches the layers of some files into buffers."""
        files = [(self.folder.file(name), self.records[name]) for name in names]
        if kind == "disk":
            return Prefetcher(LayerFiles(self.reader, files, memory))
        check_host(sum(record.size for _, record in files))
        layers = [pages(record.size) for _, record in files]
        for (path, record), layer in zip(files, layers):
            self.reader.read(path, record.sums, layer)
        self.reader.close()
        return HostFeeder(len(layers), len(memory), CudaCopies(layers, memory))
