"""lib.gradient: scores against autograd and TRL itself, closed forms against redraws."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from lib import gradient, noise, theory

CHANNELS = [noise.Channel(0.3, 0.3), noise.Channel(0.0, 0.6), noise.Channel(0.6, 0.0), noise.Channel(0.1, 0.4, "group"),
            noise.Channel(0.5, 0.2, "group"), noise.Channel(0.2, 0.1, abstain_rate=0.3),
            noise.Channel(0.2, 0.2, "prompt", 0.4)]
CLEAN = noise.Channel()
G = 4


def policy(seed=0):
    """A Qwen2 of 20 tokens with a LoRA adapter, both of whose factors are random."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def tokenizer():
    """One token a character; ids 0 and 1 are padding and the end of a text."""
    words = ["<pad>", "<eos>", "<unk>", *"0123456789+-=?*/()"]
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:20])}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")


def rollouts(n=3 * G, seed=0):
    """n sequences of random tokens: padding of 0 to 2 on the left, a prompt of 3, a completion of 1 to 5."""
    rng = np.random.default_rng(seed)
    ids, attended, completion = (torch.zeros(n, 10, dtype=torch.long) for _ in range(3))
    for row in range(n):
        left, length = rng.integers(3), rng.integers(1, 6)
        ids[row, left:5 + length] = torch.tensor(rng.integers(2, 20, 5 + length - left))
        attended[row, left:5 + length] = 1
        completion[row, 5:5 + length] = 1
    return ids, attended, completion


def flat_gradient(model):
    """The accumulated gradient in the order of score_vectors."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    return torch.cat([w.grad.flatten() for w in weights])


def fixed_groups(size=G, M=60, D=7, seed=0):
    """Made-up scores (M, size, D) and true rewards (M, size), groups from very hard to very easy."""
    rng = np.random.default_rng(seed)
    t = (rng.random((M, size)) < rng.random((M, 1))).astype(float)
    return rng.normal(size=(M, size, D)) * (2 - t[..., None]) + t[..., None] + 0.3, t


# ---- scores


def test_a_score_is_the_gradient_that_autograd_finds_for_one_completion():
    model, batch = policy(), rollouts()
    scores = gradient.score_vectors(model, *batch, temperature=0.7, batch_size=5)
    for row in range(len(batch[0])):
        model.zero_grad()
        one = [x[row:row + 1] for x in batch]
        gradient.log_probabilities(model, *one, temperature=0.7).sum().backward()
        torch.testing.assert_close(scores[row], flat_gradient(model), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_noisy_loss_is_linear_in_the_advantages():
    model, batch = policy(), rollouts()
    scores = gradient.score_vectors(model, *batch)
    t = np.random.default_rng(1).integers(0, 2, (3, G))
    for chan in CHANNELS:
        r = gradient.redraw(chan, t, ["a", "b", "c"], draws=1)[0]
        A = torch.tensor(theory.advantages(r).ravel(), dtype=torch.float32)
        model.zero_grad()
        (A * gradient.log_probabilities(model, *batch)).sum().backward()
        torch.testing.assert_close(A @ scores, flat_gradient(model), rtol=1e-4, atol=1e-5)


def test_random_directions_keep_scalar_products_on_average():
    model, batch = policy(), rollouts()
    exact = gradient.score_vectors(model, *batch)
    exact = exact @ exact.T
    found = [gradient.score_vectors(model, *batch, directions=gradient.random_directions(model, 400, seed))
             for seed in range(30)]
    products = torch.stack([x @ x.T for x in found])
    error = products.std(0) / 30**0.5
    assert ((products.mean(0) - exact).abs() < 5 * error).all()
    relative = (products - exact).norm(dim=(1, 2)) / exact.norm()
    assert relative.mean() < 0.2


def test_batches_are_projected_onto_the_same_directions():
    model, batch = policy(), rollouts()
    drawn = gradient.random_directions(model, 50)
    whole, parts = (gradient.score_vectors(model, *batch, directions=drawn, batch_size=size) for size in (12, 5))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_weights_outside_linear_layers_are_refused():
    model = policy()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="embed_tokens.weight is trained too: give a model"):
        gradient.score_vectors(model, *rollouts())


def loss_weights(lengths, loss_type, longest):
    """c_j such that TRL's step is sum c_j A_j s_j. Only "grpo" weighs completions differently."""
    n = len(lengths)
    return {"dapo": 1 / lengths.sum() * np.ones(n), "bnpo": 1 / lengths.sum() * np.ones(n),
            "dr_grpo": 1 / (n * longest) * np.ones(n), "grpo": 1 / (lengths * n)}[loss_type]


def trained_weights(model):
    """The weights that score_vectors speaks of, in its order."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    return torch.cat([w.detach().flatten() for w in weights])


def steps_of_trl(model, folder, steps=1, **options):
    """How far TRL's trainer moves the weights in some steps of SGD, and what it last sampled and rewarded."""
    seen = {}

    def reward(prompts, completion_ids, **_):
        seen.update(prompts=prompts, completions=completion_ids)
        seen["r"] = [float((sum(ids) + i) % 3 == 0) for i, ids in enumerate(completion_ids)]
        return seen["r"]

    config = GRPOConfig(
        str(folder), per_device_train_batch_size=12, num_generations=G, max_steps=steps, learning_rate=1.0, optim="sgd",
        max_grad_norm=0.0, lr_scheduler_type="constant", max_completion_length=5, temperature=0.8, use_cpu=True,
        report_to="none", bf16=False, save_strategy="no", disable_dropout=True, **options)
    trainer = GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6="] * 4}),
                          processing_class=tokenizer())
    before = trained_weights(model)
    trainer.train()
    return trained_weights(model) - before, seen


@pytest.mark.parametrize("loss_type, scale", [("dapo", "group"), ("bnpo", "group"), ("grpo", "group"),
                                              ("dr_grpo", "none")])
def test_one_step_of_trl_is_the_sum_of_advantages_times_scores(tmp_path, loss_type, scale):
    moved, seen = steps_of_trl(policy(), tmp_path, loss_type=loss_type, scale_rewards=scale, beta=0.0)
    prompts = [tokenizer()(p)["input_ids"] for p in seen["prompts"]]
    ids = torch.tensor([p + c + [0] * (5 - len(c)) for p, c in zip(prompts, seen["completions"], strict=True)])
    lengths = np.array([len(c) for c in seen["completions"]])
    position = torch.arange(ids.shape[1])
    attended = (position < 4 + torch.tensor(lengths)[:, None]).long()
    scores = gradient.score_vectors(policy(), ids, attended, attended * (position >= 4), temperature=0.8)
    A = theory.advantages(np.reshape(seen["r"], (-1, G)), std=scale == "group").ravel()
    ours = torch.tensor(loss_weights(lengths, loss_type, 5) * A, dtype=torch.float32) @ scores
    assert A.any() and len(set(lengths)) > 1
    torch.testing.assert_close(moved, ours, rtol=1e-3, atol=1e-6)


def test_a_kl_term_adds_nothing_to_the_first_step_of_a_run(tmp_path):
    """There the policy is the term's reference. From the second step on, the term does act."""
    def moved(steps, beta):
        return steps_of_trl(policy(), tmp_path, steps, beta=beta)[0]

    first = moved(1, beta=0.0)
    assert first.any()
    torch.testing.assert_close(moved(1, beta=0.5), first)
    assert not torch.allclose(moved(2, beta=0.5), moved(2, beta=0.0), rtol=1e-3)


# ---- channels


def test_a_redrawn_clean_channel_has_cosine_one():
    scores, t = fixed_groups()
    r = gradient.redraw(CLEAN, t, [str(i) for i in range(len(t))], draws=5)
    steps = np.einsum("rmg,mgd->rd", theory.advantages(r), scores)
    clean = np.einsum("mg,mgd->d", theory.advantages(t), scores)
    assert gradient.cosine(steps, clean) == pytest.approx(np.ones(5))
    g = gradient.groups(scores, t)
    given = gradient.given_right(CLEAN, G)
    step = gradient.step(gradient.products(g, given, gradient.mean_gradients(g, given)), n=10**9)
    assert step.channel == pytest.approx(0) and step.cosine == pytest.approx(1)


def test_redraws_are_what_runs_of_other_noise_seeds_see():
    _, t = fixed_groups(M=3)
    prompts = ["a", "b", "c"]
    r = gradient.redraw(noise.Channel(0.3, 0.3), t, prompts, draws=4)
    for seed in range(4):
        for m, prompt in enumerate(prompts):
            drawn = noise.observe(noise.Channel(0.3, 0.3), t[m], seed, [0] * G, [prompt] * G, range(G))
            assert r[seed, m].tolist() == drawn.tolist()


@pytest.mark.parametrize("chan", CHANNELS, ids=str)
@pytest.mark.parametrize("std", [True, False], ids=["std", "mean-only"])
def test_the_closed_form_agrees_with_redraws(chan, std):
    scores, t = fixed_groups()
    g = gradient.groups(scores, t)
    given = gradient.given_right(chan, G, lambda r: theory.advantages(r, std=std))
    r = gradient.redraw(chan, t, [str(i) for i in range(len(t))], draws=1500)
    drawn = np.einsum("rmg,mgd->rmd", theory.advantages(r, std=std), scores)
    error = drawn.std(0) / 1500**0.5
    assert (np.abs(drawn.mean(0) - gradient.mean_gradients(g, given)) < 5 * error + 1e-9).all()
    squares = (drawn**2).sum(-1)
    error = squares.std(0) / 1500**0.5
    assert (np.abs(squares.mean(0) - gradient.mean_squares(g, given)) < 5 * error + 1e-9).all()


def test_an_estimator_without_a_baseline_has_a_closed_form_too():
    scores, t = fixed_groups()
    g = gradient.groups(scores, t)
    expected = ((1 - 0.1 - 0.3) * (t[..., None] - 1) * scores).sum(1)
    for noise_level in ("rollout", "group"):
        forward = lambda r: r - 0.7  # noqa: E731  (PGFC's weights on the score function, arXiv 2510.00915)
        given = gradient.given_right(noise.Channel(0.1, 0.3, noise_level), G, forward)
        np.testing.assert_allclose(gradient.mean_gradients(g, given), expected, atol=1e-9)


def test_noise_shortens_the_mean_gradient_of_a_group_and_never_bends_it():
    scores, t = fixed_groups()
    g = gradient.groups(scores, t)
    clean = gradient.mean_gradients(g, gradient.given_right(CLEAN, G))
    mixed = (t.sum(1) > 0) & (t.sum(1) < G)
    for chan in CHANNELS:
        noisy = gradient.mean_gradients(g, gradient.given_right(chan, G))
        assert np.abs(gradient.cosine(noisy[mixed], clean[mixed])) == pytest.approx(np.ones(mixed.sum()))
        assert np.abs(noisy[~mixed]).max() < 1e-12


def test_without_std_channel_noise_is_what_each_class_scatters():
    scores, t = fixed_groups()
    a, b = 0.15, 0.45
    g = gradient.groups(scores, t)
    given = gradient.given_right(noise.Channel(a, b), G, lambda r: theory.advantages(r, std=False))
    found = gradient.mean_squares(g, given) - (gradient.mean_gradients(g, given) ** 2).sum(1)
    scatter = ((scores - scores.mean(1, keepdims=True)) ** 2).sum(-1)
    expected = a * (1 - a) * ((1 - t) * scatter).sum(1) + b * (1 - b) * (t * scatter).sum(1)
    np.testing.assert_allclose(found, expected)


def test_a_step_is_signal_sampling_and_channel_noise():
    scores, t = fixed_groups(M=400)
    g, chan, n = gradient.groups(scores, t), noise.Channel(0.2, 0.3), 8
    given, clean = gradient.given_right(chan, G), gradient.given_right(CLEAN, G)
    reference = gradient.mean_gradients(g, clean)
    step = gradient.step(gradient.products(g, given, reference), n)
    rng = np.random.default_rng(5)
    r = gradient.redraw(chan, t, [str(i) for i in range(400)], draws=200)
    drawn = np.einsum("rmg,mgd->rmd", theory.advantages(r), scores)
    batches = np.stack([drawn[rng.integers(200), rng.choice(400, n, replace=False)].mean(0) for _ in range(4000)])
    squares = (batches**2).sum(1)
    assert abs(squares.mean() - sum(step[:3])) < 0.05 * squares.mean()
    along = batches @ reference.mean(0) / np.linalg.norm(reference.mean(0))
    assert step.along == pytest.approx(along.mean(), rel=0.1)
    assert step.signal == pytest.approx((drawn.mean((0, 1)) ** 2).sum(), rel=0.2)


def test_means_of_few_groups_are_not_taken_for_signal():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        t = (rng.random((12, G)) < 0.5).astype(float)
        g = gradient.groups(rng.normal(size=(12, G, 5)), t)  # scores that have nothing to do with truth
        given = gradient.given_right(CLEAN, G)
        found.append(gradient.step(gradient.products(g, given, g.right), 1).signal)
    assert abs(np.mean(found)) < 5 * np.std(found) / 300**0.5


def test_weights_and_groups_of_one_prompt_are_as_if_written_out():
    scores, t = fixed_groups(M=12)
    given = gradient.given_right(noise.Channel(0.2, 0.2), G)

    def products(rows):
        g = gradient.groups(scores[rows], t[rows])
        return gradient.products(g, given, gradient.mean_gradients(g, given), np.repeat(["a", "b", "c", "d"], 3)[rows])

    both = gradient.step(products(np.arange(12)), 4, [[1, 1, 1, 1], [1, 0, 2, 1]])
    assert [x[0] for x in both] == pytest.approx(gradient.step(products(np.arange(12)), 4))
    pairs_of_different_prompts = [(i, j) for i in range(12) for j in range(12) if i // 3 != j // 3]
    mean = gradient.mean_gradients(gradient.groups(scores, t), given)
    weight = np.repeat([1, 0, 2, 1], 3)
    pairs = [weight[i] * weight[j] for i, j in pairs_of_different_prompts]
    signal = np.average([mean[i] @ mean[j] for i, j in pairs_of_different_prompts], weights=pairs)
    assert both.signal[1] == pytest.approx(signal)


def test_coordinates_keep_all_scalar_products():
    scores = np.random.default_rng(0).normal(size=(10, 400))
    small = gradient.coordinates(scores)
    assert small.shape == (10, 10)
    np.testing.assert_allclose(small @ small.T, scores @ scores.T, atol=1e-8)
    assert gradient.coordinates(np.concatenate([scores, scores[:3]])).shape == (13, 10)
