"""The EAGLE network: what it computes from a token and the target's hidden state before it.

At text position t it reads the *pair* of f_t, the target's features there, and the token x_{t+1}, and gives the logits
of x_{t+2}, and the feature that stands in for f_{t+1} where the target's own is not known yet (EAGLE, arXiv:2401.15077;
EAGLE-3, arXiv:2503.01840). Its layers are transformers' own decoder layers, so it runs over a slot cache like any other
model. Knows nothing of trees, of training, and of files.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama as llama

from ...spec.target.given import cache_name
from ...spec.target.taps import HEAD, Tap, feature_sizes, linear_head, put_taps
from ...spec.target.weights import embedding_weight, head_rows, head_weight, linear_shape
from ..folder import target_identity
from ..known_tokens import check_vocabulary, places
from .layers import MASKS, SLIDING, WideLayer, attention_types, made_layers, rotary_embedding
from .settings import EagleSettings

_CACHE = cache_name()


class EagleNetwork(PreTrainedModel):
    """The network for one target. Width H, features F, embeddings E, vocabulary V of the target, V' known tokens.

    `vocabulary` (V',) are the ids that it drafts, ascending; None is all. Embeddings and LM head are the target's, on
    its memory where possible, or its own. A new network has transformers' initial weights, in float32."""

    _supports_sdpa = True
    base_model_prefix = ""
    vocabulary: Tensor  # (V',)
    index_of_token: Tensor  # (V,): the index of each token in `vocabulary`, V' for unknown ones
    embeddings: Tensor  # (V, E), stored only if they are its own

    def __init__(self, settings: EagleSettings, target: PreTrainedModel, vocabulary: Tensor | None = None):
        vocab_size, target_size = linear_shape(linear_head(target))
        put_taps(target, settings.taps)  # raises where it has no such layer
        config, layers = made_layers(settings.layer, vocab_size)
        super().__init__(config)
        self.target = target_identity(target)
        self.origin: dict | None = None  # the network that this one went on from, as `origin_of` describes it
        self.settings, self.vocab_size, size, eps = settings, vocab_size, config.hidden_size, config.rms_norm_eps
        rows = embedding_weight(target)
        if settings.own_embeddings:
            self.embeddings = nn.Parameter(torch.zeros(vocab_size, size))
        else:
            self.register_buffer("embeddings", rows, persistent=False)
        embedded = self.embeddings.shape[1]
        sizes = feature_sizes(target, settings.taps)
        self.tap_sizes = sizes

        def norm(width: int, wanted: bool) -> nn.Module:
            return llama.LlamaRMSNorm(width, eps) if wanted else nn.Identity()

        # A dictionary, as lists of modules are taken for stacks of layers.
        self.tap_norms = nn.ModuleDict({str(i): norm(width, settings.tap_norms) for i, width in enumerate(sizes)})
        self.fuse_norm = norm(sum(sizes), settings.fuse_norm)
        fuses = settings.fuse or sum(sizes) != size
        self.fuse = nn.Linear(sum(sizes), size, bias=False) if fuses else nn.Identity()
        self.embedding_norm = norm(embedded, settings.embedding_norm)
        self.feature_norm = norm(size, settings.feature_norm)
        self.join = None if settings.wide else nn.Linear(embedded + size, size, settings.join_bias)
        if settings.wide:
            layers[0] = WideLayer(layers[0], size, embedded, eps, settings.norm_before_residual)
        elif not settings.input_norm:
            layers[0].input_layernorm = nn.Identity()
        self.layers, self.attention_types = nn.ModuleList(layers), attention_types(config)
        self.rotary_emb: Any = rotary_embedding(settings.layer)
        self.norm = norm(size, settings.final_norm)
        self.trimmed = vocabulary is not None and len(vocabulary) < vocab_size
        ids = torch.arange(vocab_size) if vocabulary is None else vocabulary.cpu()
        check_vocabulary(ids, vocab_size)
        self.register_buffer("vocabulary", ids, persistent=self.trimmed)
        self.register_buffer("index_of_token", places(ids, vocab_size), persistent=False)
        self.lm_head = nn.Linear(size, len(ids), bias=False, device="meta")
        if settings.own_head:
            self.lm_head.weight = nn.Parameter(torch.zeros(len(ids), size))
        else:
            self._take_head(target, target_size)
        self.post_init()
        self.to(target.device)

    def _take_head(self, target: PreTrainedModel, target_size: int) -> None:
        size = self.config.hidden_size
        if size != target_size:
            raise ValueError(
                f"hidden_size={size} is not the target's {target_size}, so its LM head cannot be shared; set own_head"
            )
        rows = head_rows(target, self.vocabulary.to(target.device)) if self.trimmed else head_weight(target)
        bias = getattr(target.get_output_embeddings(), "bias", None)
        self.lm_head.weight = nn.Parameter(rows, requires_grad=False)
        if bias is not None:
            chosen = bias.detach()[self.vocabulary.to(bias.device)]
            self.lm_head.bias = nn.Parameter(chosen, requires_grad=False)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' initial weights for linear layers of this network; those of the target stay."""
        if isinstance(module, nn.Linear) and module is not self.lm_head:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Frequencies keep their precision, as in transformers' loading: rounded ones turn far positions wrongly."""
        frequencies = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, before in frequencies.items():
            setattr(self.rotary_emb, name, before.to(getattr(self.rotary_emb, name).device))
        return self

    @property
    def shares_head(self) -> bool:
        """Whether its LM head lies on the target's memory."""
        return not self.settings.own_head and not self.trimmed

    @property
    def feedback(self) -> Tap:
        """The tap of this network at which the feature that is fed back is read: (B, n, H)."""
        return HEAD if self.settings.norm_output or not self.settings.final_norm else self.config.num_hidden_layers - 1

    def adopt(self, settings: EagleSettings) -> None:
        """From now on follow `settings` that differ in what no tensor depends on: taps of the same sizes, rotary
        frequencies, and the residual of a wide layer."""
        if settings.layer.get("rope_parameters") != self.settings.layer.get("rope_parameters"):
            self.rotary_emb = rotary_embedding(settings.layer).to(self.device)
            self.config.rope_parameters = self.rotary_emb.config.rope_parameters
        first = self.layers[0]
        if isinstance(first, WideLayer):
            first.norm_before_residual = settings.norm_before_residual
        self.settings = settings

    def fused(self, features: Tensor) -> Tensor:  # (..., F) -> (..., H)
        """The target's features in the draft's width. Features that are fed back have it already."""
        return self.fuse(self.normed(features))

    def normed(self, features: Tensor) -> Tensor:  # (..., F) -> (..., F)
        """What `fuse` reads of the target's features."""
        states = features.split(self.tap_sizes, dim=-1)
        if self.settings.tap_norms:
            features = torch.cat([self.tap_norms[str(i)](state) for i, state in enumerate(states)], dim=-1)
        return self.fuse_norm(features)

    def inputs(self, input_ids: Tensor, features: Tensor) -> Tensor:  # (..., n), (..., n, H) -> (..., n, E + H)
        """Embeddings and features side by side, normalised: what `join`, or attention in wide layers, reads."""
        embedding = F.embedding(input_ids, self.embeddings).to(features.dtype)
        of_embedding, of_feature = self.embedding_norm, self.feature_norm
        if isinstance(first := self.layers[0], WideLayer):
            of_embedding, of_feature = first.input_layernorm, first.hidden_norm
        return torch.cat([of_embedding(embedding), of_feature(features)], dim=-1)

    def forward(
        self,
        input_ids: Tensor,  # (B, n): x_{t+1} of each pair
        features: Tensor,  # (B, n, H): f_t, fused, or fed back
        position_ids: Tensor,  # (B, n): t
        attention_mask: Any = None,  # (B, 1, n, keys), or what attention takes instead: of all layers
        cache: Any = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutput:
        """`logits` (B, n, V') of the token after each pair."""
        masks = self._masks(attention_mask, features, position_ids, cache)
        attention = {"position_embeddings": self.rotary_emb(features, position_ids), _CACHE: cache}
        if self.join is None:
            embedding = F.embedding(input_ids, self.embeddings).to(features.dtype)
            hidden = self.layers[0](features, embedding, attention_mask=masks[0], **attention)
        else:
            hidden = self.layers[0](self.join(self.inputs(input_ids, features)), attention_mask=masks[0], **attention)
        for layer, mask in zip(self.layers[1:], masks[1:]):
            hidden = layer(hidden, attention_mask=mask, **attention)
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)[:, -logits_to_keep:]))

    def _masks(self, given: Any, features: Tensor, position_ids: Tensor, cache: Any) -> list[Any]:
        """By layer: the mask that is given, or that of the layer's attention."""
        types = self.attention_types
        if given is not None:
            if SLIDING in types:
                raise ValueError(f"layer_types has {SLIDING!r}, which is for drafters of others; train without it")
            return [given] * len(types)
        text = {"inputs_embeds": features, "attention_mask": None, "position_ids": position_ids, _CACHE: cache}
        made = {kind: MASKS[kind](config=self.config, **text) for kind in dict.fromkeys(types)}
        return [made[kind] for kind in types]

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_input_embeddings(self) -> None:
        return None

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a folder keeps: all but the target's."""
        skipped = () if self.settings.own_head else ("lm_head.weight", "lm_head.bias")
        return {name: tensor for name, tensor in self.state_dict().items() if name not in skipped}
