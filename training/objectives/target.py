"""The frozen target in training: its hidden states on a batch, computed when needed or read from disk.

Hidden states are taken by the taps that decoding uses too. Documents of a pack do not see each other
(tests/training_objectives/test_target_view.py). Knows nothing of objectives.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...spec.console import Bar
from ...spec.files import whole
from ...spec.target.taps import HEAD, Tap, feature_sizes, hidden_states
from ...spec.target.weights import dense_weight
from .objective import TargetView

ROWS_PER_FILE = 64
BITS = (8, 16)  # of a number on disk: 16 as the model computes it, 8 in float8 with a scale for each token
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class ScaledHead(nn.Module):
    """An LM head whose logits are scaled (Cohere, Granite) or soft-capped (Gemma 2)."""

    def __init__(self, linear: nn.Module, factor: float, cap: float | None):
        super().__init__()
        self.linear, self.factor, self.cap = linear, factor, cap

    @property
    def weight(self) -> Tensor:
        return dense_weight(self.linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scaled(self.linear(hidden))

    def scaled(self, logits: Tensor) -> Tensor:
        logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@torch.no_grad()
def logit_head(model) -> nn.Module:
    """The module that turns last hidden states (..., H) into the model's logits (..., V).

    Raises ValueError where the model computes its logits in another way."""
    linear = model.get_output_embeddings()
    name = type(model).__name__
    if linear is None:
        raise ValueError(f"{name} has no LM head; drafters are trained for causal language models")
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    head = linear if factor == 1 and cap is None else ScaledHead(linear, factor, cap)
    ids = torch.arange(4, device=model.device)[None] % config.vocab_size
    positions = torch.arange(4, device=model.device)[None]
    training = model.training
    model.eval()
    head_logits = head(hidden_states(model, (HEAD,), ids, positions)[HEAD]).float()
    model_logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    model.train(training)
    error = (head_logits - model_logits).square().mean().sqrt() / model_logits.std().clamp(min=1e-12)
    if not error < (1e-3 if model.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"{name}: its LM head on its last hidden state gives other logits than its own (relative error "
            f"{float(error):.2g}), so no drafter can be trained from it"
        )
    return head


class OnlineTarget:
    """Runs the frozen model on every batch and takes the hidden states at `taps`. Not part of the wrapped module."""

    def __init__(self, model, taps: tuple[Tap, ...] = (HEAD,)):
        self.model, self.taps = model.eval().requires_grad_(False), taps
        self.lm_head = logit_head(model)

    @torch.no_grad()
    def view(self, batch: dict[str, Tensor], split: str, rows: list[int]) -> TargetView:
        return TargetView(hidden_states(self.model, self.taps, batch["input_ids"], batch["position_ids"]), self.lm_head)


class OfflineTarget:
    """Reads what `write_hidden_states` wrote for `taps`; of the model only the LM head is needed."""

    def __init__(self, folder: str | Path, head: nn.Module, taps: tuple[Tap, ...] = (HEAD,)):
        self.folder, self.taps = Path(folder), taps
        self.lm_head = head.requires_grad_(False)

    def view(self, batch: dict[str, Tensor], split: str, rows: list[int]) -> TargetView:
        device, read = batch["input_ids"].device, [self._row(split, row) for row in rows]
        hidden = {tap: torch.stack([states[tap] for states in read]).to(device) for tap in self.taps}  # (B, T, H) each
        return TargetView(hidden, self.lm_head)

    def _row(self, split: str, row: int) -> dict[Tap, Tensor]:
        path = _file(self.folder, split, row)
        try:
            with safe_open(path, framework="pt") as file:
                return {tap: self._states(file, _name(tap), row % ROWS_PER_FILE) for tap in self.taps}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no hidden states ({error}); delete it and start again") from error

    @staticmethod
    def _states(file, name: str, row: int) -> Tensor:  # (T, H)
        states = file.get_slice(name)[row]
        if f"{name}.scale" not in file.keys():  # noqa: SIM118
            return states
        scale = file.get_slice(f"{name}.scale")[row]  # (T, 1), in the dtype of the model
        return (states.float() * scale.float()).to(scale.dtype)


def hidden_bytes(model, taps: tuple[Tap, ...], rows: int, length: int, bits: int = 16) -> int:
    """The disk that the hidden states of `rows` packs of `length` tokens take."""
    sizes, each = feature_sizes(model, taps), model.dtype.itemsize
    return rows * length * (sum(sizes) * each if bits == 16 else sum(sizes) + len(sizes) * each)


def hidden_folder(model_name: str, dtype: torch.dtype, taps: tuple[Tap, ...], bits: int = 16) -> str:
    """What the folder of hidden states of a target (its fingerprint) is called."""
    named = "" if taps == (HEAD,) else "-taps-" + "-".join(map(str, taps))
    return f"hidden-{model_name[:12]}-{str(dtype).removeprefix('torch.')}{named}{'' if bits == 16 else '-8bits'}"


def write_hidden_states(
    model,
    split: str,
    data,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    batch: int = 8,
    taps: tuple[Tap, ...] = (HEAD,),
    bits: int = 16,
) -> None:
    """Write the hidden states of all rows of `data` (a `Rows`), one safetensors file for every 64 of them, with one of
    `BITS`. In 8 bits each number is off by 2 to 3 per cent of itself.

    Files appear whole or not at all, and those that are there are kept, so that a killed run goes on where it
    was. With several processes each writes its share. Raises ValueError where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(rank * ROWS_PER_FILE, len(data), ranks * ROWS_PER_FILE)
    with Bar(starts, desc=f"hidden states, {split}", unit="file", disable=None if rank == 0 else True) as bar:
        for start in bar:
            path = _file(folder, split, start)
            if path.exists():
                continue
            packs = data.batch(list(range(start, min(start + ROWS_PER_FILE, len(data)))))
            hidden = _document_by_document(model, taps, packs, batch * data.length)
            try:
                with whole(path) as unfinished:
                    save_file(_tensors(hidden, bits), unfinished)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"hidden states cannot be written to {folder} ({error}); free some space") from error


@torch.no_grad()
def _document_by_document(model, taps: tuple[Tap, ...], packs: dict[str, Tensor], most: int) -> dict[Tap, Tensor]:
    """The hidden states (B, T, H) of packed rows on the CPU, padding left zero. Documents of like lengths go
    through the model side by side, `most` tokens at a time: in a pack, most of what attention computes would be
    between documents, and masked."""
    real = packs["document"] >= 0  # (B, T)
    pieces = (packs["position_ids"][real] == 0).cumsum(0) - 1  # of each real token, row by row
    texts = packs["input_ids"][real].split(pieces.bincount().tolist())
    hidden: dict[Tap, list[Tensor]] = {tap: [torch.empty(0)] * len(texts) for tap in taps}
    waiting = sorted(range(len(texts)), key=lambda piece: (-len(texts[piece]), piece))
    while waiting:
        count = max(1, most // len(texts[waiting[0]]))
        together, waiting = waiting[:count], waiting[count:]
        ids = pad_sequence([texts[piece] for piece in together], batch_first=True).to(model.device)
        positions = torch.arange(ids.shape[1], device=model.device).expand(len(ids), -1)
        for tap, states in hidden_states(model, taps, ids, positions).items():
            for piece, row in zip(together, states.cpu()):
                hidden[tap][piece] = row[: len(texts[piece])]  # causal attention did not see the padding after it
    packed = {}
    for tap, pieces_of in hidden.items():
        states = torch.cat(pieces_of)  # (n, H)
        packed[tap] = states.new_zeros(*real.shape, states.shape[1]).masked_scatter(real[..., None], states)
    return packed


def _tensors(hidden: dict[Tap, Tensor], bits: int) -> dict[str, Tensor]:
    """What a file holds of the states (B, T, H)."""
    tensors = {_name(tap): states for tap, states in hidden.items()}
    if bits == 16:
        return tensors
    scales = {name: (states.abs().amax(-1, keepdim=True) / _LARGEST) for name, states in tensors.items()}  # (B, T, 1)
    rounded = {
        name: (states.float() / scales[name].float().clamp(min=1e-30)).clamp(-_LARGEST, _LARGEST)
        for name, states in tensors.items()
    }
    small = {name: states.to(torch.float8_e4m3fn) for name, states in rounded.items()}
    return {**small, **{f"{name}.scale": scale for name, scale in scales.items()}}


def _name(tap: Tap) -> str:
    """Of a tap's tensor in a file."""
    return "hidden" if tap == HEAD else f"layer_{tap}"


def _file(folder: Path, split: str, row: int) -> Path:
    return folder / f"{split}-{row // ROWS_PER_FILE:06d}.safetensors"
