"""Writes the trained network and its vocabulary as a GGUF that llama.cpp loads.

Weights are Q8_0, norms float32. Needs torch and gguf, which edgellm itself never imports.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from demo_model import vocabulary as v
from demo_model.network import Llama

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<|user|>' + message['content'].strip() + eos_token }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'].strip() + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
"""A system message is left out: the model has never seen one."""


def write(path: Path, model: Llama, words: v.Vocabulary) -> None:
    """Write ``model`` and its vocabulary ``words`` to ``path``, replacing what is there."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("edgellm demo")
    writer.add_description("A tiny chat model to try edgellm with; it knows only simple things.")
    writer.add_license("MIT")
    writer.add_author("edgellm contributors")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(len(words))
    _add_vocabulary(writer, words)
    for name, tensor in model.state_dict().items():
        data = tensor.detach().to(torch.float32).numpy()
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, words: v.Vocabulary) -> None:
    kinds = (
        [gguf.TokenType.UNKNOWN]
        + [gguf.TokenType.CONTROL] * (v.FIRST_BYTE - 1)
        + [gguf.TokenType.BYTE] * 256
        + [gguf.TokenType.NORMAL] * len(words.pieces)
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words.tokens())
    writer.add_token_scores(words.scores())
    writer.add_token_types(kinds)
    writer.add_bos_token_id(v.BEGIN)
    writer.add_eos_token_id(v.END)
    writer.add_unk_token_id(v.UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # An answer starts without a space, so that its text can be shown as it comes.
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
