//! all-MiniLM-L6-v2 against vectors of an independent float64 encoder (`xtask/reference/bert_embeddings.py`).
//! Needs the model in the cache: `cargo xtask model minilm`.

mod cache;

use ember_engine::{EngineConfig, embedding::EmbeddingEngine};

#[derive(serde::Deserialize)]
struct Golden {
    text: String,
    n_tokens: usize,
    vector: Vec<f32>,
}

fn engine() -> EmbeddingEngine {
    let path = cache::model("minilm", "all-MiniLM-L6-v2");
    assert!(EmbeddingEngine::is_for(&path).expect("a model folder"));
    EmbeddingEngine::load(&path, EngineConfig::default()).expect("the model loads")
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn vectors_are_those_of_the_reference_alone_and_together() {
    let engine = engine();
    let golden: Vec<Golden> = serde_json::from_str(include_str!("data/minilm.json")).expect("golden vectors");
    let mut texts: Vec<Vec<u32>> =
        golden.iter().map(|it| engine.tokenizer().encode(&it.text, true).expect("encodes")).collect();
    texts.iter_mut().for_each(|ids| ids.truncate(engine.info().max_model_len));
    assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), golden.iter().map(|it| it.n_tokens).collect::<Vec<_>>());
    let together = engine.embed(&texts).expect("embeds");
    for ((text, vector), golden) in texts.iter().zip(&together).zip(&golden) {
        let alone = &engine.embed(std::slice::from_ref(text)).expect("embeds")[0];
        for vector in [vector, alone] {
            let near = cosine(vector, &golden.vector);
            assert!(near > 0.999_99, "{near} for {:?}", golden.text);
            assert!((cosine(vector, vector) - 1.0).abs() < 1e-5);
        }
    }
    assert!(cosine(&together[0], &together[1]) > cosine(&together[0], &together[2]) + 0.3);
}

#[test]
fn texts_that_cannot_be_embedded_are_refused() {
    let engine = engine();
    let message = |ids: Vec<u32>| engine.embed(&[ids]).expect_err("refused").to_string();
    assert!(message(vec![]).contains("no tokens"));
    assert!(message(vec![1; 257]).contains("256 tokens"));
    assert!(message(vec![30_522]).contains("out of vocabulary"));
}
