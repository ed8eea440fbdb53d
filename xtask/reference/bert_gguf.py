"""A BERT embedding model as GGUF files, and Ember's answers from them beside those of its Hugging Face folder, of
llama.cpp (the server inside the PyPI package `xllamacpp`) and of sentence-transformers.

    pip install gguf numpy safetensors xllamacpp sentence-transformers
    cargo build -p ember-server
    python bert_gguf.py FOLDER OUT                   # writes OUT-f32.gguf and OUT-q8_0.gguf
    python bert_gguf.py FOLDER OUT --ember target/debug/ember --compare folder llama.cpp sentence-transformers

FOLDER holds all-MiniLM-L6-v2 (`cargo xtask model minilm`). Files are as llama.cpp's converter writes them: token_embd,
blk.N.attn_q, ..., words' first pieces with U+2581 in front and the next ones bare. With --ember, the server is asked
for /tokenize and /v1/embeddings; each comparison prints the least cosine, and how many texts have other tokens. The
packages of a comparison need not be there for the others.
"""

import argparse
import base64
import json
import subprocess
import time
import urllib.request

PORT = 18090
# Beside the layers', and within them.
NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
TEXTS = [
    "A lighthouse warns ships of the coast.",
    "Größe, naïve café, Ångström, ŁÓDŹ, façade: crème brûlée!",
    "灯塔指引船只。東京タワー Привет, мир! Ελληνικά γράμματα",
    "it's don't o'clock 3.14 1,000,000 50% $5.00 (a) [b] {c} a_b-c/d\\e @f #g ~j | k + l = m",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis ★ 🙂",
    "a\tb\nc\u00a0d\u3000e   f ##ing [sic]",
    "THE QUICK BROWN FOX JUMPS OVER 13 LAZY DOGS",
    "x",
    "The recipe asks for two eggs and a pinch of salt. " * 15,
]
# Over any context.
LONG = "Ships are warned of cliffs by a tower with a lamp, whose keeper counts the days; number %d of his tales follows. "
LONG_TEXTS = ["".join(LONG % i for i in range(200)), "word " * 3000, "灯塔" * 400]


def write(folder, path, quantised):
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.load(open(f"{folder}/config.json"))
    vocab = json.load(open(f"{folder}/tokenizer.json"))
    special = {token["content"]: token["id"] for token in vocab["added_tokens"] if token["special"]}
    tokens = [None] * len(vocab["model"]["vocab"])
    for token, i in vocab["model"]["vocab"].items():
        bare = token if token in special else token[2:] if token.startswith("##") else "\u2581" + token
        tokens[i] = (bare, gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantised else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_type_count(config["type_vocab_size"])
    # The converter's special vocabulary has CLS and SEP as beginning and end, too.
    writer.add_bos_token_id(special["[CLS]"])
    writer.add_eos_token_id(special["[SEP]"])
    writer.add_unk_token_id(special["[UNK]"])
    writer.add_sep_token_id(special["[SEP]"])
    writer.add_pad_token_id(special["[PAD]"])
    writer.add_mask_token_id(special["[MASK]"])
    for name, value in load_file(f"{folder}/model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if module in NAMES:
            name = f"{NAMES[module]}.{kind}"
        elif module.startswith("encoder.layer."):
            _, _, layer, module = module.split(".", 3)
            name = f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"
        else:
            # Position ids and the pooler, which embeddings do not use.
            continue
        value = value.astype(np.float32)
        if quantised and value.ndim == 2 and module not in ("embeddings.position_embeddings", "embeddings.token_type_embeddings"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def post(path, body, port=PORT):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def ask_ember(ember, model, truncate=None):
    """Token ids and vectors of the texts; those of the long ones if `truncate` says how many tokens to keep."""
    import numpy as np

    texts = LONG_TEXTS if truncate else TEXTS
    server = subprocess.Popen([ember, "serve", model, "--port", str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
                break
            except OSError:
                assert server.poll() is None, f"the server ended with status {server.returncode}"
                time.sleep(0.1)
        ids = [] if truncate else [post("/tokenize", {"prompt": text})["tokens"] for text in texts]
        body = {"input": texts, "encoding_format": "base64"}
        answer = post("/v1/embeddings", body | ({"truncate_prompt_tokens": truncate} if truncate else {}))
        vectors = [np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in answer["data"]]
        return ids, unit(np.array(vectors))
    finally:
        server.terminate()
        server.wait()


def unit(vectors):
    import numpy as np

    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ask_llama_cpp(model):
    import numpy as np
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.embedding = True
    params.port = PORT + 1
    params.n_parallel = 1
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.ui = False
    server = xllamacpp.Server(params)
    plain = {"add_special": True, "parse_special": False}
    ids = [post("/tokenize", {"content": text} | plain, PORT + 1)["tokens"] for text in TEXTS]
    answer = post("/v1/embeddings", {"input": TEXTS}, PORT + 1)
    del server
    return ids, unit(np.array([row["embedding"] for row in answer["data"]]))


def ask_sentence_transformers(folder, texts):
    from sentence_transformers import SentenceTransformer

    return unit(SentenceTransformer(folder, device="cpu").encode(texts))


def report(what, ours, theirs):
    cosines = (ours[1] * theirs[1]).sum(1)
    line = f"{what}: least cosine {cosines.min():.7f}"
    if theirs[0]:
        line += f", {sum(a != b for a, b in zip(ours[0], theirs[0]))} of {len(theirs[0])} texts with other tokens"
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--ember", help="the binary to ask")
    parser.add_argument("--compare", nargs="+", default=["folder"], choices=["folder", "llama.cpp", "sentence-transformers"])
    args = parser.parse_args()
    files = {name: f"{args.out}-{name}.gguf" for name in ("f32", "q8_0")}
    if not args.ember or "folder" in args.compare:
        for name, path in files.items():
            write(args.folder, path, name == "q8_0")
    if not args.ember:
        return
    if "folder" in args.compare:
        folder = ask_ember(args.ember, args.folder)
        for name, path in files.items():
            report(f"Ember's {name} and its folder", ask_ember(args.ember, path), folder)
    if "llama.cpp" in args.compare:
        for name, path in files.items():
            report(f"Ember's {name} and llama.cpp's", ask_ember(args.ember, path), ask_llama_cpp(path))
    if "sentence-transformers" in args.compare:
        report("the folder and sentence-transformers", ask_ember(args.ember, args.folder), ([], ask_sentence_transformers(args.folder, TEXTS)))
        long = ask_sentence_transformers(args.folder, LONG_TEXTS)
        report("the same, texts cut at the context's end", ask_ember(args.ember, args.folder, truncate=-1), ([], long))


main()
