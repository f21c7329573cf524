"""Published EAGLE heads as networks: EAGLE-1 and 2, EAGLE-3 and 3.1, whichever trainer wrote them.

What there is, how much and how wide is counted from the tensors; the config is asked for the rest. Knows nothing of
decoding, and not whether what the config says is true.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...spec.console import one_line
from ...spec.target.taps import HEAD, feature_sizes, linear_head
from ...spec.target.weights import embedding_weight, head_rows, head_weight, linear_shape
from ..eagle.network import EagleNetwork
from ..eagle.settings import EagleSettings
from .checkpoint import Checkpoint
from .conventions import Conventions, candidates
from .eagle_config import EagleConfig
from .eagle_names import OFFSETS, known_ids
from .eagle_tensors import EagleTensors, begins

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EagleFile:
    """A published head that has been read for a target."""

    def __init__(self, checkpoint: Checkpoint, target: "PreTrainedModel"):
        self.target = target
        self.config = EagleConfig(checkpoint.config(), checkpoint.name)
        self.vocab_size, self.target_size = linear_shape(linear_head(target))
        self.embedded = target.get_input_embeddings().weight.shape[1]
        self.tap_size = feature_sizes(target, (0,))[0]
        self.tensors = EagleTensors(checkpoint)

    def network(self) -> tuple[EagleNetwork, Conventions]:
        """The network in the target's dtype, on its device, and the conventions by which it may be read; it is made by
        the first. Raises ValueError, in one sentence, for what does not fit."""
        layer = self._layer()
        vocabulary = self._vocabulary()
        self._drop_copies(vocabulary)
        self._check_widths(layer["hidden_size"])
        conventions = candidates(self.config, self._settings(layer), self.target)
        try:
            network = EagleNetwork(conventions.tried[0].settings, self.target, vocabulary)
        except Exception as error:  # whatever transformers raises for a config
            raise self.tensors.refused(
                f"no network can be made of its config ({one_line(error)}); fetch the drafter again"
            ) from error
        if vocabulary is not None and network.trimmed:
            self.tensors["vocabulary"] = vocabulary
        self.tensors.check(network.stored())
        network.load_state_dict(self.tensors, strict=False)
        return network.to(self.target.dtype).requires_grad_(False).eval(), conventions

    def _settings(self, layer: dict[str, Any]) -> EagleSettings:
        """What the tensors tell; taps are numbered only."""
        has, flag = self.tensors.__contains__, self.config.flag
        stored: dict[str, Any] = {"own_embeddings": has("embeddings"), "own_head": has("lm_head.weight")}
        if not self.tensors.wide:
            return EagleSettings(
                layer, join_bias=has("join.bias"), input_norm=has("layers.0.input_layernorm.weight"),
                final_norm=has("norm.weight"), embedding_norm=has("embedding_norm.weight"), **stored,
            )  # fmt: skip
        fuses = has("fuse.weight")
        count = self.tensors["fuse.weight"].shape[1] // self.tap_size if fuses else 1
        return EagleSettings(
            layer, taps=range(count) if fuses else (HEAD,), wide=True, fuse=fuses,
            tap_norms=begins(self.tensors, "tap_norms.") or flag("fc_norm") is True,
            fuse_norm=has("fuse_norm.weight") or flag("norm_before_fc") is True,
            norm_output=flag("norm_output") is True, **stored,
        )  # fmt: skip

    def _layer(self) -> dict[str, Any]:
        """The config of the decoder layers, by the tensors of the first."""
        need, first = self.tensors.need, "layers.0.self_attn."
        queries, keys = (need(f"{first}{name}_proj.weight").shape[0] for name in ("q", "k"))
        size, inner = need(f"{first}o_proj.weight").shape[0], need("layers.0.mlp.gate_proj.weight").shape[0]
        normed = f"{first}q_norm.weight" in self.tensors
        heads = self._head_size(queries, keys, [need(f"{first}q_norm.weight", 1).shape[0]] if normed else [])
        numbers = {name.split(".")[1] for name in self.tensors if name.startswith("layers.")}
        biased = any(f"{first}{name}_proj.bias" in self.tensors for name in ("q", "k", "v", "o"))
        if biased:  # layers of Qwen2 have none behind attention
            for number in numbers:
                self.tensors.setdefault(f"layers.{number}.self_attn.o_proj.bias", torch.zeros(size))
        longest = self.config.number("max_position_embeddings"), _context(self.target)
        return {
            "model_type": "qwen3" if normed else "llama", "hidden_size": size, "intermediate_size": inner,
            "num_hidden_layers": len(numbers), "num_attention_heads": queries // heads,
            "num_key_value_heads": keys // heads, "head_dim": heads, "hidden_act": self.config.activation(),
            "rms_norm_eps": self.config.epsilon(), "attention_bias": biased,
            "mlp_bias": "layers.0.mlp.gate_proj.bias" in self.tensors, "rope_parameters": self.config.rope(),
            "max_position_embeddings": max(length or 2048 for length in longest), **self.config.windows(len(numbers)),
        }  # fmt: skip

    def _head_size(self, queries: int, keys: int, sizes: list[int]) -> int:
        """The size of an attention head: `sizes` if its norm tells, else what most fields of the config agree on, of
        what divides the projections."""
        fields = ("num_attention_heads", "num_key_value_heads", "head_dim")
        heads, groups, said = map(self.config.number, fields)
        declared = [heads and queries // heads, groups and keys // groups, said]
        fitting = [
            size for size in sizes or declared
            if size and not (size % 2 or queries % size or keys % size or (queries // size) % (keys // size))
        ]  # fmt: skip
        if not fitting:
            raise self.tensors.refused(
                f"projections of {queries} and {keys} rows are no whole number of attention heads by its config (its "
                f"num_attention_heads is {heads}, num_key_value_heads {groups}, head_dim {said}); fetch it again"
            )
        return max(fitting, key=fitting.count)

    def _vocabulary(self) -> Tensor | None:
        """The ids that it drafts, ascending; None for all. The head's rows are put into that order."""
        tensors, offsets = self.tensors, self.tensors.pop("vocabulary", None)
        stored = "lm_head.weight" in tensors
        rows = tensors.need("lm_head.weight").shape[0] if stored else self.vocab_size
        if offsets is None:
            if rows < self.vocab_size:
                raise tensors.refused(
                    f"its head has {rows} tokens and the target {self.vocab_size}, and without the tensor {OFFSETS!r} "
                    "nothing tells which these are; fetch the drafter again"
                )
            if rows > self.vocab_size:
                raise self._for_another(f"drafts {rows} tokens and this target has {self.vocab_size}")
            return None
        if offsets.ndim != 1 or offsets.is_floating_point() or offsets.dtype == torch.bool or not len(offsets):
            raise tensors.refused(f"tensor {OFFSETS!r} holds no offsets of tokens; fetch the drafter again")
        if stored and len(offsets) != rows:
            raise tensors.refused(
                f"tensor {OFFSETS!r} lists {len(offsets)} tokens and the head has {rows}; fetch the drafter again"
            )
        ids, order = known_ids(offsets).sort()
        if ids[0] < 0 or ids[-1] >= self.vocab_size:
            worst = int(ids[0] if ids[0] < 0 else ids[-1])
            raise self._for_another(f"drafts token {worst} and this target has {self.vocab_size}")
        if bool((ids[1:] == ids[:-1]).any()):
            raise tensors.refused(f"tensor {OFFSETS!r} lists a token twice; fetch the drafter again")
        if stored:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        return ids

    def _drop_copies(self, vocabulary: Tensor | None) -> None:
        """Take embeddings and LM head from the target where they are the same numbers, which saves their memory."""
        embeddings, head = self.tensors.get("embeddings"), self.tensors.get("lm_head.weight")
        if embeddings is not None and len(self.tensors.need("embeddings")) != self.vocab_size:
            raise self._for_another(f"embeds {len(embeddings)} tokens and this target has {self.vocab_size}")
        if embeddings is not None and self._same(embeddings, embedding_weight(self.target)):
            del self.tensors["embeddings"]
        biased = getattr(self.target.get_output_embeddings(), "bias", None) is not None
        if head is None or biased or head.shape[1] != self.target_size:
            return
        ids = None if vocabulary is None else vocabulary.to(self.target.device)
        if self._same(head, head_weight(self.target) if ids is None else head_rows(self.target, ids)):
            del self.tensors["lm_head.weight"]

    def _same(self, tensor: Tensor, other: Tensor) -> bool:
        return tensor.shape == other.shape and torch.equal(tensor.to(other.device, other.dtype), other)

    def _check_widths(self, size: int) -> None:
        """Raise ValueError for a head of another target's width; `size` is the head's own."""
        if not self.tensors.wide:
            rows, columns = self.tensors.need("join.weight").shape
            if columns != self.embedded + self.target_size or rows != self.target_size:
                name = self.tensors.published("join.weight")
                raise self._for_another(
                    f"has a tensor {name!r} of shape {[rows, columns]}, and this target's embeddings and states have "
                    f"{self.embedded} and {self.target_size} numbers"
                )
            return
        if "lm_head.weight" not in self.tensors and size != self.target_size:
            raise self._for_another(f"is {size} wide without an LM head, and this target's takes {self.target_size}")
        columns = self.tensors.need("layers.0.self_attn.q_proj.weight").shape[1]
        if "embeddings" not in self.tensors and self.embedded + size != columns == 2 * size:
            raise self._for_another(f"reads embeddings of {size} numbers and this target's have {self.embedded}")
        if "fuse.weight" not in self.tensors and size == self.target_size and self.config.reads_last_state():
            return
        columns = self.tensors.need("fuse.weight").shape[1]
        if columns % self.tap_size:
            raise self._for_another(f"reads states of {columns} numbers, no multiple of this target's {self.tap_size}")

    def _for_another(self, why: str) -> ValueError:
        verifier = self.config.verifier()
        named = f" ({verifier})" if verifier else ""
        return self.tensors.refused(f"it was made for another target{named}: it {why}; use one made for this target")


def _context(target: "PreTrainedModel") -> int | None:
    length = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    return length if type(length) is int else None
