"""Ember beside llama.cpp (the server inside the PyPI package `xllamacpp`) on one CPU: the same loads, one after the
other, in turns, so that a machine whose speed wanders treats both alike.

    pip install xllamacpp gguf numpy
    cargo build --release -p ember-server -p ember-bench
    python llama_cpp_compare.py MODEL.gguf                     # SmolLM2-135M-Instruct Q4_1, say
    python llama_cpp_compare.py --qwen2-shape /tmp/qwen2.gguf  # writes a random Q8_0 file of Qwen2-0.5B's shape first

Prompt caches are off on both sides, answers are of 128 tokens, greedy. Prints the medians over the rounds, llama.cpp's
of the requests that it answered, and Ember's resident memory beside file pages after each load. Keep the machine quiet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
# Name: ember-bench's flags.
ANSWERS = ["--dataset", "openqa", "--max-tokens", "128", "--min-tokens", "128", "--ignore-eos"]
LOADS = {
    "parallel 1": ["--parallel", "1", "--number", "4", *ANSWERS],
    "parallel 8": ["--parallel", "8", "--number", "16", *ANSWERS],
    "parallel 16": ["--parallel", "16", "--number", "32", *ANSWERS],
    "prefill 1,024": ["--dataset", "random", "--random-vocab-size", "49000", "--min-prompt-length", "1024",
                      "--max-prompt-length", "1024", "--max-tokens", "2", "--parallel", "1", "--number", "5"],
}  # fmt: skip


def write_qwen2_shape(path, tokenizer):
    """A random Q8_0 file of Qwen2-0.5B's dimensions, with the tokenizer of the GGUF file `tokenizer`."""
    import gguf
    import numpy as np

    hidden, inner, layers, heads, kv_heads, vocab = 896, 4864, 24, 14, 2, 151_936
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(32_768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    fields = gguf.GGUFReader(tokenizer).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    n_more = vocab - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list(tokens + [f"<unused_{i}>" for i in range(n_more)])
    writer.add_token_types(types + [int(gguf.TokenType.UNUSED)] * n_more)
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"].contents())
    writer.add_chat_template(fields["tokenizer.chat_template"].contents())

    def matrix(name, rows, columns):
        blocks = np.empty((rows, columns // 32, 34), np.uint8)
        blocks[:, :, :2] = np.array([0.02 / 127], np.float16).view(np.uint8)
        blocks[:, :, 2:] = random.integers(-127, 128, (rows, columns // 32, 32), np.int8).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name, n, mean):
        writer.add_tensor(name, (mean + 0.02 * random.standard_normal(n)).astype(np.float32))

    matrix("token_embd.weight", vocab, hidden)
    vector("output_norm.weight", hidden, 1)
    for i in range(layers):
        p = f"blk.{i}."
        vector(p + "attn_norm.weight", hidden, 1)
        vector(p + "ffn_norm.weight", hidden, 1)
        for name, rows in (("q", heads * 64), ("k", kv_heads * 64), ("v", kv_heads * 64)):
            matrix(f"{p}attn_{name}.weight", rows, hidden)
            vector(f"{p}attn_{name}.bias", rows, 0)
        matrix(p + "attn_output.weight", hidden, heads * 64)
        matrix(p + "ffn_gate.weight", inner, hidden)
        matrix(p + "ffn_up.weight", inner, hidden)
        matrix(p + "ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve_llama_cpp(model, port):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = "m"
    params.port = port
    params.n_parallel = 16
    params.n_ctx = 16 * 2048
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.ui = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


def wait_ready(url, process):
    start = time.time()
    while time.time() - start < 120:
        if process.poll() is not None:
            sys.exit(f"the server at {url} ended with status {process.returncode}")
        try:
            urllib.request.urlopen(url + "/health", timeout=2)
            return time.time() - start
        except OSError:
            time.sleep(0.01)
    sys.exit(f"no server at {url} after 120 s")


def memory_mib(pid):
    """Resident memory without file pages."""
    fields = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def measure(bench, url, flags, seed, folder):
    summary = os.path.join(folder, "summary.json")
    command = [bench, "perf", "--model", "m", "--url", url, "--data-seed", str(seed), "--allow-failures",
               "--db", os.path.join(folder, "runs.db"), "--json", summary, *flags]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.load(open(summary))[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--qwen2-shape", action="store_true", help="write MODEL first")
    parser.add_argument("--tokenizer", default=os.path.expanduser(
        "~/.cache/ember/models/SmolLM2-135M-Instruct-Q4_1.gguf"), help="GGUF file whose tokenizer --qwen2-shape takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--ember", default=os.path.join(ROOT, "target/release/ember"))
    parser.add_argument("--bench", default=os.path.join(ROOT, "target/release/ember-bench"))
    parser.add_argument("--ember-args", default="", help="more flags for `ember serve`")
    parser.add_argument("--serve-llama-cpp", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_llama_cpp:
        return serve_llama_cpp(args.model, args.serve_llama_cpp)
    if args.qwen2_shape and not os.path.exists(args.model):
        write_qwen2_shape(args.model, args.tokenizer)

    log = open(os.devnull, "w")
    ember = subprocess.Popen([args.ember, "serve", args.model, "--served-model-name", "m", "--port", "18080",
                              "--no-enable-prefix-caching", *args.ember_args.split()], stdout=log, stderr=log)  # fmt: skip
    ready = wait_ready("http://127.0.0.1:18080", ember)
    llama = subprocess.Popen([sys.executable, __file__, args.model, "--serve-llama-cpp", "18081"], stdout=log, stderr=log)
    try:
        wait_ready("http://127.0.0.1:18081", llama)
        print(f"Ember is ready after {ready:.2f} s, {memory_mib(ember.pid):.0f} MiB beside file pages", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for load in args.loads:
                compare(args, load, ember.pid, folder)
    finally:
        ember.terminate()
        llama.kill()


def compare(args, load, pid, folder):
    runs = {"Ember": [], "llama.cpp": []}
    for seed in range(args.rounds):
        for name, port in (("Ember", 18080), ("llama.cpp", 18081)):
            runs[name].append(measure(args.bench, f"http://127.0.0.1:{port}", LOADS[load], seed, folder))
    prefill = load.startswith("prefill")
    rates = {}
    for name, summaries in runs.items():
        median = lambda figure: statistics.median(v for s in summaries if (v := figure(s)) is not None)
        failed = sum(s["failed"] for s in summaries)
        ttft = median(lambda s: s["avg_ttft_s"])
        if prefill:
            rates[name] = [1024 / ttft]
            text = f"{1024 / ttft:8.1f} tok/s of prompt, TTFT {ttft * 1e3:.0f} ms"
        else:
            tpot = median(lambda s: s["avg_tpot_s"])
            # Of the time in which requests were answered: failed ones end early and leave places empty.
            rates[name] = [median(lambda s: s["output_tok_s"]), 1 / tpot]
            text = f"{rates[name][0]:8.1f} tok/s, TPOT {tpot * 1e3:.2f} ms, TTFT {ttft * 1e3:.0f} ms"
        print(f"{load:14} {name:10} {text}{f', {failed} failed' if failed else ''}", flush=True)
    ratios = " and ".join(f"{a / b:.2f}" for a, b in zip(rates["Ember"], rates["llama.cpp"]))
    what = "" if prefill else " (tokens per second, time per token)"
    print(f"{load:14} ratio {ratios}{what}; Ember's memory beside file pages {memory_mib(pid):.0f} MiB\n", flush=True)


main()
