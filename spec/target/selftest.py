"""Attaching a target: a numerical self-test decides whether a model can be decoded with trees.

Two steps with a small tree, on two rows of different length and with a commit of a branch between them, are compared
with forwards of the same paths without cache; where layers keep states, behind a step in which one row is done. So
models whose attention does not follow the positions and masks that it is given are found by their numbers; three
families whose error can hide in rounding are refused by name besides. The test runs outside of autocast. Before an
error is put down to attention, a text alone is compared with the same text beside another one, without any cache: in
models with quantised activations these differ too.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..console import waiting
from ..kernels.cpu import level
from ..provenance import versions
from ..recurrent import hooks
from ..stream.record import StreamError
from ..stream.streamer import Streamer, streamer_of
from ..tree import TokenTree, TreeShape
from .masks import HOOKED
from .protocol import spans
from .slots import SlotModel

# Relative root-mean-square error of the logits that rounding may cause; a wrong mask costs far more.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
UNSTEADY = 0.5  # relative difference of plain forwards above which the test cannot decide
FORWARDS = 16  # that the test does
_SHAPE = TreeShape((-1, 0, 0, 1, 1, 2, 4))
_attached: "weakref.WeakKeyDictionary[torch.nn.Module, set]" = weakref.WeakKeyDictionary()


class Unsteady(UserWarning):
    """A model whose logits depend on what else is in the batch."""


def attach(model: PreTrainedModel) -> None:
    """Check, once per model, dtype, attention and device, that `model` can be a target or a draft model.

    Of a streamed model, of which each of the test's forwards reads all weights, it is kept beside the weights that the
    test was passed. Raises ValueError for an unsuitable kind of model, attention implementation or device of the
    weights, and where the self-test fails. Warns where the model's logits depend on the rest of the batch.
    """
    check_kind(model)
    if model.training:
        name = type(model).__name__
        raise ValueError(f"{name} is in training mode, where dropout changes the text; call model.eval()")
    tested = _attached.setdefault(model, set())
    condition = model.dtype, model.config.get_text_config()._attn_implementation, model.device
    if condition not in tested:
        _check_weights(model)
        if (streamer := streamer_of(model)) is None:
            _judge(model, self_test(model))
        else:
            _test_streamed(model, streamer, " ".join(map(str, (*condition, *versions().values(), level()))))
        tested.add(condition)


def _test_streamed(model: PreTrainedModel, streamer: Streamer, key: str) -> None:
    if streamer.folder.tested(key):
        return
    fetched = FORWARDS * streamer.about.bytes_per_forward / 1e9
    with waiting(f"testing the streamed model, once, in {FORWARDS} forwards that fetch {fetched:.1f} GB"):
        error = self_test(model)
    _judge(model, error)
    if error <= TOLERANCE.get(model.dtype, 0.1):
        streamer.folder.keep_test(key)


def check_kind(model: PreTrainedModel) -> None:
    """Raise ValueError for a kind of model or an attention implementation that cannot be decoded with trees."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; Paceline decodes causal models only")
    if hooks.keeps_others(model):
        raise ValueError(
            f"{name} keeps a recurrent state by none of the rules that can be rolled back to an accepted path here; "
            "use a model whose layers are attention, short convolutions, gated delta rules, Mamba or Mamba-2"
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


def _check_weights(model: PreTrainedModel) -> None:
    """Raise ValueError for a model on the meta device, and for one whose weights are offloaded."""
    name = type(model).__name__
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not hooked and any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError(
            f"{name} has weights on the meta device, which hold no numbers; load the model with from_pretrained, or "
            "give it numbers with to_empty and load_state_dict"
        )
    if model.device.type == "meta":
        raise ValueError(
            f"the weights of {name} are offloaded and fetched for every forward, by hooks of accelerate, so that it "
            "has no device to decode on; load it onto one device, in a smaller dtype or quantised where it does not fit"
        )


def _judge(model: PreTrainedModel, error: float) -> None:
    """Raise ValueError where the self-test's `error` is too large, unless plain forwards differ as much."""
    name, allowed = type(model).__name__, TOLERANCE.get(model.dtype, 0.1)
    if error != error:
        raise ValueError(f"{name} gives NaN logits; check its weights and dtype")
    if error <= allowed:
        return
    noise = unsteadiness(model)
    if noise > UNSTEADY:
        raise ValueError(
            f"{name} gives other logits for the same tokens when another text is in the batch (relative difference "
            f"{noise:.2g}), so that its trees cannot be checked; use weights in which activations are not quantised"
        )
    if error > max(allowed, 2 * noise):
        raise ValueError(
            f"{name} cannot be decoded with trees: its attention does not follow the positions and masks it is "
            f"given (relative error {error:.2g} on a small tree); use a model with rotary or learned positions"
        )
    warnings.warn(
        f"{name} gives other logits for the same tokens when another text is in the batch (relative difference "
        f"{noise:.2g}): a drafted text may part from the plain one wherever two tokens are as close",
        Unsteady,
        stacklevel=4,
    )


@torch.no_grad()
def self_test(model: PreTrainedModel) -> float:
    """The relative error of tree logits against forwards without cache, over two steps: the largest over all paths; in
    low precision, where rounding may route a token to another expert, the median. NaN if any is NaN.

    Raises ValueError with the model's own message where the forward does not run at all."""
    with _plain_arithmetic(model):
        try:
            return _worst(model, _errors(model))
        except (torch.OutOfMemoryError, StreamError):
            raise
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            name, reason = type(model).__name__, _first_line(error)
            _check_forward(model)
            raise ValueError(
                f"{name} cannot be decoded with trees: it does not run with explicit positions and a slot cache "
                f"({reason}); use a model with rotary or learned positions"
            ) from error


@torch.no_grad()
def unsteadiness(model: PreTrainedModel) -> float:
    """The relative difference of logits between plain forwards of a text alone and with another text in the batch,
    over several texts as in the self-test. Without explicit positions, masks or a cache."""
    with _plain_arithmetic(model):
        return _worst(model, _differences(model))


@contextmanager
def _plain_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the caller's autocast within the block."""
    with ExitStack() as stack:
        for kind in {"cpu", model.device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _worst(model: PreTrainedModel, errors: list[float]) -> float:
    numbers = torch.tensor(errors, device="cpu")
    return float(numbers.max() if model.dtype in (torch.float32, torch.float64) else numbers.median())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_forward(model: PreTrainedModel) -> None:
    """Raise ValueError where not even a plain forward runs, so that trees are not blamed for it."""
    vocab = model.config.get_text_config().vocab_size
    try:
        model(input_ids=torch.tensor([_some_tokens(vocab, 4, 1)], device=model.device), use_cache=False).logits  # noqa: B018
    except StreamError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run a plain forward of four tokens ({_first_line(error)}); check its "
            "weights, its device and the versions of what it was made with"
        ) from error


def _differences(model: PreTrainedModel) -> list[float]:
    vocab = model.config.get_text_config().vocab_size
    differences = []
    for start in range(4):
        for width in (11, 7, 4):
            texts = [_some_tokens(vocab, width, start), _some_tokens(vocab, width, start + 6)]
            ids = torch.tensor(texts, device=model.device)
            pair, alone = (_plain_logits(model, part) for part in (ids, ids[:1]))
            differences.append(_relative(pair[0], alone[0]))
    return differences


def _plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:  # (B, n) -> (B, n, V)
    return model(input_ids=ids, use_cache=False).logits.float()


def _errors(model: PreTrainedModel) -> list[float]:
    config = model.config.get_text_config()
    device = model.device
    tree = TokenTree.of(_SHAPE, device)
    texts = [_some_tokens(config.vocab_size, 7, 1), _some_tokens(config.vocab_size, 4, 2)]
    width = max(map(len, texts))
    lengths = torch.tensor([len(text) for text in texts], device=device)
    prompt = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    slots = SlotModel(model, len(texts), capacity=width + 3 * len(_SHAPE))
    for span in spans(prompt, lengths, chunk=4):
        slots.read(span)
    base = lengths - 1
    if slots.cache.states is not None:  # of which a row that is done holds no trace while another goes on
        tokens = _some_tokens(config.vocab_size, len(_SHAPE) - 1, 4)
        slots.forward_nodes(torch.tensor([[text[-1], *tokens] for text in texts], device=device), base, tree)
        slots.commit(base, base.new_tensor([[0] * 4, [0, 1, 1, 1]]), base.new_tensor([0, 2]))
        texts[1] += [tokens[0], *_some_tokens(config.vocab_size, 1, 8)]
        base[1] = len(texts[1]) - 1
    errors = []
    paths = ((0, 1, 4, 6), (0, 2, 5, 5)), ((0, 1, 3, 3), (0, 1, 4, 6))  # [step][row]
    for number, chosen in enumerate(paths):
        drafted = torch.tensor(
            [[text[-1], *_some_tokens(config.vocab_size, len(_SHAPE) - 1, 5 + number)] for text in texts],
            device=device,
        )
        logits = slots.forward_nodes(drafted, base, tree).logits
        path = torch.tensor(chosen, device=device)
        count = torch.tensor([len(set(nodes)) for nodes in chosen], device=device)
        slots.commit(base, path, count)
        for row, text in enumerate(texts):
            errors += [_error(model, text, drafted[row], path, logits[row]) for path in _leaf_paths()]
            nodes = list(dict.fromkeys(chosen[row][1:]))
            text += drafted[row, nodes].tolist() + _some_tokens(config.vocab_size, 1, 9)
            base[row] = len(text) - 1
    return errors


def _some_tokens(vocab: int, count: int, start: int) -> list[int]:
    """`count` different token ids, small enough for every vocabulary."""
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


def _error(model: PreTrainedModel, text: list[int], drafted: Tensor, path: list[int], logits: Tensor) -> float:
    """Relative error of the nodes of one path, whose root is the last token of `text`."""
    ids = torch.tensor([[*text[:-1], *drafted[path].tolist()]], device=drafted.device)
    return _relative(logits[path], _plain_logits(model, ids)[0, -len(path) :])


def _relative(logits: Tensor, truth: Tensor) -> float:
    """The largest RMS difference of a node's logits (n, V), relative to the standard deviation of `truth`."""
    spread = (truth - truth.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((logits - truth).square().mean(-1).sqrt().max() / spread.clamp(min=1e-12))
