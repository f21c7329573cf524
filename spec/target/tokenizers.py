"""Loading tokenizers, and looking for those of models that are loaded already. Knows nothing of text."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import quietly
from ..files import cache_folder
from .sources import resolve
from .wheels import NAMED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILE = re.compile(r"tokenizer|vocab|.*\.(model|tiktoken)$")


def load_tokenizer(where: str, trust_remote_code: bool = False, fetch: bool = True) -> Any:
    """The tokenizer in a folder, a GGUF file or of a hub id; an adapter's own, or else that of its base model. The
    model hub is only asked with `fetch`."""
    from transformers import AutoTokenizer

    from .adapters import base_of, is_adapter
    from .gguf_file import opened
    from .gguf_model import gguf_tokenizer

    if Path(where).is_file():
        with opened(where) as file:
            return gguf_tokenizer(file)
    if is_adapter(where) and not (Path(where) / "tokenizer_config.json").is_file():
        return load_tokenizer(resolve(base_of(where)), trust_remote_code, fetch)
    with quietly():
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=not fetch)


def tokenizer_of(model: "PreTrainedModel", fetch: bool = False) -> Any | None:
    """The tokenizer that lies where `model` was loaded from; None where there is none, or none that can be read. The
    model hub is only asked with `fetch`."""
    size = model.config.get_text_config().vocab_size
    source = str(getattr(model, "adapter_folder", None) or getattr(model.config, "_name_or_path", None) or "")
    here = [cache_folder() / name for name, about in NAMED.items() if about.hub_id == source]
    where = next((str(folder) for folder in here if (folder / "config.json").is_file()), source)
    try:
        if not where or (Path(where).is_dir() and not any(map(_TOKENIZER_FILE.match, os.listdir(where)))):
            return None
        tokenizer = load_tokenizer(where, fetch=fetch)
        return tokenizer if len(tokenizer) > size // 2 else None  # else transformers made one of nothing
    except Exception:  # whatever transformers and the hub raise: nothing, half a tokenizer, code of its own
        return None
