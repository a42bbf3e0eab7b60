"""What reward noise does to a policy gradient: fixed rollouts, one pass, and then every channel.

A group's gradient is linear in its advantages, g = sum_j A_j s_j, where s_j = grad log pi(o_j) is
the score of completion j. Noise changes the A_j and nothing else. So the scores are computed once
(`score_vectors`), and channels are then redrawn (`redraw`) or averaged exactly (`step`).

Shapes: M groups of G completions, scores of D numbers. `t` holds true rewards (M, G), 0 or 1. An
*estimator* turns observed rewards (..., G), NaN if withheld, into advantages of the same shape:
`theory.advantages` is TRL's. notebooks/appendix/gradient.ipynb derives what is computed here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from lib import noise, theory
from lib.audit import outcomes

Estimator = Callable[[np.ndarray], np.ndarray]


# --- scores: one forward and one backward pass ----------------------------------------------------

class Directions(NamedTuple):
    """Random directions u v' of one layer's weight: (outputs, directions), (inputs, directions)."""

    of_outputs: torch.Tensor
    of_inputs: torch.Tensor


def score_vectors(model, input_ids, attention_mask, completion_mask, *, temperature: float = 1.0,
                  directions: list[Directions] | None = None,
                  batch_size: int = 128) -> torch.Tensor:
    """Gradients of log pi(o_j) over the trained parameters, one row a completion: (n, parameters).

    input_ids, attention_mask, completion_mask: (n, length); the last marks the tokens of the
    completion. Logits are divided by `temperature`, as TRL does. With `directions`, drawn by
    `random_directions`, each row is projected onto them, which keeps scalar products on average;
    whole rows are then never formed. ValueError if anything but weights of linear layers is
    trained.
    """
    layers = _trained_layers(model)
    width = sum(layer.weight.numel() for layer in layers)
    if directions:
        width = directions[0].of_outputs.shape[1]
    scores = torch.empty(len(input_ids), width)
    for start in range(0, len(input_ids), batch_size):
        part = slice(start, start + batch_size)
        batch = (input_ids[part], attention_mask[part], completion_mask[part])
        recorded = _record(model, layers, batch, temperature)
        if directions:
            scores[part] = sum(_projected(*layer, drawn)
                               for layer, drawn in zip(recorded, directions, strict=True))
        else:
            exact = [torch.einsum("nto,nti->noi", d, x).flatten(1) for x, d in recorded]
            scores[part] = torch.cat(exact, dim=1)
    return scores


def random_directions(model, count: int, seed: int = 0) -> list[Directions]:
    """Random directions for each trained layer. They take count * (inputs + outputs) numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for layer in _trained_layers(model):
        of_outputs = torch.randn(layer.out_features, count, generator=generator)
        of_inputs = torch.randn(layer.in_features, count, generator=generator)
        drawn.append(Directions(of_outputs.to(model.device), of_inputs.to(model.device)))
    return drawn


def _trained_layers(model) -> list[torch.nn.Linear]:
    layers = []
    for place, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                continue
            if not isinstance(module, torch.nn.Linear) or name != "weight":
                raise ValueError(f"scores are read off linear layers, and {place}.{name} is "
                                 "trained too: give a model with LoRA on its linear layers")
            layers.append(module)
    return layers


def _record(model, layers, batch, temperature) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer was given, (n, length, in), and the gradient at its output, (n, length, out).

    One backward pass of the sum of all log-probabilities is enough: completion j's own gradient of
    a weight is the sum over its tokens of gradient times input.
    """
    inputs, outputs = {}, {}

    def keep(layer, given, out):
        out.retain_grad()
        inputs[layer], outputs[layer] = given[0].detach(), out

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        log_probabilities(model, *batch, temperature=temperature).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return [(inputs[layer].float(), outputs[layer].grad.float()) for layer in layers]


def _projected(x, d, drawn: Directions) -> torch.Tensor:
    """Scalar products of each completion's gradient with random matrices u v', (n, directions)."""
    u, v = drawn
    return ((d @ u) * (x @ v)).sum(1) / u.shape[1]**0.5


def log_probabilities(model, input_ids, attention_mask, completion_mask, *, temperature=1.0):
    """log pi(o_j), the sum over the completion's tokens: (n,)."""
    columns = completion_mask.any(0).nonzero().flatten()
    first = max(1, int(columns[0]))  # logits before the first completion are not computed
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                   logits_to_keep=input_ids.shape[1] - first + 1).logits
    log_p = torch.log_softmax(logits[:, :-1].float() / temperature, -1)
    of_tokens = log_p.gather(-1, input_ids[:, first:, None]).squeeze(-1)
    return (of_tokens * completion_mask[:, first:]).sum(1)


# --- channels: redrawn ----------------------------------------------------------------------------


def redraw(chan: noise.Channel, t: np.ndarray, prompts: list[str], draws: int) -> np.ndarray:
    """Observed rewards (draws, M, G): lib.noise on the same rollouts, noise seeds 0, 1, 2, ..."""
    groups, G = t.shape
    step = np.zeros(t.size, int)
    ids = np.repeat(np.asarray(prompts, object), G)
    rollout = np.tile(np.arange(G), groups)
    drawn = [noise.observe(chan, t.ravel(), seed, step, ids, rollout) for seed in range(draws)]
    return np.reshape(drawn, (draws, groups, G))


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of the angles between rows of x and y (..., D)."""
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


# --- channels: averaged in closed form ------------------------------------------------------------


class Groups(NamedTuple):
    """All that the closed form needs of fixed groups of G completions, k of them right."""

    right: np.ndarray         # sums of the scores of right completions, (M, D)
    wrong: np.ndarray         # sums of the scores of wrong completions, (M, D)
    right_energy: np.ndarray  # sums of squared lengths of right completions' scores, (M,)
    wrong_energy: np.ndarray
    k: np.ndarray             # (M,)
    G: int


def groups(scores: np.ndarray, t: np.ndarray) -> Groups:
    """Sums over the right and the wrong completions of each group; scores (M, G, D), t (M, G)."""
    energy = (scores**2).sum(-1)
    right = np.einsum("mg,mgd->md", t, scores)
    return Groups(right, scores.sum(1) - right, (t * energy).sum(1), ((1 - t) * energy).sum(1),
                  t.sum(1).astype(int), t.shape[1])


def coordinates(scores: np.ndarray) -> np.ndarray:
    """The same vectors (n, D) in at most n coordinates: all their scalar products stay."""
    pieces = np.array_split(scores, 1 + scores.shape[1] // 50_000, axis=1)
    products = sum((piece @ piece.T).astype(float) for piece in pieces)  # float32 adds up errors
    values, vectors = np.linalg.eigh(products)
    kept = values > values[-1] * 1e-6
    return vectors[:, kept] * np.sqrt(values[kept])


class Given(NamedTuple):
    """Moments of a group's advantages under a channel, given k right completions; each (G+1,).

    Completions of one class are exchangeable, so two means and five second moments are all.
    """

    right: np.ndarray        # E[A_i], i right
    wrong: np.ndarray
    right_same: np.ndarray   # E[A_i^2], i right
    wrong_same: np.ndarray
    right_other: np.ndarray  # E[A_i A_j], i and j two right completions
    wrong_other: np.ndarray
    across: np.ndarray       # E[A_i A_j], i right and j wrong


def given_right(chan: noise.Channel, G: int, estimator: Estimator = theory.advantages) -> Given:
    """Enumerate what the channel can show of groups with 0 to G right completions."""
    of_k = [_moments(*outcomes(k, G, chan), k, estimator) for k in range(G + 1)]
    return Given(*np.transpose(of_k))


def _moments(p, rewards, k: int, estimator: Estimator) -> list[float]:
    p, A = p[p > 0], estimator(rewards[p > 0])
    right, wrong = A[:, :k], A[:, k:]
    n, m = max(k, 1), max(wrong.shape[1], 1)  # the sums over an empty class are 0
    right_same, wrong_same = p @ (right**2).sum(1), p @ (wrong**2).sum(1)
    right_other = p @ right.sum(1) ** 2 - right_same
    wrong_other = p @ wrong.sum(1) ** 2 - wrong_same
    return [p @ right.sum(1) / n, p @ wrong.sum(1) / m, right_same / n, wrong_same / m,
            right_other / (n * max(n - 1, 1)), wrong_other / (m * max(m - 1, 1)),
            p @ (right.sum(1) * wrong.sum(1)) / (n * m)]


def mean_gradients(g: Groups, given: Given) -> np.ndarray:
    """Each group's gradient averaged over the channel's draws, (M, D).

    With advantages that sum to 0 it is a multiple of right/k - wrong/(G-k), whatever the channel:
    noise shortens the mean gradient of a group, or reverses it, but cannot bend it.
    """
    return given.right[g.k, None] * g.right + given.wrong[g.k, None] * g.wrong


def mean_squares(g: Groups, given: Given) -> np.ndarray:
    """Each group's mean squared length of the gradient over the channel's draws, (M,)."""
    same_right = (given.right_same - given.right_other)[g.k] * g.right_energy
    same_wrong = (given.wrong_same - given.wrong_other)[g.k] * g.wrong_energy
    return (same_right + same_wrong + given.right_other[g.k] * (g.right**2).sum(1)
            + given.wrong_other[g.k] * (g.wrong**2).sum(1)
            + 2 * given.across[g.k] * (g.right * g.wrong).sum(1))


class Products(NamedTuple):
    """Sums and scalar products of P prompts' gradients, from which any step follows."""

    noisy: np.ndarray      # mean noisy gradients with each other, (P, P)
    across: np.ndarray     # mean noisy gradients with the reference, (P, P)
    reference: np.ndarray  # the reference with itself, (P, P)
    within: np.ndarray     # squared lengths of mean noisy gradients, summed over groups, (P,)
    everything: np.ndarray  # mean squared lengths of noisy gradients, summed over groups, (P,)
    sizes: np.ndarray      # groups, (P,)


def products(g: Groups, given: Given, reference: np.ndarray, prompts=None) -> Products:
    """Bring a channel and fixed groups together; reference: a vector a group, (M, D).

    The reference usually is `mean_gradients` of the clean channel. prompts: what each group
    answers, if several groups answer one prompt.
    """
    mean = mean_gradients(g, given)
    prompts = range(len(mean)) if prompts is None else prompts
    belongs = np.equal.outer(np.unique(prompts), prompts).astype(float)
    noisy, reference = belongs @ mean, belongs @ reference
    within, everything = belongs @ (mean**2).sum(1), belongs @ mean_squares(g, given)
    return Products(noisy @ noisy.T, noisy @ reference.T, reference @ reference.T,
                    within, everything, belongs.sum(1))


class Step(NamedTuple):
    """A step over n groups. Its mean square is signal + sampling + channel.

    signal: squared length of the mean gradient. sampling: variance that a clean batch would have
    too, because it holds n groups only. channel: variance that the draws of the noise add.
    along: length of the mean's part in the direction of the reference.
    """

    signal: np.ndarray
    sampling: np.ndarray
    channel: np.ndarray
    along: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """Length of the mean gradient; NaN if its square is estimated below 0."""
        return _root(self.signal)

    @property
    def cosine(self) -> np.ndarray:
        """How well one step points along the reference: along / root mean square length."""
        return self.along / _root(self.signal + self.sampling + self.channel)

    @property
    def signal_to_noise(self) -> np.ndarray:
        """Length of the mean gradient over the standard deviation around it."""
        return self.length / _root(self.sampling + self.channel)


def _root(square):
    return np.sqrt(np.where(square < 0, np.nan, square))


def step(p: Products, n: int, weights=None) -> Step:
    """What the mean gradient of n groups is made of.

    weights: how often each prompt counts, (P,), or (resamples, P) for a bootstrap over prompts.
    Products of two means come from pairs of different prompts, so that they have no bias: with
    few prompts a squared length can be negative, and what depends on it is NaN.
    """
    w = np.ones(len(p.sizes)) if weights is None else np.asarray(weights, float)
    groups_in = w @ p.sizes
    pairs = groups_in**2 - w**2 @ p.sizes**2

    def of_means(matrix):
        return (((w @ matrix) * w).sum(-1) - w**2 @ np.diag(matrix)) / pairs

    signal, within = of_means(p.noisy), w @ p.within / groups_in
    channel = w @ (p.everything - p.within) / groups_in
    reference = _root(of_means(p.reference))
    along = of_means(p.across) / np.where(reference > 0, reference, np.nan)
    return Step(signal, (within - signal) / n, channel / n, along)
