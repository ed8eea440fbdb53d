//! Beam search on a real engine: its scores are the model's, and a wider search finds nothing worse.

use serde_json::{Value, json};

use crate::server::{Server, text};

async fn complete(server: &Server, fields: Value) -> Value {
    let mut body =
        json!({"prompt": "once", "max_tokens": 6, "ignore_eos": true, "logprobs": 1, "return_token_ids": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let response = server.post("/v1/completions", &body).await;
    let status = response.status();
    let answer = text(response).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).unwrap()
}

fn total(choice: &Value) -> f64 {
    choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).sum()
}

#[tokio::test]
async fn a_search_of_one_beam_is_greedy_and_wider_ones_are_no_worse() {
    let server = Server::tiny(&[]);
    let greedy = complete(&server, json!({"temperature": 0})).await;
    let greedy = &greedy["choices"][0];
    let one = complete(&server, json!({"use_beam_search": true})).await;
    for field in ["text", "token_ids", "finish_reason"] {
        assert_eq!(one["choices"][0][field], greedy[field], "{one}");
    }
    let wide = complete(&server, json!({"use_beam_search": true, "n": 8})).await;
    let choices = wide["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 8);
    let totals: Vec<f64> = choices.iter().map(total).collect();
    assert!(totals.windows(2).all(|pair| pair[0] >= pair[1]), "{totals:?}");
    assert!(totals[0] >= total(greedy) - 1e-4, "{totals:?}, greedy {}", total(greedy));
    let mut ids: Vec<String> = choices.iter().map(|choice| choice["token_ids"].to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 8, "every output is another");
    assert_eq!(wide["usage"]["completion_tokens"], 8 * 6);

    // Scored as a prompt, the best output has the same probability.
    let mut prompt: Vec<u64> = "once".bytes().map(u64::from).collect();
    prompt.extend(choices[0]["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()));
    let scored = complete(&server, json!({"prompt": prompt, "max_tokens": 0, "echo": true})).await;
    let logprobs = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    let scored: f64 = logprobs[4..].iter().map(|it| it.as_f64().unwrap()).sum();
    assert!((scored - totals[0]).abs() < 1e-2, "{scored} {}", totals[0]);
}

#[tokio::test]
async fn outputs_that_end_are_scored_by_their_length() {
    let server = Server::tiny(&[]);
    let best = async |length_penalty: f64| {
        let fields = json!({
            "use_beam_search": true, "n": 4, "length_penalty": length_penalty, "ignore_eos": false, "max_tokens": 12,
        });
        let answer = complete(&server, fields).await;
        answer["choices"][0]["token_ids"].as_array().unwrap().len()
    };
    // Log-probabilities are negative: divided by more, long outputs look better.
    assert!(best(-4.0).await <= best(4.0).await);
}
