"""Expert generator (paper section 4.1, Eq. 1, 2 and 6): the hidden states of one edit become a low-rank expert (U, V).

Copy this file with router.py and liveedit.py into another codebase and edit there; it needs torch only.

B batch       T sequence length      V vision tokens    P prompt tokens
D hidden size of the model           M module width     Q learned queries (R or K of them)
N experts     R rank of an expert    K feature slots    H attention heads
In einsums: b batch, t sequence, d hidden, n experts, r rank, k slots, m module width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Queries look at hidden states: multi-head attention with biases and without an output projection.

    Differs from Eq. (2): H heads, scale 1/sqrt(head width) and biases, as in the official code.
    """

    def __init__(self, state_dim: int, module_dim: int, value_dim: int, heads: int):
        super().__init__()
        if module_dim % heads or value_dim % heads:
            raise ValueError(f"heads={heads} must divide both the module width {module_dim} and the value width {value_dim}")
        self.heads = heads
        self.to_query = nn.Linear(module_dim, module_dim)
        self.to_key = nn.Linear(state_dim, module_dim)
        self.to_value = nn.Linear(state_dim, value_dim)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries (B, Q, M) or (1, Q, M), states (B, T, D) or (1, T, D), mask (B, T) True where attended -> (B, Q, value_dim)."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, Q or T, width)
        query, key, value = split(self.to_query(queries)), split(self.to_key(states)), split(self.to_value(states))
        batch = max(len(query), len(key))
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
        # Eq. (2): CA(x, y) = softmax(x W_q (y W_k)^T) y W_v
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[:, None, None, :])
        return mixed.transpose(1, 2).flatten(2)


class ExpertGenerator(nn.Module):
    """Turns the hidden states of an edit (image, prompt and answer rows) into U and V of one expert."""

    def __init__(self, hidden_size: int, module_dim: int, rank: int, heads: int, gain: float = 1.0):
        """gain: experts are scaled by gain / sqrt(rank).

        Differs from the official code: its queries are drawn kaiming-normal; queries of standard deviation 1 learned
        faster in a trial (README, "Differences").
        """
        super().__init__()
        self.scale = gain * rank ** -0.5
        self.norm_U, self.norm_V = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.queries_U, self.queries_V = (nn.Parameter(torch.randn(1, rank, module_dim)) for _ in range(2))
        self.attention_U, self.attention_V = (CrossAttention(hidden_size, module_dim, hidden_size, heads) for _ in range(2))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """states (B, T, D), mask (B, T) True on image, prompt and answer rows -> U (B, R, D), V (B, R, D)."""
        # Eq. (1): f_eg(h) = (CA_U(U, h), CA_V(V, h)) with h = h_v ++ h_p ++ h_o
        U = self.attention_U(self.queries_U, self.norm_U(states), mask)
        V = self.attention_V(self.queries_V, self.norm_V(states), mask)
        return U * self.scale, V * self.scale


def apply_experts(normed: Tensor, U: Tensor, V: Tensor, weights: Tensor) -> Tensor:
    """The residual that experts add to a layer's output.

    normed (B, T, D): the layer's output after LayerNorm; U, V (N, R, D); weights (B, N) -> (B, T, D).
    Differs from Eq. (6): the LayerNorm under U is the official code's.
    """
    gates = torch.relu(torch.einsum("btd,nrd->btnr", normed, U))
    # Eq. (6): sum over experts of w_e * ReLU(h U_e^T) V_e
    return torch.einsum("btnr,nrd->btd", gates * weights[:, None, :, None], V)
