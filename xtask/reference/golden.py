"""Writes engine/tests/golden/*.json: what `transformers` computes in float32 from tiny checkpoints of every architecture.

    pip install torch transformers numpy safetensors
    python golden.py engine/tests/golden

A checkpoint's values are a function of its tensors' names, so that engine/tests/golden.rs makes the same ones: element
`i` of tensor `name` is `middle + spread * u`, in float32, with `u = (h >> 40) / 2^23 - 1`, `h = splitmix64(fnv1a(name) +
i)`, and by the name
    norms' weights (`...norm.weight`, `...LayerNorm.weight`): middle 1, spread 0.4
    biases: middle 0, spread 0.5
    embeddings (`...embed...`): middle 0, spread 1
    scales of fp8 weights (`...weight_scale...`): middle 0.004, spread 0.002
    all other: middle 0, spread 2.5 / sqrt(columns)
and fp8 elements are the bytes `h >> 56`, less 1 where that is not a number. The names are those that `save_pretrained`
writes, and `from_pretrained` must find each of them and no other.

A file has the config, the tensors, token ids, and either the log-probability of every token after its predecessors with
the likeliest tokens at some positions, or the texts' vectors.
"""

import json
import math
import os
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

VOCAB = 256
N_TOP = 6
POSITIONS = (0, 1, 5, 17, 30, 46, 61)

LLAMA = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
QWEN_MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)
ENCODER = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, type_vocab_size=2, pad_token_id=0,
)  # fmt: skip

# Name, architecture, config. `rope_theta` and `rope_scaling` are the spellings of published checkpoints.
GENERATION = [
    ("llama", "LlamaForCausalLM", dict(rope_theta=500000.0, rope_scaling=LLAMA3)),
    ("llama_tied", "LlamaForCausalLM", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    ("llama_linear", "LlamaForCausalLM", dict(rope_scaling=dict(type="linear", factor=4.0))),
    # At twice its context, transformers' frequencies are those that Ember uses for all lengths.
    ("llama_dynamic", "LlamaForCausalLM", dict(rope_scaling=dict(type="dynamic", factor=2.0), max_position_embeddings=32)),
    ("mistral", "MistralForCausalLM", dict(head_dim=32, sliding_window=20)),
    ("mixtral", "MixtralForCausalLM", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    ("qwen2", "Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    ("qwen2_yarn", "Qwen2ForCausalLM", dict(
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32))),
    ("qwen2_yarn_beta", "Qwen2ForCausalLM", dict(rope_theta=1000.0, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5))),
    ("llama_yarn_mscale", "LlamaForCausalLM", dict(rope_scaling=dict(
        type="yarn", factor=8.0, original_max_position_embeddings=64, mscale=0.8, mscale_all_dim=0.4, truncate=False))),
    ("qwen2_moe", "Qwen2MoeForCausalLM", dict(QWEN_MOE, shared_expert_intermediate_size=48, norm_topk_prob=False)),
    ("qwen2_moe_norm", "Qwen2MoeForCausalLM", dict(
        QWEN_MOE, shared_expert_intermediate_size=48, norm_topk_prob=True, num_hidden_layers=4, decoder_sparse_step=2,
        mlp_only_layers=[3])),
    ("qwen3", "Qwen3ForCausalLM", dict(head_dim=32)),
    ("qwen3_moe", "Qwen3MoeForCausalLM", dict(QWEN_MOE, head_dim=32, norm_topk_prob=True)),
]  # fmt: skip

# Name, class, architecture in config.json, config, pooling mode, normalised.
EMBEDDING = [
    ("bert", "BertModel", "BertModel", ENCODER, "mean_tokens", True),
    ("llama_mean", "LlamaModel", "LlamaModel", LLAMA, "mean_tokens", False),
    ("qwen3_last", "Qwen3Model", "Qwen3ForCausalLM", dict(LLAMA, head_dim=32), "lasttoken", True),
]  # fmt: skip

# Name, fields of quantization_config, scale's suffix, shape of the scale of a weight of a shape.
FP8 = [
    ("llama_fp8_block", dict(quant_method="fp8", weight_block_size=[32, 32]), "weight_scale_inv",
     lambda rows, columns: [-(-rows // 32), -(-columns // 32)]),
    ("llama_fp8_channel", dict(quant_method="compressed-tensors", format="float-quantized"), "weight_scale",
     lambda rows, columns: [rows, 1]),
    ("llama_fp8_tensor", dict(quant_method="fp8"), "weight_scale", lambda rows, columns: []),
]  # fmt: skip


def hashes(name, n):
    """64 bits for each of `n` elements."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 & (1 << 64) - 1
    with np.errstate(over="ignore"):
        z = (np.arange(n, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def values(name, shape):
    if name.endswith("norm.weight") or name.endswith("LayerNorm.weight"):
        middle, spread = 1.0, 0.4
    elif name.endswith("bias"):
        middle, spread = 0.0, 0.5
    elif "embed" in name:
        middle, spread = 0.0, 1.0
    elif "weight_scale" in name:
        middle, spread = 0.004, 0.002
    else:
        middle, spread = 0.0, 2.5 / math.sqrt(shape[-1])
    u = (hashes(name, math.prod(shape)) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy((np.float32(middle) + np.float32(spread) * u).reshape(shape))


def fp8(name, shape):
    bytes_ = (hashes(name, math.prod(shape)) >> np.uint64(56)).astype(np.uint8)
    bytes_ = np.where(bytes_ & 0x7F == 0x7F, bytes_ - 1, bytes_)
    return torch.from_numpy(bytes_.reshape(shape)).view(torch.float8_e4m3fn)


def ids(text, n):
    return [3 + (text * 79 + position * position * 7 + position * 31) % (VOCAB - 3) for position in range(n)]


def make(class_name, config, tensors=None):
    """A model of `config` with the values of the names that it is saved under, and those names with their shapes."""
    cls = getattr(transformers, class_name)
    config = cls.config_class(**config)
    with tempfile.TemporaryDirectory() as folder:
        if tensors is None:
            cls(config).save_pretrained(folder)
            with safe_open(folder + "/model.safetensors", "pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
            tensors = {name: values(name, shape) for name, shape in sorted(shapes.items())}
        config.save_pretrained(folder)
        save_file(tensors, folder + "/model.safetensors", {"format": "pt"})
        model, info = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (class_name, kind, info[kind])
    return model.eval(), {name: list(tensor.shape) for name, tensor in tensors.items()}


def log_probs(model, prompts):
    """For each prompt: of each token after the first, and the likeliest at some positions."""
    rows = []
    for prompt in prompts:
        logits = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        tops = {}
        for position in POSITIONS:
            if position < len(prompt) - 1:
                top = logits[position].topk(N_TOP)
                tops[position] = [[i, round(v, 6)] for i, v in zip(top.indices.tolist(), top.values.tolist())]
        targets = logits[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        rows.append({"ids": prompt, "targets": [round(v, 6) for v in targets.tolist()], "top": tops})
    return rows


def vectors(model, prompts, pooling, normalised):
    rows = []
    for prompt in prompts:
        hidden = model(torch.tensor([prompt])).last_hidden_state[0].double()
        vector = hidden.mean(0) if pooling == "mean_tokens" else hidden[-1]
        vector = torch.nn.functional.normalize(vector, dim=0) if normalised else vector
        rows.append({"ids": prompt, "vector": [round(v, 6) for v in vector.tolist()]})
    return rows


def write(folder, name, content):
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    with open(os.path.join(folder, name + ".json"), "w") as file:
        rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in ({"made_with": made_with} | content).items()]
        file.write("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{name}: {os.path.getsize(file.name)} bytes", flush=True)


@torch.no_grad()
def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    for name, architecture, changes in GENERATION:
        config = LLAMA | changes
        lengths = [64, 64] if "dynamic" in name else [64, 33]
        model, shapes = make(architecture, config)
        rows = log_probs(model, [ids(i, n) for i, n in enumerate(lengths)])
        write(folder, name, {"config": config | {"architectures": [architecture]}, "tensors": shapes, "prompts": rows})

    for name, class_name, architecture, config, pooling, normalised in EMBEDDING:
        model, shapes = make(class_name, config)
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalised
        files = {
            "modules.json": [{"idx": i, "type": "sentence_transformers.models." + kind} for i, kind in enumerate(kinds)],
            "1_Pooling/config.json": {"pooling_mode_" + pooling: True},
        }
        rows = vectors(model, [ids(i, n) for i, n in enumerate([40, 1, 17])], pooling, normalised)
        content = {"config": config | {"architectures": [architecture]}, "files": files, "tensors": shapes, "texts": rows}
        write(folder, name, content)

    _, shapes = make("LlamaForCausalLM", LLAMA)
    for name, quantization, suffix, scale_shape in FP8:
        stored, read = {}, {}
        for tensor, shape in shapes.items():
            if "proj" not in tensor:
                read[tensor] = values(tensor, shape)
                stored[tensor] = shape
                continue
            scale = tensor.removesuffix("weight") + suffix
            scales = values(scale, scale_shape(*shape) or [1])
            n, m = scales.shape if scales.dim() == 2 else (1, 1)
            full = scales.reshape(n, m).repeat_interleave(-(-shape[0] // n), 0).repeat_interleave(-(-shape[1] // m), 1)
            # Weights are read as bfloat16, as transformers does.
            read[tensor] = (fp8(tensor, shape).float() * full[: shape[0], : shape[1]]).bfloat16().float()
            stored[tensor], stored[scale] = shape, scale_shape(*shape)
        model, _ = make("LlamaForCausalLM", LLAMA, read)
        rows = log_probs(model, [ids(i, n) for i, n in enumerate([40, 9])])
        config = LLAMA | {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
        write(folder, name, {"config": config, "tensors": stored, "prompts": rows})

    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    write(folder, "fp8_e4m3", {"values": [None if math.isnan(v) else v for v in table]})


main()
