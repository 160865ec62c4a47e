"""Routing (paper section 4.2, Eq. 3-5, 7 and 12-16): which experts does a query concern, and how much of each?

A visual hard filter drops the experts whose image has nothing to do with the query; a text soft router weighs the rest.
Copy this file with generator.py and liveedit.py into another codebase and edit there; it needs torch only.

B batch       T sequence length      V vision tokens    P prompt tokens
D hidden size of the model           M module width     Q learned queries (R or K of them)
N experts     R rank of an expert    K feature slots    H attention heads
In einsums: b batch, n experts, k slots, m module width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator import CrossAttention

# Of `Router.same_fact`, in units of the routing losses' logits; chosen on scenes of the editor's training.
SAME_FACT_MARGIN = 0.75  # by which two pictures must match, on the mean of both directions
SAME_FACT_SLACK = 1.5  # by which one direction, or the questions, may miss a match


class Rows(NamedTuple):
    """Hidden states of one kind for each query, padded: states (B, T, D), mask (B, T) True on real rows."""

    states: Tensor
    mask: Tensor

    def select(self, rows) -> "Rows":
        """The given queries."""
        return Rows(self.states[rows], self.mask[rows])

    @classmethod
    def gather(cls, hidden: Tensor, mask: Tensor) -> "Rows":
        """Move the masked rows of hidden (B, T, D) to the front and cut off what no query needs."""
        length = max(int(mask.sum(1).max()), 1)
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :length]
        return cls(hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1])), mask.gather(1, order))


class FeatureExtractor(nn.Module):
    """Routing features of a query, the same form with separate weights on the edit side and on the input side."""

    def __init__(self, hidden_size: int, module_dim: int, slots: int, heads: int):
        super().__init__()
        attention = lambda: CrossAttention(hidden_size, module_dim, module_dim, heads)
        self.visual_norm, self.text_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.visual_queries, self.text_queries = (nn.Parameter(torch.randn(1, slots, module_dim)) for _ in range(2))
        self.visual_prompt_attention, self.visual_image_attention, self.text_attention = attention(), attention(), attention()

    def visual_query(self, prompt: Rows) -> Tensor:
        """What the prompt asks of an image (B, K, M): the inner attention of Eq. (3)."""
        return self.visual_prompt_attention(self.visual_queries, self.visual_norm(prompt.states), prompt.mask)

    def visual(self, visual_query: Tensor, image: Rows) -> Tensor:
        """Eq. (3): phi = CA_phi2( CA_phi1(phi_0, h_p), h_v ), (B, K, M)."""
        return self.visual_image_attention(visual_query, self.visual_norm(image.states), image.mask)

    def text(self, prompt: Rows) -> Tensor:
        """Eq. (4): psi = CA_psi(psi_0, h_p), (B, K, M)."""
        return self.text_attention(self.text_queries, self.text_norm(prompt.states), prompt.mask)


class Query(NamedTuple):
    """Input-side features of a batch of queries, each (B, K, M)."""

    visual: Tensor
    sentinel: Tensor
    text: Tensor


class Routing(NamedTuple):
    """What the router decided for B queries and N experts of which n were kept by at least one query."""

    similarity: Tensor  # (B, N) visual similarity
    threshold: Tensor  # (B,) an expert is kept above it
    experts: Tensor  # (n,) indices of the experts kept by any query
    weights: Tensor  # (B, n) soft weights of these, 0 where a query dropped the expert


def soft_weights(scores: Tensor, kept: Tensor) -> Tensor:
    """Text soft router: scores (B, n) and kept (B, n) -> weights (B, n), 0 where dropped.

    Eq. (7): w_e = sigmoid(s_e) * softmax over the kept experts (s_e)
    """
    # The lowest finite number instead of -inf: a row without kept experts then has no NaN in its gradient.
    shares = scores.masked_fill(~kept, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.where(kept, torch.sigmoid(scores) * shares, 0.0)


class Router(nn.Module):
    """Both feature extractors, the vision sentinel, and the two decisions."""

    def __init__(self, hidden_size: int, module_dim: int, slots: int, heads: int, sentinel_tokens: int, similarity: str = "cosine",
                 threshold: float | None = None):
        """similarity: "cosine" (of each slot, then averaged over the slots) or "dot" (the official form, see `text_similarity`).
        threshold: a fixed number for the visual hard filter; None compares with the learned vision sentinel."""
        super().__init__()
        self.cosine, self.threshold = similarity == "cosine", threshold
        self.edit_side = FeatureExtractor(hidden_size, module_dim, slots, heads)
        self.input_side = FeatureExtractor(hidden_size, module_dim, slots, heads)
        self.sentinel = nn.Parameter(torch.randn(1, sentinel_tokens, hidden_size))  # Theta of Eq. (5)
        # Cosines live in [-1, 1]: the losses need them scaled to tell a match from a near miss. A dot product scales itself.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0))) if self.cosine else None

    def visual_key(self, prompt: Rows, image: Rows) -> Tensor:
        """Edit-side visual feature phi_hat (B, K, M), of unit length for the cosine."""
        return self._unit(self.edit_side.visual(self.edit_side.visual_query(prompt), image))

    def text_key(self, prompt: Rows) -> Tensor:
        """Edit-side text feature psi_hat (B, K, M)."""
        return self.edit_side.text(prompt)

    def query(self, prompt: Rows, image: Rows) -> Query:
        """Input-side features: phi_bar, the sentinel seen with the same prompt, psi_bar."""
        side = self.input_side
        asked = side.visual_query(prompt)
        sentinel = side.visual(asked, Rows(self.sentinel, None))
        return Query(self._unit(side.visual(asked, image)), self._unit(sentinel), side.text(prompt))

    def _unit(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.cosine else features

    def visual_similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """(B, K, M) and (N, K, M) -> (B, N): the cosine averaged over slots, or the scaled dot product."""
        if not self.cosine:
            return text_similarity(query, keys)
        return query.flatten(1) @ keys.flatten(1).T / keys.shape[1]

    def paired_similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """The visual similarity of each query with one key: twice (B, K, M) -> (B,)."""
        products = (query * keys).sum(-1).mean(-1)
        return products if self.cosine else products * query.shape[-1] ** -0.5

    def sentinel_similarity(self, query: Query) -> Tensor:
        """Similarity of each query with its own sentinel (B,)."""
        return self.paired_similarity(query.visual, query.sentinel)

    def thresholds(self, query: Query) -> Tensor:
        """Above which similarity each query keeps an expert (B,): its own sentinel's, or the fixed number."""
        own = self.sentinel_similarity(query)
        return own if self.threshold is None else torch.full_like(own, self.threshold)

    def visual_logits(self, similarity: Tensor) -> Tensor:
        """Similarities as logits of the routing losses."""
        return similarity * self.log_scale.exp() if self.cosine else similarity

    def route(self, query: Query, visual_keys: Tensor, text_keys: Tensor, active: Tensor | None = None) -> Routing:
        """The whole decision for keys (N, K, M); active (N,) leaves out experts that are not in force.

        Beyond one product with all visual keys, and a comparison of its results, the work depends on the kept experts only.
        """
        similarity = self.visual_similarity(query.visual, visual_keys)
        threshold = self.thresholds(query)
        # Eq. (5): keep expert e iff sim(phi_bar, phi_hat_e) > sim(phi_bar, phi_bar_Theta)
        kept = similarity > threshold[:, None]
        if active is not None:
            kept &= active
        experts = kept.any(0).nonzero().flatten()
        scores = text_similarity(query.text, text_keys[experts].to(query.text.dtype))
        return Routing(similarity, threshold, experts, soft_weights(scores, kept[:, experts]))

    def same_fact(self, stored, new: Tensor) -> Tensor:
        """Which stored edits speak of the fact of which new ones? Pairs (n, 2) of indices: a new edit, and one that is another.

        stored: visual_keys, text_keys, visual_queries, text_queries (N, K, M) and sentinels (N,), each edit's features of both sides and the similarity
        of its own question with the sentinel; new: indices of the new ones among them.
        Each edit's own question is put to the other's expert. The filter's logit must be above SAME_FACT_MARGIN on the mean of both directions
        and above -SAME_FACT_SLACK in each, and so must the match of the new question. A fixed threshold of the filter plays no part.
        Beyond one product with all visual keys, and a comparison of its results, the work depends on near experts only.
        """
        dtype, pairs = stored.visual_keys.dtype, []
        logits = lambda similarity, sentinels: self.visual_logits(similarity - sentinels)
        for block in new.split(128):
            similarity = self.visual_similarity(stored.visual_queries[block].to(dtype), stored.visual_keys)
            there = logits(similarity, stored.sentinels[block, None])
            for index, row in zip(block.tolist(), there):  # one by one: so only the near experts of one edit are gathered at a time
                near = (row > -SAME_FACT_SLACK).nonzero().flatten()
                back = logits(self.paired_similarity(stored.visual_queries[near].to(dtype), stored.visual_keys[index]), stored.sentinels[near])
                text = text_similarity(stored.text_queries[index][None].to(dtype), stored.text_keys[near].to(dtype))[0]
                same = ((row[near] + back) / 2 > SAME_FACT_MARGIN) & (back > -SAME_FACT_SLACK) & (text > -SAME_FACT_SLACK) & (near != index)
                pairs.append(torch.stack([torch.full_like(near, index), near], dim=1)[same])
        return torch.cat(pairs)


def text_similarity(query: Tensor, keys: Tensor) -> Tensor:
    """s_e of Eq. (7): dot products rescaled by sqrt(M) and averaged over the K slots; (B, K, M), (N, K, M) -> (B, N)."""
    return torch.einsum("bkm,nkm->bn", query, keys) / (keys.shape[1] * keys.shape[2] ** 0.5)


# ------------------------------------------------------------------------------------------------ routing losses


def nce(logits: Tensor, positive: Tensor, allowed: Tensor | None = None) -> Tensor:
    """-log softmax at the positive column, mean over rows; logits (B, N), positive (B,), allowed (B, N) False leaves a column out.

    Eq. (12): nce(a, b+, {b_j}) = -log( exp(a.b+) / sum_j exp(a.b_j) )
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return F.cross_entropy(logits, positive)


def hard_filter_loss(similar: Tensor, sentinel: Tensor, own: Tensor, is_locality: Tensor) -> Tensor:
    """Eq. (13) for Q queries and B experts, as logits: similar (Q, B), sentinel (Q,) each with its own sentinel; own (Q,) expert index.

    A generality query must prefer its expert to all others and to the sentinel, a locality query the sentinel to all experts.
    Differs from Eq. (13): a generality query is a locality query of every *other* edit, so without its own expert it must prefer
    the sentinel too. Without this term nothing pushes other edits below the threshold of a dense stream.
    """
    logits = torch.cat([similar, sentinel[:, None]], dim=1)  # (Q, B + 1)
    last = torch.full_like(own, similar.shape[1])
    without_own = F.one_hot(own, similar.shape[1] + 1) == 0
    follow = nce(logits[~is_locality], own[~is_locality])
    reject = nce(logits[is_locality], last[is_locality]) if is_locality.any() else logits.new_zeros(())
    other = nce(logits[~is_locality], last[~is_locality], without_own[~is_locality])
    return follow + reject + other


def soft_router_loss(scores: Tensor, own: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the text soft router: scores (Q, B + L) of Q generality queries against the text keys of B edits and L locality samples.

    own (Q,) the query's expert; negative (Q,) one random other edit. Returns (l_sr1, l_sr2).
    """
    take = lambda columns: scores.gather(1, columns[:, None]).squeeze(1)
    # Eq. (15): -log sigmoid(s_own) - log(1 - sigmoid(s_negative))
    l_sr1 = -(F.logsigmoid(take(own)) + F.logsigmoid(-take(negative))).mean()
    # Eq. (16): the own expert's key against the keys of all edits and of all locality samples
    l_sr2 = nce(scores, own)
    return l_sr1, l_sr2
