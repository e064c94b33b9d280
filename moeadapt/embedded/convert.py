"""Turn a Llama GGUF file into an ordinary `from_pretrained` folder in bfloat16.

transformers can read a GGUF file itself, but keeps the model marked as quantised: `Trainer` then
refuses it and it cannot be saved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeadapt.embedded.progress import progress_bar
from moeadapt.errors import AssetError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3

# Renders exactly what the GGUF's own template renders. The generation markers are new: with them
# TRL's `assistant_only_loss` and `return_assistant_tokens_mask` know which tokens the model says.
# The end mark is inside, since the model has to learn to stop; the newline after it is not.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def convert_gguf(source: Path, out: Path, *, progress: bool = False) -> None:
    """Dequantise `source` into the new folder `out`: config, weights, tokenizer, generation config.

    Args:
        source: a GGUF file of the Llama architecture with a GPT-2 style tokenizer.
        out: a folder that does not exist yet.
        progress: whether to show a bar on stderr.

    Raises:
        AssetError: the file is of another architecture, or its tensors do not fit its config.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise AssetError(
            f"{source} holds a {fields.get('general.architecture')!r} model; only 'llama' can be "
            "converted"
        )
    config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    with torch.no_grad():
        weights = _weights(reader, config, progress=progress)
    _check_weights(weights, config, source)
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    _generation_config(fields).save_pretrained(out)
    _tokenizer(fields).save_pretrained(out)


def _config(fields: dict[str, Any], *, tied: bool) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # GGUF keeps these two as float32, which turns 1e-5 into 9.99999975e-06.
        rms_norm_eps=_short_float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _short_float(fields["llama.rope.freq_base"]),
        },
        tie_word_embeddings=tied,
        **_special_ids(fields),
    )


def _generation_config(fields: dict[str, Any]) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(**_special_ids(fields))


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _short_float(value: float) -> float:
    return float(f"{value:.6g}")


def _weights(
    reader: "GGUFReader", config: "LlamaConfig", *, progress: bool
) -> "dict[str, torch.Tensor]":
    """Return every tensor under its transformers name, in bfloat16."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    with progress_bar("converting tensors", len(reader.tensors), shown=progress) as show:
        for done, tensor in enumerate(reader.tensors, start=1):
            # A copy: unquantised tensors are read-only views of the file.
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            for part, count in heads.items():
                if f".{part}." in tensor.name:
                    values = _unpermute(values, count)
            weight = torch.from_numpy(values).to(torch.bfloat16).contiguous()
            weights[_transformers_name(tensor.name)] = weight
            show(done)
    return weights


def _transformers_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, suffix] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{suffix}"
        case _:
            # Not a name of ours, so that the check against the config reports it.
            return name


def _unpermute(weight: "np.ndarray", num_heads: int) -> "np.ndarray":
    """Undo the row order that llama.cpp gives the query and key projections.

    It rotates neighbouring rows (0, 1), (2, 3), ... of each head; transformers rotates row i of a
    head's first half with row i of its second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _check_weights(weights: "dict[str, torch.Tensor]", config: "LlamaConfig", source: Path) -> None:
    """Raise unless names and shapes are exactly those of the model that `config` describes."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        wrong = sorted(name for name, _ in wanted.items() ^ found.items())
        raise AssetError(
            f"{source}: tensors missing, left over or of the wrong shape for its own config: "
            f"{sorted(set(wrong))[:6]}"
        )


def _tokenizer(fields: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Rebuild the byte-level BPE tokenizer; llama.cpp's pre-tokenizer name for it is `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        chat_template=CHAT_TEMPLATE,
    )
