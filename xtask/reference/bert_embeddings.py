"""Writes the golden vectors of engine/tests/minilm.rs: a BERT encoder in float64 numpy, mean pooling, normalised.

    pip install numpy safetensors tokenizers
    python bert_embeddings.py FOLDER > engine/tests/data/minilm.json

FOLDER holds all-MiniLM-L6-v2 (`cargo xtask model minilm`).
"""

import json
import sys
from math import erf

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

TEXTS = [
    "A lighthouse warns ships of the coast.",
    "Ships are warned of cliffs by a tower with a lamp.",
    "The recipe asks for two eggs and a pinch of salt.",
    "Größe, naïve café: 灯塔指引船只。 ★",
    "x",
    "a long text goes on and on, " * 40,
]


def norm(x, w, name):
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-12) * w[name + ".weight"] + w[name + ".bias"]


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def encode(ids, w, heads, layers):
    n = len(ids)
    e = "embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][:n] + w[e + "token_type_embeddings.weight"][0]
    x = norm(x, w, e + "LayerNorm")
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + erf(v / 2**0.5)))
    for i in range(layers):
        p = f"encoder.layer.{i}."
        q, k, v = (linear(x, w, f"{p}attention.self.{c}").reshape(n, heads, -1).transpose(1, 0, 2) for c in ("query", "key", "value"))
        s = q @ k.transpose(0, 2, 1) / q.shape[2] ** 0.5
        s = np.exp(s - s.max(2, keepdims=True))
        a = (s / s.sum(2, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, -1)
        x = norm(x + linear(a, w, p + "attention.output.dense"), w, p + "attention.output.LayerNorm")
        x = norm(x + linear(gelu(linear(x, w, p + "intermediate.dense")), w, p + "output.dense"), w, p + "output.LayerNorm")
    mean = x.mean(0)
    return mean / np.sqrt((mean * mean).sum())


def main():
    folder = sys.argv[1]
    config = json.load(open(folder + "/config.json"))
    limit = json.load(open(folder + "/sentence_bert_config.json"))["max_seq_length"]
    w = {name: value.astype(np.float64) for name, value in load_file(folder + "/model.safetensors").items()}
    tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids[:limit]
        vector = encode(ids, w, config["num_attention_heads"], config["num_hidden_layers"])
        rows.append({"text": text, "n_tokens": len(ids), "vector": [round(float(v), 6) for v in vector]})
    json.dump(rows, sys.stdout, ensure_ascii=False)


main()
