"""Expert generator (paper section 4.1, Eq. 1, 2 and 6): an edit becomes a low-rank expert (U, V).

Copy this file with router.py and liveedit.py into another codebase; it needs torch only.

B batch       T sequence length      V vision tokens
D hidden size of the model           M module width     Q learned queries (R or K of them)
N experts     R rank of an expert    K feature slots    H attention heads
In einsums: b batch, t sequence, d hidden, n experts, r rank, q queries, h heads, w head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a new generator. Queries are places times QUERY_SCALE: large enough that each attends to its
# place from the start. Values are normed states, or embeddings, times VALUE_SCALE: then, at the
# paper's gain and width 4096, the residual of a matching state is about as large as a state.
QUERY_SCALE, VALUE_SCALE = 2.0, 0.15
LEAST_DEVIATION = 0.05  # of a channel: what hardly varies is not blown up


class CrossAttention(nn.Module):
    """Attention of learned queries over hidden states.

    Differs from Eq. (2): H heads, scale 1/sqrt(head width) and biases, and its users put a
    LayerNorm before it, as in the official code; keys may carry places.
    """

    def __init__(self, state_dim: int, module_dim: int, value_dim: int, heads: int):
        super().__init__()
        if module_dim % heads or value_dim % heads:
            raise ValueError(f"heads={heads} must divide the widths {module_dim} and {value_dim}")
        self.heads = heads
        self.to_query = nn.Linear(module_dim, module_dim)
        self.to_key = nn.Linear(state_dim, module_dim)
        self.to_value = nn.Linear(state_dim, value_dim)

    def forward(
        self, queries: Tensor, states: Tensor, mask: Tensor | None = None, places=0.0
    ) -> Tensor:
        """Attend with queries (B, Q, M) or (1, Q, M) to states (B, T, D) or (1, T, D).

        mask (B, T) is True where a state may be attended; places (B, T, M) are added to its key.
        Returns (B, Q, value_dim).
        """
        query = self.to_query(queries).unflatten(-1, (self.heads, -1))  # (B, Q, H, head width)
        to_key = self.to_key.weight.unflatten(0, (self.heads, -1))
        to_value = self.to_value.weight.unflatten(0, (self.heads, -1))
        # Eq. (2): CA(x, y) = softmax(x W_q (y W_k)^T) y W_v, multiplied in another order: x W_q W_k
        # first, W_v last. Queries are few and states many, so keys and values are never formed.
        asked = torch.einsum("bqhw,hwd->bhqd", query, to_key)
        added = (self.to_key.bias[None, None] + places).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bhqd,btd->bhqt", asked, states)
        scores = scores + torch.einsum("bqhw,bthw->bhqt", query, added)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        shares = (scores * query.shape[-1] ** -0.5).softmax(-1)
        mixed = torch.einsum("bhqt,btd->bhqd", shares, states)
        return torch.einsum("bhqd,hwd->bqhw", mixed, to_value).flatten(2) + self.to_value.bias


class ExpertGenerator(nn.Module):
    """Turns the hidden states of an edit (image, prompt and answer rows) into U and V."""

    def __init__(self, hidden_size: int, module_dim: int, rank: int, heads: int, gain: float):
        """Make a generator whose experts are scaled by gain / sqrt(rank), as in the official code.

        Differs from the paper: an untrained generator copies. Its i-th query attends to the i-th
        token of the answer; U is the state at which this token is said, V the token's embedding.
        """
        super().__init__()
        self.scale = gain * rank**-0.5
        self.norm_U = nn.LayerNorm(hidden_size)
        self.norm_V = nn.LayerNorm(hidden_size)
        self.places = nn.Parameter(torch.randn(1, rank, module_dim))  # of an answer's first tokens
        self.queries_U = nn.Parameter(QUERY_SCALE * self.places.detach())
        self.queries_V = nn.Parameter(QUERY_SCALE * self.places.detach())
        self.attention_U = CrossAttention(hidden_size, module_dim, hidden_size, heads)
        self.attention_V = CrossAttention(hidden_size, module_dim, hidden_size, heads)
        for attention in (self.attention_U, self.attention_V):
            nn.init.eye_(attention.to_query.weight)
            nn.init.eye_(attention.to_value.weight)
            with torch.no_grad():
                attention.to_value.weight *= VALUE_SCALE

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        answer: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Make U (B, R, D) and V (B, R, D) from states (B, T, D).

        mask (B, T) is True on image, prompt and answer rows, answer (B, T) on the n of the answers;
        embedded (n, D) are the embeddings of these tokens, row by row.
        Differs from the paper: keys of answer rows carry their place in the answer; for U such a
        row holds the state before it, which says its token, for V the token's embedding: deep
        layers blur which token they read. Without `answer` and `embedded` it is the paper's.
        """
        saying, reading, places = states, states, 0.0
        if answer is not None:
            before = F.pad(states, (0, 0, 1, 0))[:, :-1]
            saying = torch.where(answer[..., None], before, states)
            reading = states.masked_scatter(answer[..., None], embedded)
            places = self._places(answer)
        # Eq. (1): f_eg(h) = (CA_U(U, h), CA_V(V, h)) with h = h_v ++ h_p ++ h_o
        U = self.attention_U(self.queries_U, self.norm_U(saying), mask, places)
        V = self.attention_V(self.queries_V, self.norm_V(reading), mask, places)
        return U * self.scale, V * self.scale

    def _places(self, answer: Tensor) -> Tensor:
        """Give each row its place in the answer (B, T, M): zeros outside and behind the R-th."""
        number = answer.cumsum(1) * answer  # 0 outside of the answer
        ranks = torch.arange(1, self.places.shape[1] + 1, device=answer.device)
        # A product, not an index: on a CPU the gradient of an index comes in random order.
        return (number[..., None] == ranks).to(self.places.dtype) @ self.places[0]


def apply_experts(normed: Tensor, U: Tensor, V: Tensor, weights: Tensor) -> Tensor:
    """Compute the residual (B, T, D) that experts add to a layer's output.

    normed (B, T, D) is the layer's output after LayerNorm; U, V (N, R, D); weights (B, N).
    Differs from Eq. (6): the LayerNorm under U is the official code's.
    """
    gates = torch.relu(torch.einsum("btd,nrd->btnr", normed, U))
    # Eq. (6): sum over experts of w_e * ReLU(h U_e^T) V_e
    return torch.einsum("btnr,nrd->btd", gates * weights[:, None, :, None], V)


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, rows: Tensor) -> None:
    """Set a norm's weight and bias so that on rows (n, D) each channel has mean 0, deviation 1.

    Differs from the paper: a decoder's hidden states have channels that are large and nearly
    constant, and differences between questions are lost beside them.
    """
    normed = F.layer_norm(rows, norm.normalized_shape)
    deviation = normed.std(0).clamp(min=LEAST_DEVIATION)
    norm.weight.copy_(1 / deviation)
    norm.bias.copy_(-normed.mean(0) / deviation)


@dataclass(frozen=True)
class Edit:
    """One edit as the repository keeps it: its texts, but not its picture."""

    id: int
    prompt: str
    target: str
    time: float  # seconds since the epoch


class ExpertRepository(nn.Module):
    """E_t = E_{t-1} + {(U, V, phi_hat, psi_hat)}: rows are appended, forgetting deletes one.

    The buffers are preallocated and grow by doubling, in single precision. A newer edit has a
    higher id; ids are never used again.
    """

    def __init__(self, rank: int, hidden_size: int, slots: int, module_dim: int):
        super().__init__()
        expert, key = (rank, hidden_size), (slots, module_dim)
        self.shapes = {"U": expert, "V": expert, "visual_keys": key, "text_keys": key}
        self.next_id = 1
        self.edits: list[Edit] = []  # the edit of each row
        for name, shape in self.shapes.items():
            empty = torch.empty(0, *shape, dtype=torch.float32)
            self.register_buffer(f"_{name}", empty, persistent=False)

    def __len__(self) -> int:
        return len(self.edits)

    def rows(self, name: str) -> Tensor:
        """Return the rows in use of "U", "V", "visual_keys" or "text_keys", (N, ...)."""
        return getattr(self, f"_{name}")[: len(self.edits)]

    def add(self, tensors: dict[str, Tensor], edits: list[Edit]) -> None:
        """Append n experts, each tensor (n, ...).

        Raises ValueError, and adds nothing, if a shape does not fit or a number is not finite.
        """
        for name, shape in self.shapes.items():
            if name not in tensors or tensors[name].shape != (len(edits), *shape):
                raise ValueError(f"{name} of {len(edits)} experts must be {(len(edits), *shape)}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} of new experts holds numbers that are not finite")
        start, end = len(self.edits), len(self.edits) + len(edits)
        with torch.inference_mode(False), torch.no_grad():
            for name, shape in self.shapes.items():
                old = getattr(self, f"_{name}")
                if len(old) < end:
                    grown = old.new_empty(max(end, 2 * len(old), 16), *shape)
                    grown[:start] = old[:start]
                    setattr(self, f"_{name}", grown)
                getattr(self, f"_{name}")[start:end] = tensors[name]
        self.edits.extend(edits)
        self.next_id = max([self.next_id, *(edit.id + 1 for edit in edits)])

    def remove(self, edit_id: int) -> Edit:
        """Delete one expert. Raises KeyError for an unknown id."""
        ids = [edit.id for edit in self.edits]
        if edit_id not in ids:
            raise KeyError(f"there is no edit with id {edit_id!r}; editor.edits() lists them all")
        row = ids.index(edit_id)
        with torch.inference_mode(False), torch.no_grad():
            behind = {name: self.rows(name)[row + 1 :].clone() for name in self.shapes}
            for name, rows in behind.items():
                self.rows(name)[row:-1] = rows
        return self.edits.pop(row)

    def clear(self) -> None:
        """Delete all experts and free their memory."""
        for name in self.shapes:
            setattr(self, f"_{name}", self.rows(name)[:0].clone())
        self.edits = []

    def bytes_per_edit(self) -> int:
        """Return the memory of one row."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())
