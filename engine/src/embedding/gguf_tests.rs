//! GGUF files of embedding models, written here as llama.cpp's converter writes them, against the Hugging Face folders
//! that they are made from.

#[path = "../../tests/cache/mod.rs"]
mod cache;
#[path = "../../tests/checkpoint/mod.rs"]
mod checkpoint;

use std::path::{Path, PathBuf};

use checkpoint::Golden;
use serde_json::Value;

use super::{BertFiles, BertSpec, EmbeddingEngine, bert_files::gguf_name};
use crate::{
    DeviceChoice, EngineConfig, LoadFormat,
    decoder::{LayerWeight, Weight},
    models::{HfConfig, Model},
    quant,
    weights::{
        DType, TensorView,
        gguf::{tensor_name, writer::GgufWriter},
        safetensors::SafetensorsFolder,
    },
};

/// Texts that WordPiece tokenizers differ in.
const TEXTS: [&str; 22] = [
    "A lighthouse warns ships of the coast.",
    "Größe, naïve café, Ångström, ŁÓDŹ, İstanbul, façade: crème brûlée!",
    "e\u{301}te\u{301} n\u{303} A\u{30a} o\u{308}\u{304}",
    "灯塔指引船只。東京タワー、서울특별시 Привет, мир! Ελληνικά γράμματα שלום مرحبا नमस्ते ไทย",
    "mixed漢字and latin㐀𠀀word豈",
    "it's don't o'clock 3.14 1,000,000 50% $5.00 (a) [b] {c} <d> a_b-c/d\\e @f #g ^h `i` ~j | k + l = m",
    "“quotes” ‘single’ — dash – en… ¿que? ¡hola! «guillemets» ‹x› ・ 、。",
    "★ ☃ 🙂👍🏽 👨\u{200d}👩\u{200d}👧 ∑∫√ ™©® ²³½ ﬁ ﬂ Ⅷ ①",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a\tb\nc\r\nd\u{a0}e\u{3000}f\u{2003}g   h\u{200b}i\u{feff}j\u{0}k\u{7}l\u{fffd}m\u{ad}n",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [unused0] [unused99] ##ing ## # ▁the ▁",
    "THE QUICK BROWN FOX JUMPS OVER 13 LAZY DOGS",
    "ẞ ß ſ ŉ ǅ Σας ΣΑΣ ﬀ İi ıI",
    "http://example.com/path?query=value&other=1#fragment user@example.org",
    "fn main() { println!(\"{}\", x[0] += 1); }",
    "\u{1f468}\u{fe0f} \u{2764}\u{fe0f} a\u{fe0f}b",
    "",
    " ",
    "x",
    "꙰ ᚠᛇᚻ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℌ ﷺ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa b",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
];

fn minilm() -> PathBuf {
    cache::model("minilm", "all-MiniLM-L6-v2")
}

/// all-MiniLM-L6-v2 as a GGUF file, its matrices as `format` has them.
fn minilm_gguf(format: Option<&str>) -> GgufWriter {
    let folder = minilm();
    let config = HfConfig::open(&folder.join("config.json")).expect("valid");
    let spec = BertSpec::from_config(&config).expect("valid");
    let mut w = GgufWriter::default();
    w.string("general.architecture", "bert").u32("bert.block_count", spec.n_layers as u32);
    w.u32("bert.context_length", spec.max_position as u32).u32("bert.embedding_length", spec.hidden_size as u32);
    w.u32("bert.feed_forward_length", spec.intermediate_size as u32).u32("bert.attention.head_count", 12);
    w.f32("bert.attention.layer_norm_epsilon", 1e-12).bool("bert.attention.causal", false).u32("bert.pooling_type", 1);
    write_vocabulary(&mut w, &folder);

    let files = SafetensorsFolder::open(&folder).expect("valid");
    let files = BertFiles::Folder(&files);
    let (h, inter) = (spec.hidden_size, spec.intermediate_size);
    let mut tensors = vec![
        ("embeddings.word_embeddings".to_owned(), vec![spec.vocab_size, h]),
        ("embeddings.position_embeddings".to_owned(), vec![spec.max_position, h]),
        ("embeddings.token_type_embeddings".to_owned(), vec![2, h]),
        ("embeddings.LayerNorm".to_owned(), vec![h]),
    ];
    for layer in 0..spec.n_layers {
        let square = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"];
        let modules = square.into_iter().map(|module| (module, vec![h, h]));
        let modules = modules.chain([("intermediate.dense", vec![inter, h]), ("output.dense", vec![h, inter])]);
        let norms = ["attention.output.LayerNorm", "output.LayerNorm"].map(|norm| (norm, vec![h]));
        tensors.extend(modules.chain(norms).map(|(module, shape)| (format!("encoder.layer.{layer}.{module}"), shape)));
    }
    for (module, shape) in tensors {
        let name = format!("{module}.weight");
        write_tensor(&mut w, &gguf_name(&name), files.tensor(&name, shape.clone()).expect("there"), format);
        if !module.ends_with("_embeddings") {
            let name = format!("{module}.bias");
            write_tensor(&mut w, &gguf_name(&name), files.tensor(&name, vec![shape[0]]).expect("there"), None);
        }
    }
    w
}

/// Writes the tokenizer of the folder: words' first pieces with `▁`, the next ones bare.
fn write_vocabulary(w: &mut GgufWriter, folder: &Path) {
    let text = std::fs::read_to_string(folder.join("tokenizer.json")).expect("there");
    let tokenizer: Value = serde_json::from_str(&text).expect("valid");
    let mut vocab: Vec<(u64, &str)> = tokenizer["model"]["vocab"]
        .as_object()
        .expect("a vocabulary")
        .iter()
        .map(|(token, id)| (id.as_u64().expect("an id"), token.as_str()))
        .collect();
    vocab.sort_unstable();
    let control = |id: u64| matches!(id, 0 | 100..=103);
    let spelled: Vec<String> = vocab
        .iter()
        .map(|&(id, token)| match token.strip_prefix("##") {
            _ if control(id) => token.to_owned(),
            Some(rest) => rest.to_owned(),
            None => format!("▁{token}"),
        })
        .collect();
    let types: Vec<i32> = vocab.iter().map(|&(id, _)| if control(id) { 3 } else { 1 }).collect();
    w.string("tokenizer.ggml.model", "bert").string("tokenizer.ggml.pre", "jina-v2-en");
    w.strings("tokenizer.ggml.tokens", &spelled.iter().map(String::as_str).collect::<Vec<_>>());
    w.i32s("tokenizer.ggml.token_type", &types).u32("tokenizer.ggml.token_type_count", 2);
    for (key, id) in [("unknown", 100), ("seperator", 102), ("padding", 0), ("cls", 101), ("mask", 103)] {
        w.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
    }
}

/// Matrices as `format` has them, other tensors in single precision.
fn write_tensor(w: &mut GgufWriter, name: &str, tensor: TensorView<'_>, format: Option<&str>) {
    let format = format.filter(|_| tensor.shape.len() == 2).and_then(quant::by_name);
    match format.and_then(|format| tensor.quantize(format)) {
        Some(rounded) => {
            let DType::Quant(format) = rounded.dtype else { panic!("quantised") };
            w.tensor(name, &rounded.shape, format.ggml_type(), rounded.data.to_vec())
        }
        None => {
            let data = tensor.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
            w.tensor(name, &tensor.shape, 0, data)
        }
    };
}

fn load(path: &Path) -> EmbeddingEngine {
    assert!(EmbeddingEngine::is_for(path).expect("a model"));
    let config =
        EngineConfig { device: DeviceChoice::Cpu, kv_cache_memory_bytes: Some(4 << 20), ..EngineConfig::default() };
    EmbeddingEngine::load(path, config).expect("loads")
}

fn encode(engine: &EmbeddingEngine) -> Vec<Vec<u32>> {
    TEXTS.iter().map(|text| engine.tokenizer().encode(text, true).expect("encodable")).collect()
}

/// The least cosine of the vectors of the same texts.
fn least_cosine(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).fold(1.0, f32::min)
}

#[test]
fn a_bert_file_gives_the_ids_and_vectors_of_its_folder() {
    let folder = load(&minilm());
    let ids = encode(&folder);
    let vectors = folder.embed(&ids).expect("embeds");
    for (format, bar) in [(None, 0.999_999), (Some("Q8_0"), 0.999)] {
        let file = minilm_gguf(format).file();
        let gguf = load(file.path());
        assert_eq!(gguf.info().file_dtype, format.unwrap_or("F32"));
        assert_eq!((gguf.info().max_model_len, gguf.info().n_parameters), (512, folder.info().n_parameters));
        for (text, (ids, other)) in TEXTS.iter().zip(ids.iter().zip(encode(&gguf))) {
            assert_eq!(ids, &other, "{text:?}");
            let decoded = [&folder, &gguf].map(|engine| engine.tokenizer().decode(ids, true).expect("decodable"));
            assert_eq!(decoded[0], decoded[1], "{text:?}");
        }
        let parsed = [&folder, &gguf].map(|engine| engine.tokenizer().encode_with_special(TEXTS[10]).expect("valid"));
        assert_eq!(parsed[0], parsed[1]);
        assert_eq!(gguf.tokenizer().n_added(), (1, 1));
        let least = least_cosine(&vectors, &gguf.embed(&ids).expect("embeds"));
        println!("{}: least cosine {least:.7}", format.unwrap_or("F32"));
        assert!(least > bar, "{format:?}: {least}");
    }
}

/// A decoder's folder as a GGUF file that says `pooling_type`.
fn decoder_gguf(folder: &Path, (name, pooling_type): (&str, u32)) -> GgufWriter {
    let model = Model::open_headless(folder, LoadFormat::Auto, 0).expect("opens");
    let spec = &model.spec;
    let mut w = GgufWriter::default();
    w.string("general.architecture", name);
    for (key, value) in [
        ("context_length", spec.max_position),
        ("embedding_length", spec.hidden_size),
        ("feed_forward_length", spec.intermediate_size),
        ("block_count", spec.n_layers),
        ("attention.head_count", spec.n_heads),
        ("attention.head_count_kv", spec.n_kv_heads),
        ("attention.key_length", spec.head_dim),
        ("pooling_type", pooling_type as usize),
    ] {
        w.u32(&format!("{name}.{key}"), value as u32);
    }
    w.f32(&format!("{name}.attention.layer_norm_rms_epsilon"), spec.norm_eps);
    w.f32(&format!("{name}.rope.freq_base"), spec.rope.theta);
    w.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "qwen2");
    w.strings("tokenizer.ggml.tokens", &["a", "</s>"]).i32s("tokenizer.ggml.token_type", &[1, 3]);
    w.strings("tokenizer.ggml.merges", &[]).u32("tokenizer.ggml.eos_token_id", 1);
    w.bool("tokenizer.ggml.add_eos_token", true);
    for weight in spec.weights() {
        let mut tensor = model.weights.get(weight).expect("there");
        if name == "llama" && matches!(weight, Weight::Layer(_, LayerWeight::QProj | LayerWeight::KProj)) {
            // Rows (half, pair) of a head become (pair, half).
            let row_bytes = tensor.row_bytes();
            let half = spec.head_dim / 2;
            let rows = |head: usize, row: usize| (head * spec.head_dim + row) * row_bytes;
            let data: Vec<u8> = (0..tensor.shape[0])
                .map(|row| (row / spec.head_dim, row % spec.head_dim))
                .flat_map(|(head, row)| tensor.data[rows(head, row % 2 * half + row / 2)..][..row_bytes].to_vec())
                .collect();
            tensor.data = data.into();
        }
        write_tensor(&mut w, &tensor_name(weight), tensor, None);
    }
    w
}

#[test]
fn decoder_files_give_the_vectors_of_transformers() {
    for (name, of) in [("llama_mean", ("llama", 1)), ("qwen3_last", ("qwen3", 3))] {
        let golden = Golden::read(name);
        let file = decoder_gguf(golden.folder().path(), of).file();
        let engine = load(file.path());
        assert_eq!(engine.tokenizer().encode("aa", true).expect("encodable"), [0, 0, 1]);
        assert_eq!(engine.tokenizer().n_added(), (0, 1));
        let ids: Vec<Vec<u32>> = golden.texts.iter().map(|text| text.ids.clone()).collect();
        let expected = golden.texts.iter().map(|text| {
            let length = text.vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            text.vector.iter().map(|x| x / length).collect::<Vec<f32>>()
        });
        let least = least_cosine(&expected.collect::<Vec<_>>(), &engine.embed(&ids).expect("embeds"));
        println!("{name}: least cosine {least:.7}");
        assert!(least > 0.999_9, "{name}: {least}");
    }
}

#[test]
fn what_a_file_says_wrongly_is_named() {
    let message = |edit: &dyn Fn(&mut GgufWriter)| {
        let mut w = GgufWriter::default();
        w.string("general.architecture", "bert").u32("bert.block_count", 1).u32("bert.context_length", 8);
        w.u32("bert.embedding_length", 4).u32("bert.feed_forward_length", 8).u32("bert.attention.head_count", 2);
        w.tensor("token_embd.weight", &[2, 4], 0, vec![0; 32]);
        w.string("tokenizer.ggml.model", "bert").strings("tokenizer.ggml.tokens", &["[CLS]", "▁a"]);
        for key in ["unknown", "cls", "seperator"] {
            w.u32(&format!("tokenizer.ggml.{key}_token_id"), 0);
        }
        edit(&mut w);
        let file = w.file();
        let result = EmbeddingEngine::load(file.path(), EngineConfig::default());
        result.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let set = |key: &'static str, value: u32| move |w: &mut GgufWriter| w.replace(key, 4, &value.to_le_bytes());
    assert!(message(&|_| ()).contains("tensor 'position_embd.weight' is missing"), "{}", message(&|_| ()));
    for (key, value, expected) in [
        ("bert.pooling_type", 4, "'bert.pooling_type' is 4, which is not supported"),
        ("bert.attention.head_count", 3, "'bert.attention.head_count' must divide"),
        ("bert.block_count", 0, "'bert.block_count' is 0"),
        ("tokenizer.ggml.seperator_token_id", 2, "'tokenizer.ggml.seperator_token_id' is 2, but there are only 2"),
    ] {
        let message = message(&set(key, value));
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let wide = message(&|w| {
        w.tensor("position_embd.weight", &[8, 5], 0, vec![0; 160]);
    });
    assert!(wide.contains("'position_embd.weight' has shape [8, 5], but the metadata imply [8, 4]"), "{wide}");
    let causal = message(&|w| {
        w.bool("bert.attention.causal", true);
    });
    assert!(causal.contains("'bert.attention.causal' is true"), "{causal}");
    let generate = |w: &GgufWriter| Model::open(w.file().path(), LoadFormat::Auto, 0).err().map(|e| e.to_string());
    let mut w = GgufWriter::default();
    w.string("general.architecture", "bert");
    assert!(generate(&w).is_some_and(|e| e.contains("it makes embeddings, with --runner pooling")));
}
