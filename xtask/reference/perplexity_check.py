"""Perplexity of a GGUF file of a Llama model on a fixed text, of three implementations: Ember's server, a float32
decoder in numpy over the dequantised weights, and llama.cpp (the C library inside the PyPI package `xllamacpp`).

    pip install numpy gguf xllamacpp
    ember serve MODEL.gguf --served-model-name m --port 8000
    python perplexity_check.py MODEL.gguf http://127.0.0.1:8000 TEXT...

The texts are cut into windows of 512 tokens; every token of a window but its first is scored. Ends with an error if
Ember's perplexity is more than 0.5 % from either of the others. Ids come from Ember's /tokenize, so that all three score
the same ones.
"""

import ctypes
import glob
import json
import os
import sys
import urllib.request

import numpy as np

WINDOW = 512
LIMIT = 0.005


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=600))


def ember(url, windows):
    """Log-probabilities of each window's tokens but the first."""
    scores = []
    for ids in windows:
        body = {"model": "m", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = post(url + "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        scores.append([entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:])])
    return scores


def log_softmax_at(logits, targets):
    logits = logits.astype(np.float64)
    top = logits.max(1, keepdims=True)
    return logits[np.arange(len(targets)), targets] - top[:, 0] - np.log(np.exp(logits - top).sum(1))


class Oracle:
    """A Llama decoder in float32."""

    def __init__(self, path):
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(path)
        number = lambda key: float(reader.fields[key].parts[-1][0])
        self.layers = int(number("llama.block_count"))
        self.heads = int(number("llama.attention.head_count"))
        self.kv_heads = int(number("llama.attention.head_count_kv"))
        self.eps = number("llama.attention.layer_norm_rms_epsilon")
        self.theta = number("llama.rope.freq_base")
        self.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.head_dim = self.w["blk.0.attn_q.weight"].shape[0] // self.heads

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(1, keepdims=True) + self.eps) * self.w[name]

    def rotate(self, x):
        """x [T, heads, head_dim]; GGUF stores Llama's heads with pairs side by side."""
        n, half = x.shape[0], self.head_dim // 2
        angle = np.arange(n)[:, None] * self.theta ** (-np.arange(half) / half)
        cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    def logits(self, ids):
        w, n = self.w, len(ids)
        x = w["token_embd.weight"][ids]
        future = np.triu(np.full((n, n), -np.inf, np.float32), 1)
        for i in range(self.layers):
            p = f"blk.{i}."
            h = self.norm(x, p + "attn_norm.weight")
            q, k, v = (h @ w[p + f"attn_{c}.weight"].T for c in "qkv")
            q = self.rotate(q.reshape(n, self.heads, -1)).transpose(1, 0, 2)
            k = self.rotate(k.reshape(n, self.kv_heads, -1)).transpose(1, 0, 2)
            v = v.reshape(n, self.kv_heads, -1).transpose(1, 0, 2)
            k, v = (np.repeat(t, self.heads // self.kv_heads, 0) for t in (k, v))
            s = q @ k.transpose(0, 2, 1) / np.float32(self.head_dim**0.5) + future
            s = np.exp(s - s.max(2, keepdims=True))
            a = (s / s.sum(2, keepdims=True)) @ v
            x = x + a.transpose(1, 0, 2).reshape(n, -1) @ w[p + "attn_output.weight"].T
            h = self.norm(x, p + "ffn_norm.weight")
            gate = h @ w[p + "ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
        head = w.get("output.weight", w["token_embd.weight"])
        return self.norm(x, "output_norm.weight") @ head.T


class LlamaBatch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32)] + [
        (name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
    ]


class Blob(ctypes.Structure):
    """Parameters passed by value: larger than any version's struct, which is all that the call needs."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class LlamaCpp:
    def __init__(self, path):
        import xllamacpp

        self.lib = lib = ctypes.CDLL(glob.glob(os.path.dirname(xllamacpp.__file__) + "/xllamacpp*.so")[0])
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(lib, name).restype = Blob
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_get_logits"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Blob]
        lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Blob]
        lib.llama_decode.argtypes = [ctypes.c_void_p, LlamaBatch]
        lib.llama_get_logits.argtypes = lib.llama_get_memory.argtypes = [ctypes.c_void_p]
        lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        # n_ctx, n_batch, n_ubatch: the struct's first fields.
        for i in range(3):
            params.words[i] = WINDOW
        self.context = lib.llama_init_from_model(model, params)

    def logits(self, ids, vocab):
        n = len(ids)
        tokens, positions = (ctypes.c_int32 * n)(*ids), (ctypes.c_int32 * n)(*range(n))
        zero = ctypes.c_int32(0)
        seqs = (ctypes.c_void_p * n)(*[ctypes.addressof(zero)] * n)
        batch = LlamaBatch(n)
        wanted = (ctypes.c_int8 * n)(*[1] * n)
        counts = (ctypes.c_int32 * n)(*[1] * n)
        for name, array in (("token", tokens), ("pos", positions), ("n_seq_id", counts), ("seq_id", seqs), ("logits", wanted)):
            setattr(batch, name, ctypes.addressof(array))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        if self.lib.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        at = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(at, (n, vocab))


def main():
    path, url, *texts = sys.argv[1:]
    windows = []
    for text in texts:
        ids = post(url + "/tokenize", {"model": "m", "prompt": open(text).read(), "add_special_tokens": False})["tokens"]
        windows += [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    print(f"{len(windows)} windows, {len(windows) * (WINDOW - 1)} scored tokens")
    oracle, llama = Oracle(path), LlamaCpp(path)
    vocab = oracle.w["token_embd.weight"].shape[0]
    score = lambda logits, ids: log_softmax_at(logits[:-1], np.array(ids[1:]))
    scores = {"ember": np.array(ember(url, windows))}
    scores["float32"] = np.array([score(oracle.logits(ids), ids) for ids in windows])
    scores["llama.cpp"] = np.array([score(llama.logits(ids, vocab), ids) for ids in windows])
    perplexity = {name: float(np.exp(-s.mean())) for name, s in scores.items()}
    failed = False
    for name, value in perplexity.items():
        off = perplexity["ember"] / value - 1
        difference = np.abs(scores["ember"] - scores[name])
        failed |= abs(off) > LIMIT
        print(f"{name:10} perplexity {value:.4f}; Ember's is {off:+.3%} off; "
              f"log-probabilities differ by {difference.mean():.5f} on average, {difference.max():.4f} at most")
    sys.exit(1 if failed else 0)


main()
