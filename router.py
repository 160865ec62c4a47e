"""Routing (paper section 4.2, Eq. 3-5, 7 and 12-16): which experts does a query concern?

A visual hard filter drops the experts whose image has nothing to do with the query; a text soft
router weighs the rest; of edits of the same fact the newest counts.
Copy this file with generator.py, backbone.py and liveedit.py; it needs torch and generator.py only.

B batch       T sequence length      D hidden size of the model
M module width                       Q learned queries (R or K of them)
N experts     R rank of an expert    K feature slots    H attention heads
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator import CrossAttention

nce = F.cross_entropy  # Eq. (12): nce(a, b+, {b_j}) = -log( exp(a.b+) / sum_j exp(a.b_j) )
# By how much, in logits of the routing losses, experts must be above the filter's threshold to be
# edits of one fact: the nearer, the more crowded it is. Chosen on scenes of the editor's training.
SAME_FACT_MARGIN = 1.0
LEAST_WEIGHT = 0.1  # sigmoid of an expert's text score, below which it is not used


class Rows(NamedTuple):
    """Hidden states of each query, and which of them are meant; None: all, to attend to only."""

    states: Tensor  # (B, T, D)
    mask: Tensor | None  # (B, T)

    def select(self, rows: Tensor) -> "Rows":
        """Take the given queries."""
        return Rows(self.states[rows], self.mask[rows])

    def some(self, share: float) -> "Rows":
        """Hide all but a random share of each query's rows, unless that hides all of them."""
        shown = self.mask & (torch.rand(self.mask.shape, device=self.mask.device) < share)
        return Rows(self.states, torch.where(shown.any(1, keepdim=True), shown, self.mask))

    @classmethod
    def cat(cls, parts: list["Rows"]) -> "Rows":
        """Put queries below one another."""
        length = max(part.states.shape[1] for part in parts)
        states, masks = [], []
        for part in parts:
            missing = length - part.states.shape[1]
            states.append(F.pad(part.states, (0, 0, 0, missing)))
            masks.append(F.pad(part.mask, (0, missing)))
        return cls(torch.cat(states), torch.cat(masks))

    @classmethod
    def gather(cls, hidden: Tensor, mask: Tensor) -> "Rows":
        """Move the masked rows of hidden (B, T, D) to the front and cut off what none needs."""
        length = max(int(mask.sum(1).max()), 1)
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :length]
        index = order[..., None].expand(-1, -1, hidden.shape[-1])
        return cls(hidden.gather(1, index), mask.gather(1, order))


class FeatureExtractor(nn.Module):
    """Routing features; the edit side and the input side have the same form, other weights.

    Norms stand before the attention, as in `ExpertGenerator`.
    Differs from the official code: the visual branch has a norm for prompts and one for images.
    """

    def __init__(self, hidden_size: int, module_dim: int, slots: int, heads: int):
        super().__init__()
        sizes = (hidden_size, module_dim, module_dim, heads)
        self.visual_norm = nn.LayerNorm(hidden_size)
        self.visual_prompt_norm = nn.LayerNorm(hidden_size)
        self.text_norm = nn.LayerNorm(hidden_size)
        self.visual_queries = nn.Parameter(torch.randn(1, slots, module_dim))
        self.text_queries = nn.Parameter(torch.randn(1, slots, module_dim))
        self.visual_prompt_attention = CrossAttention(*sizes)
        self.visual_image_attention = CrossAttention(*sizes)
        self.text_attention = CrossAttention(*sizes)

    def visual_query(self, prompt: Rows) -> Tensor:
        """Ask what the prompt wants of an image, (B, K, M): the inner attention of Eq. (3)."""
        states = self.visual_prompt_norm(prompt.states)
        return self.visual_prompt_attention(self.visual_queries, states, prompt.mask)

    def visual(self, visual_query: Tensor, image: Rows) -> Tensor:
        """Look for it in the image, (B, K, M)."""
        # Eq. (3): phi = CA_phi2( CA_phi1(phi_0, h_p), h_v )
        return self.visual_image_attention(visual_query, self.visual_norm(image.states), image.mask)

    def text(self, prompt: Rows) -> Tensor:
        """Read what is asked, (B, K, M)."""
        # Eq. (4): psi = CA_psi(psi_0, h_p)
        return self.text_attention(self.text_queries, self.text_norm(prompt.states), prompt.mask)


class Features(NamedTuple):
    """Input-side features of B queries, each (B, K, M)."""

    asked: Tensor  # of the image: the inner attention of Eq. (3)
    visual: Tensor  # phi_bar
    sentinel: Tensor  # phi_bar of Theta
    text: Tensor  # psi_bar


class Routing(NamedTuple):
    """What the router decided for B queries, N experts, and the n that any query kept."""

    similarity: Tensor  # (B, N) visual similarity
    threshold: Tensor  # (B,) an expert is kept above it
    experts: Tensor  # (n,) indices of the experts that the filter kept for any query
    weights: Tensor  # (B, n) soft weights of these, 0 where a query has no use for the expert


class Router(nn.Module):
    """Both feature extractors, the vision sentinel, and the decisions."""

    def __init__(self, hidden_size: int, config):
        """Make a router by the sizes and settings of a LiveEditConfig.

        similarity "cosine" is of each slot, averaged over the slots; "dot" is the official form.
        """
        super().__init__()
        self.cosine = config.similarity == "cosine"
        self.similarity_scale = 1.0 if self.cosine else config.module_dim**-0.5
        self.threshold, self.newest_wins = config.threshold, config.newest_wins
        sizes = (hidden_size, config.module_dim, config.slots, config.heads)
        self.edit_side = FeatureExtractor(*sizes)
        self.input_side = FeatureExtractor(*sizes)
        self.sentinel = nn.Parameter(torch.randn(1, config.sentinel_tokens, hidden_size))  # Theta
        # Cosines lie in [-1, 1]: the losses need them scaled to tell a match from a near miss.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0))) if self.cosine else None

    def visual_key(self, prompt: Rows, image: Rows) -> Tensor:
        """Compute the edit-side phi_hat (B, K, M), of unit length for the cosine."""
        asked = self.edit_side.visual_query(prompt)
        return self._unit(self.edit_side.visual(asked, image))

    def text_key(self, prompt: Rows) -> Tensor:
        """Compute the edit-side psi_hat (B, K, M)."""
        return self.edit_side.text(prompt)

    def features(self, prompt: Rows, image: Rows) -> Features:
        """Compute the input-side features."""
        asked = self.input_side.visual_query(prompt)
        visual = self.input_side.visual(asked, image)
        sentinel = self.input_side.visual(asked, Rows(self.sentinel, None))
        text = self.input_side.text(prompt)
        return Features(self._unit(asked), self._unit(visual), self._unit(sentinel), text)

    def _unit(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.cosine else features

    def visual_similarity(self, visual: Tensor, keys: Tensor) -> Tensor:
        """Compare phi_bar (B, K, M) with keys (N, K, M), averaged over the slots: (B, N).

        Differs from the paper: cosine instead of the dot product, unless similarity is "dot".
        """
        scale = self.similarity_scale / keys.shape[1]
        return visual.flatten(1) @ keys.flatten(1).T * scale

    def sentinel_similarity(self, features: Features) -> Tensor:
        """Compare each query with the sentinel as its own prompt sees it, (B,).

        Differs from the paper: with the cosine, the sentinel is compared with what the prompt asks
        for, not with what it sees in its image: how alike an unknown image and it look is noise.
        """
        query = features.asked if self.cosine else features.visual
        return (query * features.sentinel).sum(-1).mean(-1) * self.similarity_scale

    def visual_logits(self, similarity: Tensor) -> Tensor:
        """Turn similarities into logits of the routing losses."""
        return similarity * self.log_scale.exp() if self.cosine else similarity

    def thresholds(self, features: Features) -> Tensor:
        """Give each query's threshold of Eq. (5), (B,), by the sentinel or the fixed one."""
        threshold = self.sentinel_similarity(features)
        return threshold if self.threshold is None else torch.full_like(threshold, self.threshold)

    def hard_filter(self, similarity: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Return each query's threshold (B,) and which experts it keeps (B, N)."""
        threshold = self.thresholds(features)
        if self.cosine and self.threshold is None:
            # Differs from Eq. (5), which compares each expert with the sentinel alone.
            logits = self.visual_logits(threshold), self.visual_logits(similarity)
            threshold = raised_by_dropped(*logits) / self.log_scale.exp()
        # Eq. (5): keep expert e iff sim(phi_bar, phi_hat_e) > sim(phi_bar, phi_bar_Theta)
        return threshold, similarity > threshold[:, None]

    def route(
        self,
        features: Features,
        visual_keys: Tensor,
        text_keys: Tensor,
        has_image: Tensor | None = None,
    ) -> Routing:
        """Decide for B queries and N experts, keys (N, K, M) in the order of editing.

        has_image (B,): a query without an image keeps nothing; None: all have one.
        Beyond one product with all visual keys, and a few passes over the similarities, the work
        depends only on the experts that are above the sentinel of any query.
        """
        similarity = self.visual_similarity(features.visual, visual_keys)
        threshold, kept = self.hard_filter(similarity, features)
        if has_image is not None:
            kept = kept & has_image[:, None]
        experts = kept.any(0).nonzero().flatten()
        kept = kept[:, experts]
        scores = text_similarity(features.text, text_keys[experts])
        if self.newest_wins:
            # Differs from the paper: edits of other questions are not used at all, not a little.
            kept = kept & (torch.sigmoid(scores) > LEAST_WEIGHT)
            margin = self.visual_logits(similarity[:, experts] - threshold[:, None])
            kept = kept & ~superseded(kept & (margin > SAME_FACT_MARGIN) & (scores > 0))
        return Routing(similarity, threshold, experts, soft_weights(scores, kept))

    def losses(
        self,
        features: Features,
        similarity: Tensor,
        text_keys: Tensor,
        owner: Tensor,
        in_scope: Tensor,
        untouched: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the routing losses of n queries: Eq. (13), Eq. (15) and Eq. (16).

        similarity (n, B) with the visual keys of B edits, whose text_keys (B + L, K, M) come first;
        owner (n,) is a query's edit, in_scope (n,) whether that edit changes its answer. untouched
        (B, K, M): psi_bar of another question about each edit's picture, the negatives of Eq. (15);
        None: random other edits, as in the paper.
        """
        similar = self.visual_logits(similarity)
        sentinel = self.visual_logits(self.sentinel_similarity(features))
        losses = {"filter": hard_filter_loss(similar, sentinel, owner, in_scope)}
        scores, own = text_similarity(features.text[in_scope], text_keys), owner[in_scope]
        batch = similarity.shape[1]
        if untouched is None:
            other = (own + torch.randint(1, batch, own.shape, device=own.device)) % batch
            unwanted = scores.gather(1, other[:, None])
        else:
            # Differs from Eq. (15): the negative is no random other edit, which may ask the very
            # same, but another question about the edited picture: the filter lets it by. And it is
            # a query that the edit's key must not attract; the paper takes the negative's key.
            unwanted = text_similarity(untouched, text_keys[:batch]).diagonal()
        losses["sigmoid"], losses["softmax"] = soft_router_losses(scores, own, unwanted)
        return losses


def text_similarity(text: Tensor, keys: Tensor) -> Tensor:
    """Compute s_e of Eq. (7): (B, K, M) and (N, K, M) -> (B, N).

    Dot products rescaled by sqrt(M), averaged over the K slots.
    """
    return text.flatten(1) @ keys.flatten(1).T / (keys.shape[1] * keys.shape[2] ** 0.5)


def raised_by_dropped(sentinel: Tensor, similar: Tensor) -> Tensor:
    """Raise the sentinel's logits (B,) by those of the experts, similar (B, N), that are dropped.

    The least similar expert is dropped unless it is greater than the sentinel; the next one, unless
    it is greater than the sentinel and the first together; and so on. Eq. (13) trains the filter to
    tell an expert from the sentinel and all other experts together, so that among thousands of
    edits none is kept only because one of so many comes near enough.
    """
    above = similar > sentinel[:, None]
    below = similar.masked_fill(above, -torch.inf)  # these are dropped, in whatever order
    together = torch.cat([sentinel[:, None], below], dim=1).logsumexp(dim=1)
    near = above.any(0)  # few: only these need an order
    ascending = similar[:, near].masked_fill(~above[:, near], -torch.inf).sort(dim=1).values
    # In column k the k least similar of them, and all others.
    together = torch.cat([together[:, None], ascending], dim=1).logcumsumexp(dim=1)
    dropped = (ascending <= together[:, :-1]).int().cumprod(dim=1).sum(dim=1, keepdim=True)
    return together.gather(1, dropped).squeeze(1)


def superseded(same_fact: Tensor) -> Tensor:
    """Mark all but the last expert of each row, same_fact (B, n) in the order of editing.

    Differs from the paper, in which edits of one picture and question blend half and half: experts
    that a query clearly means speak of one fact, and of these the newest counts.
    """
    newer = same_fact.flip(1).cumsum(1).flip(1)  # how many from here on
    return same_fact & (newer > 1)


def soft_weights(scores: Tensor, kept: Tensor) -> Tensor:
    """Weigh the kept experts by their text scores (B, n): weights (B, n), 0 where dropped."""
    # The lowest finite number, not -inf: a row that keeps nothing then has no NaN in its gradient.
    lowest = torch.finfo(scores.dtype).min
    shares = scores.masked_fill(~kept, lowest).softmax(dim=-1)
    # Eq. (7): w_e = sigmoid(s_e) * softmax over the kept experts (s_e)
    return torch.where(kept, torch.sigmoid(scores) * shares, 0.0)


def hard_filter_loss(similar: Tensor, sentinel: Tensor, own: Tensor, in_scope: Tensor) -> Tensor:
    """Compute Eq. (13) for n queries and B experts.

    similar (n, B) and sentinel (n,) are logits with the experts and with the query's own sentinel;
    own (n,) is the query's expert, in_scope (n,) whether that edit changes the query's answer. Such
    a query must prefer its expert to all others and to the sentinel, any other query the sentinel.
    Differs from Eq. (13): a query in scope is out of scope of every *other* edit, so without its
    own expert it must prefer the sentinel too. Without this term nothing pushes other edits below
    the threshold of a dense stream. And the temperature is learned, where cosines are compared.
    """
    logits = torch.cat([similar, sentinel[:, None]], dim=1)  # (n, B + 1)
    last = torch.full_like(own, similar.shape[1])
    without_own = logits.scatter(1, own[:, None], -torch.inf)
    # Eq. (13), and its third term
    loss = nce(logits[in_scope], own[in_scope]) + nce(without_own[in_scope], last[in_scope])
    if not in_scope.all():
        loss = loss + nce(logits[~in_scope], last[~in_scope])
    return loss


def soft_router_losses(scores: Tensor, own: Tensor, unwanted: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (l_sr1, l_sr2) of n queries in scope of an edit.

    scores (n, B + L) are text similarities with the keys of B edits and of L locality samples; own
    (n,) is the query's expert; unwanted, of any shape, are the similarities of negatives.
    """
    own_score = scores.gather(1, own[:, None]).squeeze(1)
    # Eq. (15): -log sigmoid(s_own) - log(1 - sigmoid(s_negative))
    l_sr1 = -F.logsigmoid(own_score).mean() - F.logsigmoid(-unwanted).mean()
    # Eq. (16): the own expert's key against the keys of all edits and of all locality samples
    l_sr2 = nce(scores, own)
    return l_sr1, l_sr2
