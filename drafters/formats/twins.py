"""Published drafters that are pickled, and where the same weights are safetensors. Knows nothing of files."""

from pathlib import Path

# By the last part of a hub id: what to fetch instead.
_REVISIONS = {
    "EAGLE-Qwen2-7B-Instruct": ("yuhuili/EAGLE-Qwen2-7B-Instruct", "refs/pr/1"),
    "medusa-vicuna-7b-v1.3": ("FasterDecoding/medusa-vicuna-7b-v1.3", "refs/pr/1"),
}
_TWINS = {
    "EAGLE3-LLaMA3.1-Instruct-8B": "nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted",
    "EAGLE-LLaMA3-Instruct-70B": "yuhuili/EAGLE-LLaMA3-Instruct-70B",
}


def pickle_refusal(name: str, file: str, index: str | None) -> str:
    """The sentence for a drafter whose weights are the pickle `file` alone, or several that the file `index` names."""
    several = f"{file} and others, pickles, which can run code, and they are not read"
    one = f"{file}, a pickle, which can run code, and it is not read"
    said = f"drafter {name} has its weights in {several if index else one}; "
    file = index or file
    title = Path(name).name
    if title in _REVISIONS:
        hub_id, revision = _REVISIONS[title]
        return f"{said}hf download {hub_id} --revision {revision} --local-dir {title} fetches them as safetensors"
    if title in _TWINS and _TWINS[title] != name:
        return f"{said}{_TWINS[title]} has them as safetensors"
    where = Path(name) / file if Path(name).is_dir() else file
    it = "them" if index else "it"
    fetch = "" if Path(name).is_dir() else f"fetch {it}, and config.json, by hf download {name}, and "
    return f"{said}{fetch}make a folder of {it} by paceline convert {where} -o FOLDER"
