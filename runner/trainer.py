"""TRL's GRPO trainer without the work that changes no gradient.

Much of a training step on MATH teaches nothing. In most groups all completions are wrong, so their
advantages are 0, and so are their gradients. TRL pads each completion to the longest of 128, so a
part of what it computes is padding. `Trainer` leaves both out. The loss stays TRL's own.
"""

import torch
from trl import GRPOTrainer

Batch = dict[str, torch.Tensor]  # TRL's: a row of each tensor is one completion
WIDTH_STEP = 64  # widths of batches are multiples of it: a GPU prepares kernels for each new shape


class Trainer(GRPOTrainer):
    """`GRPOTrainer`, its micro-batches arranged by `arranged`.

    The gradient of a step is TRL's up to rounding. Logged means over tokens, such as `entropy`, are
    those of the completions that were kept. It needs `loss_type="dapo"`, whose tokens weigh the
    same in every micro-batch; with another loss it is TRL's trainer unchanged.
    """

    _arranged: list[Batch] | None = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Batches differ in shape, and cuDNN's attention prepares each new one. Measured on an H200:
        # a quarter of the training part (notebooks/appendix/throughput.ipynb).
        torch.backends.cuda.enable_cudnn_sdp(False)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self.loss_type != "dapo":
            return inputs
        if self._buffered_inputs is not self._arranged:  # there are new rollouts
            self._arranged = arranged(self._buffered_inputs, keep_all=self.beta != 0)
            self._buffered_inputs = self._arranged
        return self._arranged[self._step % self.args.steps_per_generation]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """TRL's, or nothing for a micro-batch without a completion.

        Each call sets every module to training mode, and LoRA makes thousands of them. The first
        micro-batch asks for rollouts, and at the last one TRL notes the time: these are not left
        out.
        """
        position = self._step % self.args.steps_per_generation
        inside = 0 < position < self.args.steps_per_generation - 1
        if inside and self._arranged and not len(self._arranged[position]["advantages"]):
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss; for a micro-batch without a completion 0."""
        if len(inputs["advantages"]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        trained = next(weight for weight in model.parameters() if weight.requires_grad)
        return 0.0 * trained.sum()  # the trainer calls backward() on it


def arranged(micro_batches: list[Batch], keep_all: bool) -> list[Batch]:
    """The same number of micro-batches with only those completions that have a gradient.

    Completions are sorted by length, so that those in one micro-batch need little padding. Each
    micro-batch holds as many as fit into the token positions of one of those given, so memory does
    not grow. What is left over at the end is empty.

    keep_all: whether completions with advantage 0 have a gradient, that of the KL term.
    """
    whole = joined(micro_batches)
    widest = whole["prompt_ids"].shape[1] + whole["completion_ids"].shape[1]
    positions = len(micro_batches[0]["advantages"]) * widest

    prompt_tokens = rounded_up(whole["prompt_mask"])
    completion_tokens = rounded_up(whole["completion_mask"])
    kept = torch.ones_like(whole["advantages"], dtype=torch.bool)
    if not keep_all:
        kept = whole["advantages"] != 0
    if not kept.any():
        kept[0] = True  # the optimiser must see a gradient of 0, not none
    longest_first = (prompt_tokens + completion_tokens).argsort(descending=True, stable=True)
    rows = longest_first[kept[longest_first]]

    lengths = list(zip(prompt_tokens[rows].tolist(), completion_tokens[rows].tolist(), strict=True))
    new = []
    start = 0
    for size in sizes(lengths, positions):
        new.append(trimmed(whole, rows[start:start + size]))
        start += size
    empty = [trimmed(whole, rows[:0])] * (len(micro_batches) - len(new))
    return new + empty


def joined(micro_batches: list[Batch]) -> Batch:
    """One batch of all completions. A tensor without rows is the same in every micro-batch."""
    first = micro_batches[0]
    return {name: tensor if tensor.ndim == 0 else torch.cat([part[name] for part in micro_batches])
            for name, tensor in first.items() if tensor is not None}


def rounded_up(mask: torch.Tensor) -> torch.Tensor:
    """Tokens of each row, rounded up to a multiple of WIDTH_STEP that is at most the width."""
    tokens = mask.sum(1)
    multiple = (tokens + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP
    return multiple.clamp(max=mask.shape[1])


def sizes(lengths: list[tuple[int, int]], positions: int) -> list[int]:
    """How many completions go into each micro-batch, in this order.

    lengths: tokens of prompt and completion. Prompts are padded to the longest in the micro-batch,
    and completions likewise; both together take at most `positions`.
    """
    counts: list[int] = []
    prompt = completion = 0
    for p, c in lengths:
        prompt, completion = max(prompt, p), max(completion, c)
        if counts and (counts[-1] + 1) * (prompt + completion) <= positions:
            counts[-1] += 1
        else:
            counts.append(1)
            prompt, completion = p, c
    return counts


def trimmed(whole: Batch, rows: torch.Tensor) -> Batch:
    """Some rows of a batch without columns that are padding in all of them, up to WIDTH_STEP.

    Prompts are padded on the left, completions and what is known of their tokens on the right.
    """
    batch = {name: tensor if tensor.ndim == 0 else tensor[rows] for name, tensor in whole.items()}
    if not len(rows):
        return batch
    prompt = int(rounded_up(batch["prompt_mask"]).max())
    completion = int(rounded_up(batch["completion_mask"]).max())
    for name, tensor in batch.items():
        if tensor.ndim < 2:
            continue
        by_prompt = name.startswith("prompt")
        batch[name] = tensor[:, tensor.shape[1] - prompt:] if by_prompt else tensor[:, :completion]
    return batch
