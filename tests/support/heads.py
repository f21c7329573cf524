"""Sessions of heads as whole decoding would have them."""

import torch
from paceline.drafters.medusa import MedusaDrafter
from paceline.spec.noise import stream_keys
from paceline.spec.proposal import DraftRequest
from paceline.spec.request import Request, RowSampling
from paceline.spec.state import DecodeState

TEMPERATURES = {"none": 1.0, "shared": 0.7, "own": 1.3}  # of the rows, by how they draw


def open_session(target, heads, shape, sampling, lengths=(9, 4)):
    """A session and a state of two ragged rows with random text and hidden states."""
    torch.manual_seed(11)
    rows, width = len(lengths), max(lengths)
    request = DraftRequest(rows, 64, 61, torch.device("cpu"), shape, sampling, target)
    state = DecodeState.empty(rows, 64, 0, torch.device("cpu"))
    texts = [text[-length:] for text, length in zip(torch.randint(1, 61, (rows, width)).tolist(), lengths)]
    warp = RowSampling(temperature=TEMPERATURES[sampling.coupling])
    keys = stream_keys(3, rows)
    requests = [Request(text, 20, key, sampling=warp) for text, key in zip(texts, keys)]
    state.admit(torch.arange(rows), requests, [1] * rows)
    session = MedusaDrafter(heads).open(request)
    session.hidden.copy_(3 * torch.randn(rows, heads.hidden_size))
    return session, state
