"""Read a pickle of tensors and write them as safetensors: a script for a process of its own.

    python unpickle.py FILE OUTPUT

`weights_only` takes tensors and plain values, and runs nothing of the file. Exit code 3: refused, for the reason that
is printed. Imports nothing of the package.
"""

import sys
from pickle import UnpicklingError

REFUSED = 3


def main(file: str, output: str) -> str | None:
    """Why it is refused; None where the tensors are written."""
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        return "it is no pickle of tensors alone, and what else is in it could run code; take another file"
    except Exception as error:  # whatever a damaged file makes torch raise
        return f"it is damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]}); fetch it again"
    if not isinstance(content, dict) or not content:
        return f"it holds a {type(content).__name__} and no tensors by their names; take a file of weights"
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return f"it holds {name!r}, a {type(value).__name__}, and only named tensors are taken; save these alone"
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            return f"its tensor {name!r} is not stored as plain numbers; save it dense"
    tensors, seen = {}, set()
    for name, value in content.items():
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:  # safetensors hold each by itself
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    save_file(tensors, output, metadata={"format": "pt"})
    return None


if __name__ == "__main__":
    why = main(*sys.argv[1:])
    if why is not None:
        print(why)
        sys.exit(REFUSED)
