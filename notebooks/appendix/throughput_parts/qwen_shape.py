"""Qwen2.5-Math-1.5B's published configuration with random weights: `python qwen_shape.py FOLDER`.

For timing without a hub. The tokenizer is SmolLM2's, filled up with unused tokens to Qwen's vocabulary.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from runner import model_files

folder = Path(sys.argv[1])
config = Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                     num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6,
                     rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                     dtype="bfloat16")
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = Qwen2ForCausalLM(config)
model.save_pretrained(folder)
smol = model_files.gguf_folder(model_files.as_gguf("smol"))
AutoTokenizer.from_pretrained(smol).save_pretrained(folder)
file = folder / "tokenizer.json"
tokenizer = json.loads(file.read_text())
vocabulary = tokenizer["model"]["vocab"]
vocabulary.update({f"<unused{i}>": i for i in range(max(vocabulary.values()) + 1, config.vocab_size)})
file.write_text(json.dumps(tokenizer))
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(AutoTokenizer.from_pretrained(folder))} tokens")
