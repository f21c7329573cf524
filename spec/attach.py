"""Attaching a target: a numerical self-test decides whether a model can be decoded with trees.

A tiny tree, two rows of different length, a step, a commit of a branch and a second step are compared
with cache-less forwards of the same paths. That finds every model whose attention does not follow the
positions and masks it is given, without a list of names.
"""

import weakref

import torch
from torch import Tensor

from .masks import HOOKED
from .slots import SlotModel
from .tree import TokenTree, TreeShape

# Relative root-mean-square error of the logits that rounding may cause; a wrong mask costs far more.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
_SHAPE = TreeShape((-1, 0, 0, 1, 1, 2, 4))
_attached: "weakref.WeakKeyDictionary[torch.nn.Module, set]" = weakref.WeakKeyDictionary()


def attach(model) -> None:
    """Check once that `model` can be a target or a draft model.

    Raises ValueError, in one sentence, for a model that cannot: its kind, its attention implementation,
    or how far its tree logits are from the true ones.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; Paceline decodes causal models only")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state, which cannot be rolled back to an accepted path; "
            "use a model whose layers are all attention"
        )
    config = model.config.get_text_config()
    if config.model_type in ("bloom", "mpt", "gpt_neo") or getattr(config, "alibi", False):
        # The self-test finds them in float32; in lower precision the error can hide in the rounding.
        raise ValueError(
            f"{name} cannot be decoded with trees: its attention takes a token's place in the cache for its position; "
            "use a model with rotary or learned positions"
        )
    attention = config._attn_implementation
    if attention not in HOOKED:
        raise ValueError(
            f"{name} runs {attention} attention, which takes no tree masks; load it with "
            f"attn_implementation='sdpa' (or 'eager')"
        )
    if model.training:
        raise ValueError(f"{name} is in training mode, where dropout changes the text; call model.eval()")
    tested = _attached.setdefault(model, set())
    if (model.dtype, attention) in tested:
        return
    error = self_test(model)
    if error != error:
        raise ValueError(f"{name} gives NaN logits; check its weights and dtype")
    if error > TOLERANCE.get(model.dtype, 0.1):
        raise ValueError(
            f"{name} cannot be decoded with trees: its attention does not follow the positions and masks it is "
            f"given (relative error {error:.2g} on a small tree); use a model with rotary or learned positions"
        )
    tested.add((model.dtype, attention))


@torch.no_grad()
def self_test(model) -> float:
    """The relative error of tree logits against cache-less forwards over two steps: the largest over the paths,
    or the median in low precision, where rounding may send a token to another expert. NaN if any is NaN.

    Raises ValueError with the model's own message where the forward does not run at all."""
    try:
        errors = torch.tensor(_errors(model))
        return float(errors.max() if model.dtype in (torch.float32, torch.float64) else errors.median())
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{type(model).__name__} cannot be decoded with trees: it does not run with explicit positions and a slot "
            f"cache ({type(error).__name__}: {first[0] if first else ''}); use a model with rotary or learned positions"
        ) from error


def _errors(model) -> list[float]:
    config = model.config.get_text_config()
    device = model.device
    tree = TokenTree.of(_SHAPE, device)
    texts = [_some_tokens(config.vocab_size, 7, 1), _some_tokens(config.vocab_size, 4, 2)]
    width = max(map(len, texts))
    lengths = torch.tensor([len(text) for text in texts], device=device)
    prompt = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    slots = SlotModel(model, capacity=width + 3 * len(_SHAPE))
    slots.prefill(prompt, lengths, chunk=4)
    base = lengths - 1
    errors = []
    paths = ((0, 1, 4, 6), (0, 2, 5, 5)), ((0, 1, 3, 3), (0, 1, 4, 6))  # [step][row]
    for number, chosen in enumerate(paths):
        drafted = torch.tensor(
            [[text[-1], *_some_tokens(config.vocab_size, len(_SHAPE) - 1, 5 + number)] for text in texts],
            device=device,
        )
        logits = slots.forward_nodes(drafted, base, tree)
        path = torch.tensor(chosen, device=device)
        slots.cache.compact(base, path)
        for row, text in enumerate(texts):
            errors += [_error(model, text, drafted[row], path, logits[row]) for path in _leaf_paths()]
            nodes = list(dict.fromkeys(chosen[row][1:]))
            text += drafted[row, nodes].tolist() + _some_tokens(config.vocab_size, 1, 9)
            base[row] = len(text) - 1
    return errors


def _some_tokens(vocab: int, count: int, start: int) -> list[int]:
    """Different small token ids that every vocabulary has."""
    return [(start * 31 + i * 17) % min(vocab, 997) for i in range(count)]


def _leaf_paths() -> list[list[int]]:
    leaves = [node for node, children in enumerate(_SHAPE.children) if not children]
    paths = []
    for leaf in leaves:
        path = [leaf]
        while _SHAPE.parents[path[0]] >= 0:
            path.insert(0, _SHAPE.parents[path[0]])
        paths.append(path)
    return paths


def _error(model, text: list[int], drafted: Tensor, path: list[int], logits: Tensor) -> float:
    """Relative error of the nodes of one path, whose root is the last token of `text`."""
    ids = torch.tensor([[*text[:-1], *drafted[path].tolist()]], device=drafted.device)
    truth = model(input_ids=ids, use_cache=False).logits[0, -len(path) :].float()
    spread = (truth - truth.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((logits[path] - truth).square().mean(-1).sqrt().max() / spread.clamp(min=1e-12))
