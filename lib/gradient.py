"""What reward noise does to a policy gradient: fixed rollouts, one pass, and then every channel.

A group's gradient is linear in its advantages, g = sum_j A_j s_j, where s_j = grad log pi(o_j) is the
score of completion j. Noise changes the A_j and nothing else. So the scores are computed once
(`score_vectors`), and channels are then redrawn (`redraw`) or averaged exactly (`step`).

Shapes: M groups of G completions, scores of D numbers. `t` holds true rewards (M, G), 0 or 1. An
*estimator* turns observed rewards (..., G), NaN if withheld, into advantages of the same shape:
`theory.advantages` is TRL's. notebooks/appendix/gradient.ipynb derives what is computed here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import multinomial

from lib import noise, theory

Estimator = Callable[[np.ndarray], np.ndarray]


# --- scores: one forward and one backward pass ------------------------------------------------------


def score_vectors(model, input_ids, attention_mask, completion_mask, *, temperature: float = 1.0,
                  directions: int = 0, seed: int = 0, batch_size: int = 128) -> torch.Tensor:
    """Gradients of log pi(o_j) over the trained parameters, one row a completion: (n, parameters).

    input_ids, attention_mask, completion_mask: (n, length); the last marks the tokens of the
    completion. Logits are divided by `temperature`, as TRL does. With `directions` > 0 each row is
    projected onto that many random directions, which keeps scalar products on average; whole rows
    are then never formed. Raises ValueError if anything but weights of linear layers is trained.
    """
    layers = _trained_layers(model)
    rows = []
    for start in range(0, len(input_ids), batch_size):
        part = slice(start, start + batch_size)
        batch = (input_ids[part], attention_mask[part], completion_mask[part])
        recorded = _record(model, layers, batch, temperature)
        if directions:
            generator = torch.Generator().manual_seed(seed)  # the same directions for every batch
            rows.append(sum(_projected(x, d, directions, generator) for x, d in recorded))
        else:
            rows.append(torch.cat([torch.einsum("nto,nti->noi", d, x).flatten(1) for x, d in recorded], 1))
    return torch.cat(rows)


def _trained_layers(model) -> list[torch.nn.Linear]:
    trained = [(module, f"{place}.{name}") for place, module in model.named_modules()
               for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    others = [name for module, name in trained
              if not (isinstance(module, torch.nn.Linear) and name.endswith(".weight"))]
    if others or not trained:
        raise ValueError(f"scores are read off linear layers, and {others[:3] or 'no weight at all'} "
                         "is trained: give a model with a LoRA adapter on its linear layers")
    return [module for module, _ in trained]


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


def _projected(x, d, directions: int, generator) -> torch.Tensor:
    """Scalar products of each completion's gradient with random matrices u v', (n, directions)."""
    u = torch.randn(d.shape[-1], directions, generator=generator).to(d)
    v = torch.randn(x.shape[-1], directions, generator=generator).to(x)
    return ((d @ u) * (x @ v)).sum(1) / directions**0.5


def log_probabilities(model, input_ids, attention_mask, completion_mask, *, temperature=1.0) -> torch.Tensor:
    """log pi(o_j), the sum over the completion's tokens: (n,)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    of_tokens = log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (of_tokens * completion_mask[:, 1:]).sum(1)


def loss_weights(lengths, loss_type: str, max_completion_length: int) -> np.ndarray:
    """c_j such that minus the gradient of TRL's loss is sum_j c_j A_j s_j; lengths: tokens (n,).

    One optimiser step on a batch of n completions on one device. Only "grpo" weighs completions
    differently; the others scale the whole step, so they share one direction.
    """
    lengths = np.asarray(lengths, float)
    weights = {"dapo": np.full_like(lengths, 1 / lengths.sum()),
               "bnpo": np.full_like(lengths, 1 / lengths.sum()),
               "dr_grpo": np.full_like(lengths, 1 / (len(lengths) * max_completion_length)),
               "grpo": 1 / (lengths * len(lengths))}
    return weights[loss_type]


# --- channels: redrawn ------------------------------------------------------------------------------


def redraw(chan: noise.Channel, t: np.ndarray, prompts: list[str], draws: int) -> np.ndarray:
    """Observed rewards (draws, M, G): lib.noise on the same rollouts, under noise seeds 0, 1, 2, ..."""
    groups, G = t.shape
    step = np.zeros(t.size, int)
    ids = np.repeat(np.asarray(prompts, object), G)
    rollout = np.tile(np.arange(G), groups)
    drawn = [noise.observe(chan, t.ravel(), seed, step, ids, rollout) for seed in range(draws)]
    return np.reshape(drawn, (draws, groups, G))


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of the angles between rows of x and y (..., D)."""
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


# --- channels: averaged in closed form --------------------------------------------------------------


class Groups(NamedTuple):
    """All that the closed form needs of fixed groups of G completions, k of them right."""

    right: np.ndarray         # sums of the scores of right completions, (M, D)
    wrong: np.ndarray         # sums of the scores of wrong completions, (M, D)
    right_energy: np.ndarray  # sums of squared lengths of right completions' scores, (M,)
    wrong_energy: np.ndarray
    k: np.ndarray             # (M,)
    G: int


class Step(NamedTuple):
    """A step over n groups. Its mean square is signal + sampling + channel.

    signal: squared length of the mean gradient. sampling: variance that a clean batch would have
    too, because it holds n groups only. channel: variance that the draws of the noise add.
    along: length of the mean's part in the direction of the reference.
    """

    signal: float
    sampling: float
    channel: float
    along: float

    @property
    def cosine(self) -> float:
        """How well one step points where the reference points: along / root mean square length."""
        return self.along / np.sqrt(self.signal + self.sampling + self.channel)

    @property
    def signal_to_noise(self) -> float:
        """Length of the mean gradient over the standard deviation around it."""
        return np.sqrt(max(self.signal, 0.0) / (self.sampling + self.channel))


def groups(scores: np.ndarray, t: np.ndarray) -> Groups:
    """Sums over the right and the wrong completions of each group; scores (M, G, D), t (M, G)."""
    energy = (scores**2).sum(-1)
    right = np.einsum("mg,mgd->md", t, scores)
    return Groups(right, scores.sum(1) - right, (t * energy).sum(1), ((1 - t) * energy).sum(1),
                  t.sum(1).astype(int), t.shape[1])


def compressed(g: Groups) -> Groups:
    """The same groups in as many coordinates as there are vectors; all scalar products stay."""
    both = np.concatenate([g.right, g.wrong])
    values, vectors = np.linalg.eigh(both @ both.T)
    kept = values > values[-1] * 1e-12
    right, wrong = np.split(vectors[:, kept] * np.sqrt(values[kept]), 2)
    return g._replace(right=right, wrong=wrong)


def outcomes(chan: noise.Channel, k: int, G: int) -> tuple[np.ndarray, np.ndarray]:
    """What a channel can make of a group whose first k completions are right: p (n,), rewards (n, G)."""
    a, b, m = chan.false_positive_rate, chan.false_negative_rate, chan.abstain_rate
    if chan.noise_level == "rollout":
        p_right, of_right = _class_outcomes(k, 1 - b, m)
        p_wrong, of_wrong = _class_outcomes(G - k, a, m)
        i, j = np.indices((len(p_right), len(p_wrong))).reshape(2, -1)
        return p_right[i] * p_wrong[j], np.concatenate([of_right[i], of_wrong[j]], axis=1)
    t = (np.arange(G) < k).astype(float)
    one_value = np.full(G, float(a > b))
    rewards = np.stack([1 - t, one_value, t, np.full(G, np.nan)])
    return np.array([min(a, b), abs(a - b), 1 - max(a, b), 0.0]) * (1 - m) + [0, 0, 0, m], rewards


def _class_outcomes(n: int, one: float, withheld: float) -> tuple[np.ndarray, np.ndarray]:
    """All counts of ones and zeros among n exchangeable rewards: p (outcomes,), rewards (outcomes, n)."""
    ones, zeros = np.indices((n + 1, n + 1)).reshape(2, -1)
    shares = [(1 - withheld) * one, (1 - withheld) * (1 - one), withheld]
    p = np.zeros(len(ones))
    possible = ones + zeros <= n
    counts = np.stack([ones, zeros, n - ones - zeros], -1)[possible]
    p[possible] = multinomial.pmf(counts, n, shares) if n else 1.0
    ones, zeros, p = ones[p > 0, None], zeros[p > 0, None], p[p > 0]
    position = np.arange(n)
    return p, np.where(position < ones, 1.0, np.where(position < ones + zeros, 0.0, np.nan))


class Given(NamedTuple):
    """Moments of a group's advantages under a channel, given k right completions; each (G+1,).

    Completions of one class are exchangeable, so two means and five second moments are all there is.
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
    rows = []
    for k in range(G + 1):
        p, rewards = outcomes(chan, k, G)
        A = estimator(rewards)
        right, wrong = A[:, :k].sum(1), A[:, k:].sum(1)
        right_square, wrong_square = (A[:, :k] ** 2).sum(1), (A[:, k:] ** 2).sum(1)
        n, m = max(k, 1), max(G - k, 1)  # an empty class has sums of 0
        rows.append([p @ right / n, p @ wrong / m, p @ right_square / n, p @ wrong_square / m,
                     p @ (right**2 - right_square) / (n * max(k - 1, 1)),
                     p @ (wrong**2 - wrong_square) / (m * max(G - k - 1, 1)), p @ (right * wrong) / (n * m)])
    return Given(*np.array(rows).T)


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


def step(g: Groups, given: Given, reference: np.ndarray, n: int, prompts=None, weights=None) -> Step:
    """What the mean gradient of n such groups is made of, beside a reference such as the clean one.

    reference: a vector a group (M, D), usually `mean_gradients` of the clean channel. Products of
    two means are estimated from pairs of different prompts, so that they have no bias. prompts:
    what each group answers, if several answer one. weights: how often each prompt counts, (prompts,),
    for a bootstrap over prompts.
    """
    mean = mean_gradients(g, given)
    prompts = np.arange(len(mean)) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    belongs = np.eye(prompts.max() + 1)[prompts]
    weights = np.ones(belongs.shape[1]) if weights is None else np.asarray(weights, float)
    each, sizes = weights[prompts], belongs.sum(0)
    pairs = each.sum() ** 2 - ((weights * sizes) ** 2).sum()

    def product(x, y):
        x, y = weights[:, None] * (belongs.T @ x), weights[:, None] * (belongs.T @ y)
        return (x.sum(0) @ y.sum(0) - (x * y).sum()) / pairs

    signal = product(mean, mean)
    within = np.average((mean**2).sum(1), weights=each)
    all_in = np.average(mean_squares(g, given), weights=each)
    along = product(mean, reference) / np.sqrt(product(reference, reference))
    return Step(signal, (within - signal) / n, (all_in - within) / n, along)
