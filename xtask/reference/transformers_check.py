"""Compares a server's log-probabilities with those of `transformers` in float32 on tiny random checkpoints.

    transformers_check.py EMBER_BINARY DIR

Writes the checkpoints below DIR, serves each with `EMBER_BINARY serve --device cuda`, and asks for the log-probabilities
of every prompt token and of 64 decoded ones, alone and among 37 requests, with whole and with chunked prompts. Logits
are compared as the deviation of the 20 likeliest, less a common offset (log-probabilities fix logits up to one), over
the norm of the reference's. Exit status 1 if a figure misses its limit.
"""
import concurrent.futures
import json
import os
import subprocess
import sys
import time
import urllib.request

import torch
import transformers

LIMIT = 1e-2  # relative error of bfloat16 logits
# Logits this far apart, over their root mean square, may change places: an error of LIMIT in each is sqrt(2) of it in
# the difference, and six times that is never seen.
NEAR_TIE = 6 * 2**0.5 * LIMIT
N_DECODE = 64
VOCAB = 1024
PROMPT_LENGTHS = (5, 33, 70, 300)
PORT = 8123

MODELS = {
    "llama, llama3 rope, head_dim 64": lambda: transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1400, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCAB, max_position_embeddings=4096, rope_theta=500000.0, tie_word_embeddings=False,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 256}),
    "llama, head_dim 128, tied": lambda: transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=128, vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=True),
    "qwen2, biases, head_dim 64": lambda: transformers.Qwen2Config(
        hidden_size=448, intermediate_size=1216, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
        vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=True),
    "qwen2, biases, head_dim 128": lambda: transformers.Qwen2Config(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=False),
    # All experts compute each token: which ones are chosen may differ where two are nearly equal.
    "qwen2_moe, head_dim 64": lambda: transformers.Qwen2MoeConfig(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, vocab_size=VOCAB,
        max_position_embeddings=4096, tie_word_embeddings=False, num_experts=4, num_experts_per_tok=4,
        moe_intermediate_size=192, shared_expert_intermediate_size=320, norm_topk_prob=False),
}


def write_tokenizer(folder):
    """A byte-level tokenizer in which each id of the vocabulary is some text."""
    printable = [c for c in range(256) if 0x21 <= c <= 0x7E or 0xA1 <= c <= 0xAC or 0xAE <= c <= 0xFF]
    letters = [chr(c) for c in printable + list(range(256, 512 - len(printable)))]
    vocab = {c: i for i, c in enumerate(letters)} | {f"\u0120w{i}": i for i in range(256, VOCAB)}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    text = {"version": "1.0", "added_tokens": [], "pre_tokenizer": bytes_only, "decoder": bytes_only, "model": model}
    with open(os.path.join(folder, "tokenizer.json"), "w") as file:
        json.dump(text, file)


def make_checkpoint(config, folder):
    """Random weights large enough for decided logits, saved in bfloat16; the same in float32 on the device."""
    torch.manual_seed(1)
    config.eos_token_id, config.bos_token_id = VOCAB - 1, VOCAB - 2
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5 if "embed" not in name else 0.3)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
            else:
                weight.normal_(1, 0.1)
    model = model.bfloat16()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.float().cuda().eval()


def post(body):
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def complete(prompt):
    """Decoded ids and, for each position from the second prompt token on, {id: log-probability}."""
    choice = post({"model": "m", "prompt": prompt, "max_tokens": N_DECODE, "temperature": 0, "ignore_eos": True,
                   "logprobs": 20, "prompt_logprobs": 20, "return_token_ids": True,
                   "return_tokens_as_token_ids": True})
    rows = [{int(id): entry["logprob"] for id, entry in row.items()} for row in choice["prompt_logprobs"][1:]]
    for row in choice["logprobs"]["top_logprobs"]:
        rows.append({int(name.removeprefix("token_id:")): value for name, value in row.items()})
    return choice["token_ids"], rows


def errors(model, prompt, ids, rows):
    """Relative errors of prefill and decode, and how far below the best logit a chosen one was, in root mean squares."""
    tokens = torch.tensor([prompt + ids], device="cuda")
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    off, norm = [0.0, 0.0], [0.0, 0.0]
    for at, row in enumerate(rows):
        part = int(at >= len(prompt) - 1)
        index = torch.tensor(list(row), device="cuda")
        reference, got = logits[at][index], torch.tensor(list(row.values()), device="cuda")
        difference = got - reference
        off[part] += (difference - difference.mean()).square().sum().item()
        norm[part] += (reference - logits[at].mean()).square().sum().item()
    decoded = logits[len(prompt) - 1 : -1]
    chosen = decoded.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
    tie = ((decoded.max(1).values - chosen) / decoded.square().mean(1).sqrt()).max().item()
    return [(o / n) ** 0.5 for o, n in zip(off, norm)], tie


def serve(binary, folder, flags):
    log = open(folder + ".log", "a")
    command = [binary, "serve", folder, "--served-model-name", "m", "--device", "cuda", "--port", str(PORT),
               "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28), "--no-enable-prefix-caching", *flags]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1)
            return server
        except OSError:
            if server.poll() is not None:
                sys.exit(f"the server ended: see {folder}.log")
            time.sleep(0.1)
    sys.exit("the server is not ready after 30 s")


def main():
    binary, folder = sys.argv[1:3]
    failed = False

    def report(name, what, value, limit):
        nonlocal failed
        failed |= not value <= limit
        print(f"{name:<34} {what:<36} {value:.5f}  (at most {limit}) {'ok' if value <= limit else 'FAILED'}", flush=True)

    for number, (name, config) in enumerate(MODELS.items()):
        path = os.path.join(folder, f"model-{number}")
        model = make_checkpoint(config(), path)
        generator = torch.Generator().manual_seed(2)
        draw = lambda n: torch.randint(0, VOCAB - 2, (n,), generator=generator).tolist()
        prompts = [draw(n) for n in PROMPT_LENGTHS] + [draw(8 + 5 * i) for i in range(33)]
        for kind, flags in (("whole prompts", []), ("chunks of 64", ["--max-num-batched-tokens", "64", "--max-num-seqs", "40"])):
            server = serve(binary, path, flags)
            try:
                alone = [complete(prompt) for prompt in prompts[: len(PROMPT_LENGTHS)]]
                with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
                    together = list(pool.map(complete, prompts))
            finally:
                server.terminate()
                server.wait(30)
            for batch, results in (("alone", alone), (f"among {len(prompts)}", together)):
                found = [errors(model, prompt, *result) for prompt, result in zip(prompts, results)]
                report(name, f"{kind}, {batch}: prefill", max(e[0] for e, _ in found), LIMIT)
                report(name, f"{kind}, {batch}: decode", max(e[1] for e, _ in found), LIMIT)
                report(name, f"{kind}, {batch}: ids off by", max(tie for _, tie in found), NEAR_TIE)
    sys.exit(failed)


if __name__ == "__main__":
    main()
