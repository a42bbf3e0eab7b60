"""A stand-in for a vLLM server: the same routes, answered by transformers on a CPU, for tests.

    python -m stand_in_server --model FOLDER --port N ...      (the options of vLLM's server)

It samples for real, from the base model or from an adapter, so a run can be trained against it.
What vLLM itself does is tested by `make test-vllm`. It answers at once, and loads torch and the model when they are
first asked for: a server that is only started and killed needs neither.
"""

import argparse
import json
import os
import threading
from contextlib import nullcontext
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Models:
    """The base model and its adapters; one request at a time."""

    def __init__(self, folder: str):
        self.folder = folder
        self.adapters: dict[str, str] = {}  # name of an adapter -> what peft calls it, without dots
        self.loaded = 0
        self.lock = threading.Lock()

    @cached_property
    def model(self):
        """The base model; from the first adapter on, a model of peft."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def load(self, name: str, folder: str):
        from peft import PeftModel

        self.loaded += 1
        self.adapters[name] = own = f"adapter{self.loaded}"
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, adapter_name=own)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=own).eval()

    def unload(self, name: str):
        own = self.adapters.pop(name)
        if self.adapters:  # peft keeps one
            self.model.set_adapter(next(iter(self.adapters.values())))
            self.model.delete_adapter(own)

    def as_named(self, name: str):
        """A context in which the model is the base, or has this adapter."""
        if name != "base":
            self.model.set_adapter(self.adapters[name])
        elif self.loaded:
            return self.model.disable_adapter()
        return nullcontext()

    def complete(self, name, prompt, max_tokens, n=1, seed=0, temperature=1.0, stop_token_ids=(),
                 **_) -> list[dict]:
        import torch

        ids = torch.tensor([prompt] * n)
        torch.manual_seed(seed)
        how = {"do_sample": True, "top_k": 0, "temperature": temperature}
        if temperature == 0:
            how, temperature = {"do_sample": False}, 1.0
        with torch.no_grad(), self.as_named(name):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                pad_token_id=0, eos_token_id=list(stop_token_ids), output_logits=True,
                return_dict_in_generate=True, **how)
        logprobs = (torch.stack(out.logits, 1) / temperature).log_softmax(-1)
        choices = []
        for i, tokens in enumerate(out.sequences[:, len(prompt):].tolist()):
            ends = [j + 1 for j, token in enumerate(tokens) if token in stop_token_ids]
            tokens = tokens[:min(ends, default=len(tokens))]
            picked = logprobs[i, :len(tokens)].gather(1, torch.tensor(tokens)[:, None])[:, 0]
            content = [{"logprob": logprob} for logprob in picked.tolist()]
            choices.append({"index": i, "token_ids": tokens, "logprobs": {"content": content}})
        return choices

    def score(self, name, prompt) -> list:
        import torch

        with torch.no_grad(), self.as_named(name):
            logprobs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        return [None] + [{str(token): {"logprob": logprobs[i, token].item()}}
                         for i, token in enumerate(prompt[1:])]


class Handler(BaseHTTPRequestHandler):
    """vLLM's routes, as far as a run uses them."""

    models: Models
    key: str
    length: int
    rank: int

    def do_GET(self):
        if self.path == "/health":
            return self.reply(200, {})
        if self.refused():
            return None
        names = ["base", *self.models.adapters]
        return self.reply(200, {"data": [{"id": n, "max_model_len": self.length} for n in names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        with self.models.lock:
            self.answer(body)

    def answer(self, body: dict):
        if self.path == "/v1/load_lora_adapter":
            with open(f"{body['lora_path']}/adapter_config.json") as file:
                rank = json.load(file)["r"]
            if rank > self.rank:
                return self.reply(400, {"error": f"LoRA rank {rank} is greater than {self.rank}"})
            self.models.load(body["lora_name"], body["lora_path"])
            return self.reply(200, {})
        name = body.get("lora_name") or body.get("model")
        if name not in ("base", *self.models.adapters):
            return self.reply(404, {"error": f"the model {name} does not exist"})
        if self.path == "/v1/unload_lora_adapter":
            self.models.unload(name)
            return self.reply(200, {})
        prompt, sampling = body["token_ids"], body["sampling_params"]
        if "prompt_logprobs" in sampling:
            return self.reply(200, {"prompt_logprobs": self.models.score(name, prompt)})
        return self.reply(200, {"choices": self.models.complete(name, prompt, **sampling)})

    def refused(self) -> bool:
        """Answer 401 to a wrong key."""
        if self.headers["Authorization"] == f"Bearer {self.key}":
            return False
        self.reply(401, {"error": "unauthorised"})
        return True

    def reply(self, status: int, body: dict):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, default=64)
    parser.add_argument("--max-lora-rank", type=int, default=16)
    given, _ = parser.parse_known_args()
    Handler.models, Handler.key = Models(given.model), os.environ["VLLM_API_KEY"]
    Handler.length, Handler.rank = given.max_model_len, given.max_lora_rank
    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()
