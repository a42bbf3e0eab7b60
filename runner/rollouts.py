"""Completions from a vLLM server that many runs share: the client, and TRL's `rollout_func`.

All runs of a study share a base policy, and each has a LoRA adapter of its own. At every step a
run sends its adapter to the server and asks for the completions of its batch (`runner.server` is
the other side).

An adapter gets a new name at every step. vLLM keeps the keys and values of prompts by the
adapter's name, so an adapter that was replaced under its old name could be answered from those of
the last step.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from runner import engines
from runner.engines import BASE

PATIENCE = 600  # seconds that a run waits for a server which is being started again
FINAL_ONLY = 2  # vLLM's RequestOutputKind: else it answers with those that end last, not with all n
AT_ONCE = 512  # requests in flight from one client
SILENT = 1e-3  # an adapter whose largest weight in B is above this must change some probability
NEAR = 0.3  # largest mean difference of log-probabilities of one policy in two programs


# --- the client -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """Token ids of one completion, its end token included, and their log-probabilities.

    `logprobs` is None unless they were asked for.
    """

    ids: list[int]
    logprobs: list[float] | None


class RequestRefused(RuntimeError):
    """The server answered, and the answer was no."""

    def __init__(self, path: str, status: int, reason: str):
        super().__init__(f"the rollout server refused {path} with status {status}: {reason[:300]}")
        self.status = status


class Client:
    """Requests to one server. Each call waits and repeats while the server is being restarted."""

    def __init__(self, url: str, key: str):
        self.url = url.rstrip("/")
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
        self.http = httpx.Client(
            base_url=self.url, limits=limits, timeout=httpx.Timeout(1800, connect=10),
            headers={"Authorization": f"Bearer {key}"})

    def models(self) -> dict[str, int | None]:
        """Names that the server knows, base and adapters, and the longest sequence (tokens)."""
        found = self._send("GET", "/v1/models")["data"]
        return {model["id"]: model.get("max_model_len") for model in found}

    def load(self, name: str, folder: Path):
        """Make the adapter in `folder` available under `name`."""
        self._send("POST", "/v1/load_lora_adapter",
                   json={"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str):
        """Forget an adapter. One that a restarted server never saw is no error."""
        self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name},
                   accept=(400, 404))

    def complete(self, model: str, prompt_ids: list[int], **sampling) -> list[Completion]:
        """Complete one prompt. sampling: vLLM's SamplingParams, such as n, seed, max_tokens."""
        body = {"model": model, "token_ids": prompt_ids,
                "sampling_params": {"detokenize": False, "output_kind": FINAL_ONLY, **sampling}}
        choices = self._send("POST", "/inference/v1/generate", json=body)["choices"]
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return [Completion(choice["token_ids"], _logprobs(choice)) for choice in ordered]

    def score(self, model: str, prompt_ids: list[int]) -> list[float]:
        """Log-probabilities of the prompt's own tokens, without the first."""
        body = {"model": model, "token_ids": prompt_ids,
                "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}}
        positions = self._send("POST", "/inference/v1/generate", json=body)["prompt_logprobs"]
        return [position[str(token)]["logprob"]
                for token, position in zip(prompt_ids[1:], positions[1:], strict=True)]

    def _send(self, method: str, path: str, accept: tuple[int, ...] = (), **options):
        """Send a request and return the answer's JSON, or its text."""
        answer = self._answer(method, path, **options)
        if answer.status_code == 401:
            raise RuntimeError(f"the rollout server at {self.url} refuses the key: set "
                               f"{engines.ROLLOUT_KEY} to the one that it was started with")
        if answer.is_error and answer.status_code not in accept:
            raise RequestRefused(path, answer.status_code, answer.text)
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.json() if is_json else answer.text

    def _answer(self, method: str, path: str, **options) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.http.request(method, path, **options)
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the rollout server at {self.url} has not answered for {PATIENCE} s "
                        f"({type(error).__name__}): look at its log, start it again, and repeat "
                        "the command; the run goes on from its last checkpoint") from None
                time.sleep(1)


def _logprobs(choice: dict) -> list[float] | None:
    if not choice.get("logprobs"):
        return None
    return [token["logprob"] for token in choice["logprobs"]["content"]]


def request_seed(seed: int, *place: int) -> int:
    """The seed of one request: a pure function of the run's seed and the request's place.

    So a run draws the same random numbers alone, in company, and after a resume. The n completions
    of the request use this seed, the next one, and so on.
    """
    key = "/".join(map(str, (seed, *place))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


# --- rollouts of one run --------------------------------------------------------------------------


class Rollouts:
    """TRL's `rollout_func` of one run: completions from the server, with this step's adapter.

    After each call, `metrics` holds what `Watch` in 02_train writes to the log: seconds, how far
    the adapter moved a fixed prompt from the base and from the last step, and how far engine and
    trainer differ.
    """

    def __init__(self, client: Client, run_id: str, params, tokenizer, stop_token_ids: list[int]):
        self.client, self.params, self.tokenizer = client, params, tokenizer
        self.run_id = run_id
        self.process = secrets.token_hex(2)  # a restarted run must not meet its own old adapters
        self.sampling = {"temperature": params.temperature, "max_tokens":
                         params.max_completion_length, "stop_token_ids": stop_token_ids}
        self.loaded: str | None = None
        self.metrics: dict[str, float] = {}
        self._probe: list[int] = []  # a prompt whose log-probabilities show which policy answers
        self._of_base: list[float] = []
        self._of_last_step: list[float] = []
        self._refuse_short_sequences()
        self._forget_adapters_of_a_killed_process()

    def __call__(self, prompts: list[str], trainer) -> dict[str, list | None]:
        """Complete prompts, each of which stands `num_generations` times in a row."""
        began = time.monotonic()
        step, group = trainer.state.global_step, trainer.num_generations
        unique = [self.tokenizer(prompt)["input_ids"] for prompt in prompts[::group]]
        policy = trainer.accelerator.unwrap_model(trainer.model)

        name = f"{self.run_id}@{step}-{self.process}"
        folder = self._send_adapter(policy, name)
        try:
            self._prove(trainer, policy, name, unique[0])
            answers = self._complete(name, folder, unique, group, step)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.metrics["seconds/engine"] = time.monotonic() - began
        self._compare(trainer, policy, unique[0], answers[0])

        completions = [completion for answer in answers for completion in answer]
        return {"prompt_ids": [ids for ids in unique for _ in range(group)],
                "completion_ids": [completion.ids for completion in completions],
                "logprobs": None}  # TRL would use them only with its own vLLM

    def _refuse_short_sequences(self):
        known = self.client.models()
        if BASE not in known:
            raise ValueError(f"the server at {self.client.url} serves {', '.join(known)}: start it "
                             f"with --served-model-name {BASE}")
        needed = self.params.max_prompt_length + self.params.max_completion_length
        if needed > known[BASE]:
            raise ValueError(f"the rollout server serves sequences of {known[BASE]} tokens, and "
                             f"this run needs {needed}: start it with --max-model-len {needed}, "
                             "or lower max_completion_length")

    def _forget_adapters_of_a_killed_process(self):
        for name in self.client.models():
            if name.startswith(f"{self.run_id}@"):
                self.client.unload(name)

    def _send_adapter(self, policy, name: str) -> Path:
        """Save the adapter as it is now, in memory, and load it under the name of this step."""
        memory = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=memory if memory.is_dir() else None))
        policy.save_pretrained(folder, state_dict=as_served(policy))
        if self.loaded:
            self.client.unload(self.loaded)
        try:
            self.client.load(name, folder)
        except RequestRefused as refused:
            raise RuntimeError(f"{refused}. This run's lora_rank is {self.params.lora_rank}: the "
                               "server must be started with at least that as --max-lora-rank"
                               ) from None
        self.loaded = name
        return folder

    def _prove(self, trainer, policy, name: str, first_prompt: list[int]):
        """Check that the server has this run's base policy, and answers with this step's adapter.

        The probe is the first prompt of the run. RuntimeError if the base policy of the server is
        another one, or if an adapter that is no longer zero changes nothing.
        """
        if not self._of_base:
            self._probe = first_prompt
            self._of_base = self.client.score(BASE, self._probe)
            with policy.disable_adapter():
                own, = own_logprobs(trainer, policy, self._probe[:1], [self._probe[1:]])
            apart = mean_distance(self._of_base, own)
            if apart > NEAR:
                raise RuntimeError(
                    "the base policy of the rollout server is not this run's: log-probabilities "
                    f"of a prompt differ by {apart:.2f} on average. Start the server with this "
                    f"run's model, {self.params.model}")
        scores = self.client.score(name, self._probe)
        moved = max_distance(scores, self._of_base)
        if moved == 0 and largest_of_b(policy) > SILENT:
            raise RuntimeError("the rollout server answers with the base policy instead of this "
                               "run's adapter: the adapter changes no log-probability of a prompt")
        self.metrics["engine/moved_from_base"] = moved
        if self._of_last_step:
            self.metrics["engine/moved_in_a_step"] = max_distance(scores, self._of_last_step)
        self._of_last_step = scores

    def _complete(self, name: str, folder: Path, prompts: list[list[int]], group: int,
                  step: int) -> list[list[Completion]]:
        """Ask for all groups at once. The first brings its log-probabilities, for `_compare`."""
        def ask(i: int) -> list[Completion]:
            sampling = self.sampling | {"n": group, "seed": request_seed(self.params.seed, step, i)}
            if i == 0:
                sampling["logprobs"] = 0
            try:
                return self.client.complete(name, prompts[i], **sampling)
            except RequestRefused as refused:
                if refused.status != 404:
                    raise
            self._load_again(name, folder)  # the server was restarted, and has forgotten it
            return self.client.complete(name, prompts[i], **sampling)

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(ask, range(len(prompts))))

    def _load_again(self, name: str, folder: Path):
        try:
            self.client.load(name, folder)
        except RequestRefused:
            if name not in self.client.models():  # another request of this run was not faster
                raise

    def _compare(self, trainer, policy, prompt: list[int], group: list[Completion]):
        """Log how far engine and trainer differ on the tokens of one group."""
        ids = [completion.ids for completion in group]
        own = own_logprobs(trainer, policy, prompt, ids, self.params.temperature)
        differences = []
        for ours, completion in zip(own, group, strict=True):
            differences += [abs(a - b) for a, b in zip(ours, completion.logprobs, strict=True)]
        self.metrics["engine/logprob_difference_mean"] = sum(differences) / len(differences)
        self.metrics["engine/logprob_difference_max"] = max(differences)


@torch.no_grad()
def own_logprobs(trainer, policy, prompt: list[int], completions: list[list[int]],
                 temperature: float = 1.0) -> list[list[float]]:
    """The trainer's log-probabilities of the tokens of each completion, computed as in its loss."""
    longest = max(map(len, completions))
    padded = [prompt + ids + [0] * (longest - len(ids)) for ids in completions]  # nothing sees it
    ids = torch.tensor(padded, device=policy.device)
    with trainer.compute_loss_context_manager():
        logits = policy(ids, logits_to_keep=longest + 1).logits[:, :-1]

    found = []
    for row, tokens in zip(logits, completions, strict=True):  # in turn: the vocabulary is large
        logprobs = (row[:len(tokens)].float() / temperature).log_softmax(-1)
        chosen = torch.tensor(tokens, device=policy.device)
        found.append(logprobs.gather(1, chosen[:, None])[:, 0].tolist())
    return found


def as_served(policy) -> dict[str, torch.Tensor]:
    """The adapter's weights in the precision in which the server computes: bf16 on a GPU.

    The server loads an adapter between two tokens of all runs, and so should have little to do.
    """
    weights = {name: weight for name, weight in policy.state_dict().items() if "lora_" in name}
    if policy.device.type == "cuda":
        weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    return weights


def largest_of_b(policy) -> float:
    """The largest weight in LoRA's matrices B, which are zero before training."""
    return max(weight.abs().max().item() for name, weight in policy.named_parameters()
               if "lora_B" in name)


def max_distance(a: list[float], b: list[float]) -> float:
    """The largest difference of two lists of log-probabilities."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def mean_distance(a: list[float], b: list[float]) -> float:
    """The mean absolute difference of two lists of log-probabilities."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def from_environment() -> list[Client]:
    """The server whose address and key are in the environment, as a sweep puts them; else []."""
    url = os.environ.get(engines.ROLLOUT_URL)
    return [Client(url, os.environ.get(engines.ROLLOUT_KEY, ""))] if url else []
