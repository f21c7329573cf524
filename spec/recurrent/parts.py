"""What a layer keeps of a row's text besides keys and values: the window of a convolution, the memory of a recurrence.

Each part has a state (B, ...), which stands for the text that is held, and the nodes' inputs (B, N, ...), which a
forward of a tree writes and a commit absorbs. `read` absorbs text, by the model's own function, a fused kernel where it
has one; `forward` and `commit` are torch code. Tensors are made on first use. Knows nothing of slots and trees' tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .passes import NodePass, Run, TextPass
from .rules import answers, behind, by_head, delta_inputs

# Bytes of the states of so many tokens as Mamba-1 reads at once, a token's at least; about six such tensors are alive.
PIECE = 1 << 25


class Part:
    """The state of a convolution or a recurrence, and the inputs of nodes that were forwarded since."""

    def __init__(self, batch: int):
        self.batch = batch
        self.state: Tensor | None = None  # (B, ...)
        self.kept: list[Tensor] = []  # (B, N, ...)

    @property
    def tensors(self) -> list[Tensor]:
        return [] if self.state is None else [self.state, *self.kept]

    def start(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The state, zeros at first."""
        if self.state is None:
            self.state = like.new_zeros(self.batch, *shape, dtype=dtype)
        return self.state

    def keep(self, nodes: NodePass, *inputs: Tensor) -> list[Tensor]:
        """Keep `inputs` (B, n, ...) of the nodes of a pass; returns those of all nodes of its tree, (B, N, ...)."""
        if not self.kept or self.kept[0].shape[1] < nodes.size:
            self.kept = [part.new_zeros(self.batch, nodes.size, *part.shape[2:]) for part in inputs]
        for buffer, part in zip(self.kept, inputs):
            buffer.index_copy_(1, nodes.index, part)
        return [buffer[:, : nodes.size] for buffer in self.kept]

    def commit(self, run: Run) -> None:
        """Absorb the nodes of `run`."""
        if self.state is not None and self.kept:
            self.state.copy_(self.behind(run, self.state, [run.gather(kept) for kept in self.kept]))

    def run(self, at: TextPass | NodePass, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the model's function `stock` gives for text or nodes that follow the state; absorbs text."""
        raise NotImplementedError

    def behind(self, run: Run, state: Tensor, inputs: list[Tensor]) -> Tensor:
        """The state behind a run, of which `inputs` (B, D+1, ...) were kept."""
        raise NotImplementedError


class Window(Part):
    """The last K - 1 inputs of a causal convolution of each channel, (B, K-1, C)."""

    def run(
        self,
        at: TextPass | NodePass,
        stock: Callable,
        inputs: Tensor,  # (R, C, n)
        weight: Tensor,  # (C, K)
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:  # (R, C, n)
        held, width = weight.shape[1] - 1, inputs.shape[2]
        state = self.start(held, weight.shape[0], like=inputs)
        rows = inputs.transpose(1, 2)
        if isinstance(at, TextPass):
            whole = torch.cat([at.of(state), rows], dim=1)  # (R, K-1+n, C)
            columns = at.count[:, None] + torch.arange(held, device=rows.device)
            at.put(state, whole.gather(1, columns[..., None].expand(-1, -1, whole.shape[2])))
            return stock(whole.transpose(1, 2).contiguous(), weight, bias, activation=activation, **kwargs)[
                :, :, -width:
            ]
        whole = torch.cat([state, *self.keep(at, rows)], dim=1)  # (B, K-1+N, C)
        batch = torch.arange(len(whole), device=whole.device)[:, None, None]
        windows = whole[batch, at.windows(held + 1)]  # (B, n, K, C)
        out = (windows.float() * weight.T.float()).sum(2)
        out = out if bias is None else out + bias.float()
        out = out if activation is None else ACT2FN[activation](out)
        return out.to(inputs.dtype).transpose(1, 2)

    def behind(self, run: Run, state: Tensor, inputs: list[Tensor]) -> Tensor:
        held = state.shape[1]
        columns = run.count[:, None] + torch.arange(held, device=state.device)  # (B, K-1) in state and run
        columns = torch.where(columns < held, columns, columns + run.skip[:, None])
        whole = torch.cat([state, inputs[0]], dim=1)
        return whole.gather(1, columns.clamp(max=whole.shape[1] - 1)[..., None].expand(-1, -1, whole.shape[2]))


class DeltaMemory(Part):
    """The memory of a gated delta rule, (B, H, Dk, Dv)."""

    def run(
        self,
        at: TextPass | NodePass,
        stock: Callable,
        query: Tensor,  # (R, n, Hk, Dk)
        key: Tensor,
        value: Tensor,  # (R, n, H, Dv)
        g: Tensor,  # (R, n, H)
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # (R, n, H, Dv), and the state
        heads, size = value.shape[2:]
        state = self.start(heads, key.shape[3], size, like=value, dtype=torch.float32)
        if isinstance(at, TextPass):
            inside = at.inside[..., None]
            kwargs |= dict(initial_state=at.of(state), output_final_state=True)
            out, new = stock(
                query, key, value, g=torch.where(inside, g, 0.0), beta=torch.where(inside, beta, 0.0),
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
            at.put(state, new)
            return out, state
        q, k = query.float(), key.float()
        if use_qk_l2norm_in_kernel:
            q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
        k, v, g, beta = self.keep(at, k, value.float(), g.float(), beta.float())
        q, k, v = by_head(q, heads), by_head(k, heads), v.transpose(1, 2)
        u = delta_inputs(state, k, v, g, beta, at.related)
        out = answers(state, q * q.shape[3] ** -0.5, k, u, g, at.related, at.index)
        return out.to(query.dtype), state

    def behind(self, run: Run, state: Tensor, inputs: list[Tensor]) -> Tensor:
        inside = run.inside[..., None]
        k, v = by_head(inputs[0], state.shape[1]), inputs[1].transpose(1, 2)
        g, beta = (torch.where(inside, part, 0.0) for part in inputs[2:])
        before = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()[None]
        return behind(state, k, delta_inputs(state, k, v, g, beta, before), g)


class SsdMemory(Part):
    """The memory of Mamba-2, (B, H, P, D)."""

    def run(
        self,
        at: TextPass | NodePass,
        stock: Callable,
        inputs: Tensor,  # (R, n, H, P)
        dt: Tensor,  # (R, n, H)
        A: Tensor,  # (H,)
        B: Tensor,  # (R, n, G, D)
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # (R, n, H, P), and the state
        heads, size = inputs.shape[2:]
        state = self.start(heads, size, B.shape[3], like=inputs, dtype=torch.float32)
        dt = (dt if dt_bias is None else dt + dt_bias.to(dt.dtype)).float()
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        if isinstance(at, TextPass):
            dt = torch.where(at.inside[..., None], dt, 0.0)
            kwargs |= dict(initial_states=at.of(state), return_final_states=True)
            out, new = stock(inputs, dt, A, B, C, chunk_size=chunk_size, D=D, **kwargs)
            at.put(state, new)
            return out, state
        x = inputs.float()
        k, u, g = self.keep(at, B.float(), x * dt[..., None], A.float() * dt)
        memory, k, u = state.transpose(2, 3), by_head(k, heads), u.transpose(1, 2)
        out = answers(memory, by_head(C, heads), k, u, g, at.related, at.index)
        return (out if D is None else out + D[:, None] * x).contiguous(), state

    def behind(self, run: Run, state: Tensor, inputs: list[Tensor]) -> Tensor:
        k = by_head(inputs[0], state.shape[1])
        u = torch.where(run.inside[..., None, None], inputs[1], 0.0).transpose(1, 2)
        g = torch.where(run.inside[..., None], inputs[2], 0.0)
        return behind(state.transpose(2, 3), k, u, g).transpose(2, 3)


class ScanMemory(Part):
    """The state of Mamba-1, (B, C, D). Its decays are of each channel and column, so that a tree is gone through level
    by level, and what is kept of a node is the state behind it."""

    def run(
        self,
        at: TextPass | NodePass,
        stock: Callable,
        inputs: Tensor,  # (R, C, n)
        dt: Tensor,  # (R, C, n)
        A: Tensor,  # (C, D)
        B: Tensor,  # (R, D, n)
        C: Tensor,
        D: Tensor | None = None,  # (C,)
        z: Tensor | None = None,  # (R, C, n)
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # (R, C, n), and the state
        state = self.start(*A.shape, like=inputs, dtype=torch.float32)
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        dt = F.softplus(dt) if delta_softplus else dt  # in the dtype of the inputs, as the fused kernel wants it
        if isinstance(at, TextPass):
            dt, memory = torch.where(at.inside[:, None], dt, 0.0), at.of(state)
            kwargs |= dict(D=D, return_last_state=True)
            outs, most = [], max(1, PIECE // (4 * len(dt) * A.numel()))
            parts = (inputs, dt, B, C, inputs if z is None else z)
            for x, steps, b, c, gate in zip(*(part.split(most, dim=2) for part in parts)):
                kwargs["z"] = None if z is None else gate
                out, memory = self._read(stock, memory, x, steps, A, b, c, kwargs)
                outs.append(out)
            at.put(state, memory)
            return torch.cat(outs, dim=2), state
        dt, gate = dt.float(), 1.0 if z is None else F.silu(z.float())
        steps = dt.transpose(1, 2)[..., None]  # (B, n, C, 1)
        decay = torch.exp(A * steps)
        drive = steps * B.float().transpose(1, 2)[:, :, None] * inputs.float().transpose(1, 2)[..., None]
        batch = torch.arange(len(state), device=state.device)[:, None]
        above = at.parents[:, at.index] + 1
        states = drive
        for _ in range(at.levels):
            known = torch.cat([state[:, None], *self.keep(at, states)], dim=1)  # (B, 1+N, C, D)
            states = decay * known[batch, above] + drive
        self.keep(at, states)
        out = (states @ C.float().transpose(1, 2)[..., None])[..., 0].transpose(1, 2)  # (B, C, n)
        out = out if D is None else out + inputs.float() * D[:, None]
        return (out * gate).to(inputs.dtype), state

    def _read(
        self, stock: Callable, memory: Tensor, inputs: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        """The outputs of some tokens, and the memory (R, C, D) behind them. The stock scan begins at zero; what is left
        of the memory is added, as the rule is linear in it."""
        out, new = stock(inputs, dt, A, B, C, **kwargs)
        left = torch.exp(A[:, None] * dt.float().cumsum(2)[..., None]) * memory[:, :, None]  # (R, C, n, D)
        answer = torch.einsum("rcnd,rdn->rcn", left, C.float())
        answer = answer if kwargs["z"] is None else answer * F.silu(kwargs["z"].float())
        return (out + answer).to(out.dtype), new.float() + left[:, :, -1]

    def behind(self, run: Run, state: Tensor, inputs: list[Tensor]) -> Tensor:
        last = (run.skip + run.count - 1).clamp(min=0, max=run.path.shape[1] - 1)
        new = inputs[0][torch.arange(len(state), device=state.device), last]
        return torch.where((run.count > 0)[:, None, None], new, state)
