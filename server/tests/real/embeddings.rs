//! An embedding model behind the binary: all-MiniLM-L6-v2 from the cache (`cargo xtask model minilm`).

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::server::{Server, text};

fn server() -> Server {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"), PathBuf::from);
    Server::start(&cache.join("ember/models/all-MiniLM-L6-v2"), &[])
}

async fn ask(server: &Server, path: &str, body: Value) -> (u16, Value) {
    let response = server.post(path, &body).await;
    let status = response.status().as_u16();
    (status, serde_json::from_str(&text(response).await).unwrap())
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

const NEAR: &str = "Ships are warned of cliffs by a tower with a lamp.";
const FAR: &str = "The recipe asks for two eggs and a pinch of salt.";
const QUERY: &str = "A lighthouse warns ships of the coast.";

#[tokio::test]
async fn vectors_scores_and_ranks_agree() {
    let server = server();
    let (status, answer) = ask(&server, "/v1/embeddings", json!({"model": "tiny", "input": [QUERY, NEAR, FAR]})).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("tiny")));
    assert!(answer["id"].as_str().unwrap().starts_with("embd-"));
    let usage = &answer["usage"];
    assert!(usage["prompt_tokens"].as_u64() > Some(20) && usage["prompt_tokens"] == usage["total_tokens"]);
    let vectors: Vec<Vec<f64>> = (0..3).map(|i| floats(&answer["data"][i]["embedding"])).collect();
    assert!(vectors.iter().all(|vector| vector.len() == 384));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosines = [dot(&vectors[0], &vectors[1]), dot(&vectors[0], &vectors[2])];

    let tokens = ask(&server, "/tokenize", json!({"prompt": QUERY})).await.1["tokens"].clone();
    let (_, of_ids) = ask(&server, "/v1/embeddings", json!({"input": tokens})).await;
    assert!(dot(&floats(&of_ids["data"][0]["embedding"]), &vectors[0]) > 0.999_999);

    for path in ["/score", "/v1/score"] {
        let (_, scores) = ask(&server, path, json!({"queries": QUERY, "documents": [NEAR, FAR]})).await;
        for (i, cosine) in cosines.iter().enumerate() {
            assert!((scores["data"][i]["score"].as_f64().unwrap() - cosine).abs() < 1e-5, "{scores}");
        }
    }
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let (_, ranks) = ask(&server, path, json!({"query": QUERY, "documents": [FAR, NEAR]})).await;
        let order: Vec<_> =
            ranks["results"].as_array().unwrap().iter().map(|it| it["index"].as_u64().unwrap()).collect();
        assert_eq!(order, [1, 0], "{ranks}");
        assert_eq!(ranks["results"][0]["document"]["text"], NEAR);
        assert!((ranks["results"][0]["relevance_score"].as_f64().unwrap() - cosines[0]).abs() < 1e-5);
    }
    let (_, best) = ask(&server, "/rerank", json!({"query": QUERY, "documents": [FAR, NEAR], "top_n": 1})).await;
    assert_eq!(best["results"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn base64_holds_the_same_numbers() {
    let server = server();
    let (_, plain) = ask(&server, "/v1/embeddings", json!({"input": QUERY})).await;
    let (_, packed) = ask(&server, "/v1/embeddings", json!({"input": QUERY, "encoding_format": "base64"})).await;
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let text = packed["data"][0]["embedding"].as_str().unwrap().trim_end_matches('=').to_owned();
    let bits: Vec<u8> = text
        .chars()
        .flat_map(|c| {
            let value = alphabet.find(c).unwrap() as u8;
            (0..6).rev().map(move |bit| value >> bit & 1)
        })
        .collect();
    let bytes: Vec<u8> = bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |value, bit| value << 1 | bit)).collect();
    let numbers: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let plain: Vec<f32> = floats(&plain["data"][0]["embedding"]).into_iter().map(|x| x as f32).collect();
    assert_eq!(numbers, plain);
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused() {
    let server = server();
    let long = "a long text goes on and on, ".repeat(60);
    let cases = [
        ("/v1/embeddings", json!({"input": long}), "input_tokens", "maximum context length is 256"),
        ("/v1/embeddings", json!({"input": []}), "input", "at least one text"),
        ("/v1/embeddings", json!({"input": [[99_999]]}), "input", "out of vocabulary"),
        ("/v1/embeddings", json!({"input": "x", "dimensions": 128}), "dimensions", "384 dimensions"),
        ("/v1/embeddings", json!({"input": "x", "encoding_format": "hex"}), "encoding_format", "base64"),
        (
            "/v1/embeddings",
            json!({"input": "x", "truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
            "between 1 and",
        ),
        ("/v1/embeddings", json!({"input": "x", "truncation_side": "up"}), "truncation_side", "`left` or `right`"),
        ("/v1/embeddings", json!({"input": "x", "normalize": false}), "normalize", "not supported"),
        ("/score", json!({"queries": ["a", "b"], "documents": ["a", "b", "c"]}), "queries", "one query or as many"),
        ("/rerank", json!({"query": "a", "documents": []}), "documents", "1 to 2048"),
    ];
    for (path, body, param, message) in cases {
        let (status, answer) = ask(&server, path, body.clone()).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{path} {body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{path} {body}: {answer}");
    }
    let (status, answer) = ask(&server, "/v1/completions", json!({"prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["type"]), (501, &json!("NotImplementedError")), "{answer}");
    // However long: this one could not fit whatever its tokens were.
    let cut = json!({"input": long.repeat(10), "truncate_prompt_tokens": -1});
    let (status, answer) = ask(&server, "/v1/embeddings", cut).await;
    assert_eq!((status, &answer["usage"]["prompt_tokens"]), (200, &json!(256)), "{answer}");
}

#[tokio::test]
async fn a_generating_model_says_that_it_makes_no_embeddings() {
    let server = Server::tiny(&[]);
    let (status, answer) = ask(&server, "/v1/embeddings", json!({"input": "x"})).await;
    assert_eq!((status, &answer["error"]["type"]), (501, &json!("NotImplementedError")), "{answer}");
}
