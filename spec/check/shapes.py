"""Models to check with: well-known shapes with random weights, made on the device without any download.

A shape is the published configuration of a model. Weights are drawn so that activations and logits are about as large
as in a trained model: the logits have a standard deviation of 3, so that near-ties are about as rare as in real texts.
The texts are meaningless, but timings and comparisons of texts are valid.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..console import one_line
from ..kernels.cpu import emulates_bfloat16
from ..stream.budget import free_bytes
from ..target.gguf_file import GgufError, GgufFile
from ..target.gguf_model import gguf_config
from ..target.load import load_target
from ..target.sources import resolve

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict] = {
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
        tie_word_embeddings=True, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, rms_norm_eps=1e-5,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256,
    ),
    "llama-3.1-8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        tie_word_embeddings=False, rope_parameters={**LLAMA3_ROPE, "factor": 8.0}, rms_norm_eps=1e-5,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    # No published model: Mixtral's architecture in a size for any machine.
    "mixtral-tiny": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=8192, sliding_window=None,
    ),
}  # fmt: skip
# sdpa has no soft caps on attention scores, and transformers would leave them out.
ATTENTION = {"gemma-2-2b": "eager"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SPREAD = 3.0  # standard deviation of the logits
_BLOCK = 4_194_301  # random numbers drawn and then repeated; a prime, so that no two rows of a matrix are equal


def shape_config(name: str) -> PreTrainedConfig:
    """The configuration of a known shape. Raises ValueError for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"--shape {name!r} is not known; choose one of {', '.join(SHAPES)}, or give --config FILE")
    settings = dict(SHAPES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._name_or_path = name
    return config


def read_config(where: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in a config.json, a folder, or of a model's name. Raises ValueError where there is none."""
    try:
        place = where if Path(where).is_file() else resolve(where)
        if place.lower().endswith(".gguf"):
            return gguf_config(GgufFile(place))
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except GgufError:
        raise
    except Exception as error:  # whatever transformers and the hub raise for a bad source
        detail = one_line(error)
        raise ValueError(f"{where} gives no configuration of a model ({type(error).__name__}: {detail})") from error


def settled_dtype(dtype: str, device: torch.device, published: torch.dtype | None = None) -> torch.dtype:
    """The dtype for `--dtype`: "auto" is the `published` one of a model with weights, else bfloat16; and float32
    instead of bfloat16 where the device only emulates it. Raises ValueError for an unknown name."""
    if dtype == "auto":
        if published not in (None, torch.bfloat16):
            return published
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32 if emulated or emulates_bfloat16(device) else torch.bfloat16
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"--dtype {dtype} is none of auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Bytes of the weights of a model of this configuration."""
    model = _empty(config, dtype, torch.device("meta"), trust_remote_code)
    return sum(parameter.nbytes for parameter in model.parameters())


def check_memory(name: str, needed: int, dtype: torch.dtype, device: torch.device) -> str:
    """One line: memory that the weights need and that is free. Raises ValueError where they do not fit."""
    free = free_bytes(device)
    weights = f"{name}: {needed / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')}"
    if needed * 1.2 > free:
        raise ValueError(
            f"{weights} and room to work do not fit into the {free / 1e9:.2f} GB that are free on {device}; choose a "
            "smaller shape or model, or another --dtype or --device"
        )
    return (
        f"{weights}, about {2.5 * needed / 1e9:.1f} GB with a copy to draft with; {free / 1e9:.1f} GB are free on "
        f"{device}"
    )


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of this configuration with random weights, made on the device."""
    model = _empty(config, dtype, device, trust_remote_code)
    block = torch.randn(_BLOCK, generator=torch.Generator(device).manual_seed(0), device=device)
    heads = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for module in model.modules():
            parameters = dict(module.named_parameters(recurse=False))
            if parameters and all(parameter.ndim < 2 for parameter in parameters.values()):
                model._init_weights(module)  # norms: their neutral weights differ between families
                continue
            for name, parameter in parameters.items():
                if parameter.ndim < 2:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                spread = (SPREAD if id(parameter) in heads else 1.0) * parameter.shape[-1] ** -0.5
                _fill(parameter, (block * spread).to(dtype))
    model.generation_config = GenerationConfig()  # no end of text: every text is as long as asked for
    return model.eval()


def named_model(
    name: str, dtype: str, device: torch.device, trust_remote_code: bool = False, weights: str = "16"
) -> PreTrainedModel:
    """A model loaded by `load_target`, without end-of-text ids."""
    model, _ = load_target(name, dtype, device, trust_remote_code, with_tokenizer=False, weights=weights)
    model.generation_config = GenerationConfig()
    return model


def _empty(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    attention = ATTENTION.get(config._name_or_path)
    options = {"attn_implementation": attention} if attention else {}
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ValueError(f"{config.model_type} is no causal language model of transformers; give one that is")
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    model.tie_weights()
    return model


def _fill(parameter: torch.Tensor, numbers: torch.Tensor) -> None:
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), len(numbers)):
        flat[start : start + len(numbers)].copy_(numbers[: flat.numel() - start])
