"""The rules of linear recurrences on trees: what a sequence gives is computed for every path at once.

A memory S (Dk, Dv) decays by exp(g) at each token, which adds k u^T to it and is answered q^T S. Decays multiply along
a path, so with c the sum of g along it and A the relation "is it, or is above it",

    y_i = exp(c_i) q_i^T S + sum over j in A_i of exp(c_i - c_j) (q_i^T k_j) u_j

In Mamba-2 (arXiv:2405.21060) u is a token's own; on trees that is the masked form of STree (arXiv:2505.14969). In the
gated delta rule (arXiv:2412.06464) u = beta (v - k^T S) of the memory before the token, a triangular system over the
tree. A token whose g, beta and u are zero leaves the memory as it is, bit for bit. Knows nothing of caches and models.
"""

import torch
from torch import Tensor


def path_decays(g: Tensor, related: Tensor) -> tuple[Tensor, Tensor]:
    """For g (B, N, H) the sums along paths c (B, H, N), and exp(c_i - c_j) where j is related to i, (B, H, N, N)."""
    sums = (related.to(g.dtype) @ g).transpose(1, 2)
    between = sums[..., :, None] - sums[..., None, :]
    return sums, torch.where(related[:, None], between, -torch.inf).exp()


def delta_inputs(memory: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, related: Tensor) -> Tensor:
    """What each node adds to `memory` (B, H, Dk, Dv) under the gated delta rule: u (B, H, N, Dv) for k (B, H, N, Dk),
    v (B, H, N, Dv), g and beta (B, N, H). Parents precede their children."""
    sums, decays = path_decays(g, related)
    rates = beta.transpose(1, 2)[..., None]  # (B, H, N, 1)
    right = rates * (v - sums.exp()[..., None] * (k @ memory))
    left = (rates * (k @ k.transpose(2, 3)) * decays).tril(-1)
    return torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)


def answers(memory: Tensor, q: Tensor, k: Tensor, u: Tensor, g: Tensor, related: Tensor, index: Tensor) -> Tensor:
    """y (B, n, H, Dv) of the nodes `index` (n,), whose questions are q (B, H, n, Dk)."""
    sums, decays = path_decays(g, related)
    held = sums[..., index].exp()[..., None] * (q @ memory)
    return (held + (q @ k.transpose(2, 3) * decays[:, :, index]) @ u).transpose(1, 2)


def behind(memory: Tensor, k: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The memory behind a sequence k (B, H, N, Dk), u (B, H, N, Dv), g (B, N, H)."""
    sums = g.cumsum(1).transpose(1, 2)  # (B, H, N)
    left = (sums[..., -1:] - sums).exp()[..., None]
    return sums[..., -1, None, None].exp() * memory + (k * left).transpose(2, 3) @ u


def by_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, N, G, D) of G groups of heads as (B, H, N, D) float32."""
    return tensor.float().repeat_interleave(heads // tensor.shape[2], dim=2, output_size=heads).transpose(1, 2)
