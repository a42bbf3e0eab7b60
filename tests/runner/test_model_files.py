"""Models as GGUF files: found here or on a hub on loopback, checked, converted once, and known to tables."""

import fcntl
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from loopback_hub import serve
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from runner import ROOT, files, hub, model_files, parameters

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
NAME = "someone/tiny-GGUF"
ROWS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
TAKE = """
import sys
from runner import model_files
model_files.check_model(sys.argv[1])
print("torch" in sys.modules, flush=True)
print(model_files.gguf_folder(model_files.as_gguf(sys.argv[1])).name)
"""


def random_qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=True))


def write_gguf(path, model):
    """A Qwen2 as llama.cpp writes it: matrices in Q8_0, vectors in fp32, a byte-level tokenizer, tied embeddings."""
    config, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "ab", "ba", *(f"<unused{i}>" for i in range(27)), *SPECIAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["a b", "b a"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHAT)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in ROWS.items()}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in tensors:
                values = tensors[f"{theirs}.{part}"].numpy().astype(np.float32)
                if values.ndim == 1:
                    writer.add_tensor(f"{ours}.{part}", values)
                else:
                    kind = gguf.GGMLQuantizationType.Q8_0
                    writer.add_tensor(f"{ours}.{part}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf", random_qwen())


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder for converted models."""
    monkeypatch.setattr(model_files, "MODELS", tmp_path / "models")
    return tmp_path / "models"


def test_a_file_is_converted_once_and_says_where_it_comes_from(models, file):
    wanted = model_files.ModelFile(str(file), None)
    folder = model_files.gguf_folder(wanted)
    digest = files.sha256(file)
    assert folder == models / digest[:16]
    assert model_files.origin_of(folder) == {
        "model_file": "tiny-q8_0.gguf", "model_sha256": digest, "quantisation": "Q8_0"}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_files.gguf_folder(wanted) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [f.name for f in models.iterdir() if f.suffix != ".lock"] == [folder.name]  # nothing is left beside it


def test_processes_that_start_together_convert_once(tmp_path, file):
    (tmp_path / "models").mkdir()
    with (tmp_path / f"models/.{files.sha256(file)[:16]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process converts
        environment = os.environ | {"GRPO_NOISE_WORK": str(tmp_path)}
        waiting = subprocess.Popen([sys.executable, "-c", TAKE, str(file)], env=environment, cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        assert waiting.stdout.readline() == "False\n"  # checked, before torch
        (tmp_path / f"models/{files.sha256(file)[:16]}").mkdir()
        (tmp_path / f"models/{files.sha256(file)[:16]}/{model_files.ORIGIN}").write_text("{}")
    assert waiting.communicate(timeout=600)[0].strip() == files.sha256(file)[:16]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_converted_model_is_the_one_in_the_file(models, file):
    folder = model_files.gguf_folder(model_files.ModelFile(str(file), None))
    converted, original = AutoModelForCausalLM.from_pretrained(folder), random_qwen()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("abba") == ["ab", "ba"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    message = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(message, tokenize=False).startswith("<|im_start|>user\nab<|im_end|>")
    ids = torch.tensor([tokenizer("abba baab")["input_ids"]])
    with torch.inference_mode():
        apart = (converted(ids).logits - original(ids).logits).abs().max()
    assert 0 < apart < 0.01  # 8 bits a weight


def test_a_folder_that_is_no_conversion_has_no_origin(tmp_path):
    assert model_files.origin_of(tmp_path) == {}


def test_the_sha256_decides(models, file):
    right, wrong = files.sha256(file), "0" * 64
    model_files.check_model(f"{file}@sha256:{right}")
    with pytest.raises(ValueError, match=rf"tiny-q8_0.gguf has the sha256 {right}, and {wrong} is asked for"):
        model_files.check_model(f"{file}@sha256:{wrong}")
    cut = models.parent / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="another file or cut off: download it again"):
        model_files.gguf_folder(model_files.ModelFile(str(cut), right))


def test_a_page_that_was_saved_as_a_file_is_no_model(models, tmp_path):
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.gguf' is not a GGUF file"):
        model_files.check_model(str(tmp_path / "page.gguf"))


def test_a_file_that_is_nowhere(models):
    with pytest.raises(FileNotFoundError, match="'absent.gguf' is not here: give the path of a GGUF file, or its name"):
        model_files.check_model("absent.gguf")


def test_a_profile_takes_a_file_from_the_models_folder_without_a_hub(models, file, monkeypatch):
    def no_hub(*_):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr(hub, "check_hub", no_hub)
    name = f"{NAME}/{file.name}@sha256:{files.sha256(file)}"
    models.mkdir()
    (models / file.name).symlink_to(file)
    model_files.check_model(name)
    folder = model_files.gguf_folder(model_files.as_gguf(name))
    (models / file.name).unlink()  # once converted, the file is not needed
    model_files.check_model(name)
    assert model_files.gguf_folder(model_files.as_gguf(name)) == folder


def take(model, work, endpoint):
    """Check and convert in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "0",
                                "HF_TOKEN": "", "NO_PROXY": "127.0.0.1", "GRPO_NOISE_WORK": str(work)}
    return subprocess.run([sys.executable, "-c", TAKE, model], env=environment, cwd=ROOT, capture_output=True,
                          text=True, timeout=600)


def test_a_file_is_downloaded_from_the_hub_and_checked(tmp_path, file):
    digest = files.sha256(file)
    requests = []
    with serve({("model", NAME): file.parent}, requests) as endpoint:
        other = take(f"{NAME}/{file.name}@sha256:{'0' * 64}", tmp_path, endpoint)
        done = take(f"{NAME}/{file.name}@sha256:{digest}", tmp_path, endpoint)
    assert "is another file or cut off" in other.stderr
    assert done.stdout.split() == ["False", digest[:16]], done.stderr
    assert f"GET /{NAME}/resolve/main/{file.name}" in requests


def test_a_hub_without_the_file_is_told_before_torch(tmp_path, file):
    with serve({("model", NAME): file.parent}) as endpoint:
        done = take(f"{NAME}/other.gguf", tmp_path, endpoint)
    assert done.stdout == "" and f"FileNotFoundError: model='{NAME}' is not here" in done.stderr
    assert "other.gguf" in done.stderr


@pytest.mark.parametrize("profile, completions", [("qwen2.5-coder-0.5b", 128), ("qwen2.5-coder-1.5b", 32)])
def test_the_profiles_name_a_file_and_its_sha256(profile, completions):
    params = parameters.resolve(profile)
    wanted = model_files.as_gguf(params.model)
    assert len(wanted.sha256) == 64 and wanted.name.startswith("Qwen/Qwen2.5-Coder-")
    assert model_files.on_the_hub(wanted)[1] == f"{profile}-instruct-q4_k_m.gguf"
    assert params.per_device_train_batch_size * params.gradient_accumulation_steps == completions
