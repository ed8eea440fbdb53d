//! Endpoints that the model cannot serve, and those that every model does.

use ember_server::Task;
use serde_json::{Value, json};

use super::Server;
use crate::fake::{app_for, config};

/// Path, a good body, status if the model generates text, status if it makes vectors, the endpoint's name.
fn cases() -> Vec<(&'static str, Value, u16, u16, &'static str)> {
    let messages = json!([{"role": "user", "content": "x"}]);
    let pair = json!({"query": "x", "documents": ["y"], "queries": "x"});
    vec![
        ("/v1/chat/completions", json!({"messages": messages}), 200, 501, "Chat Completions API"),
        ("/v1/chat/completions/batch", json!({"messages": [messages]}), 200, 501, "Chat Completions API"),
        ("/v1/completions", json!({"prompt": "x"}), 200, 501, "Completions API"),
        ("/v1/responses", json!({"input": "x"}), 200, 501, "Responses API"),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 1}), 200, 501, "Messages API"),
        ("/v1/messages/count_tokens", json!({"messages": messages}), 200, 501, "Messages API"),
        ("/v1/embeddings", json!({"input": "x"}), 501, 200, "Embeddings API"),
        ("/score", pair.clone(), 501, 200, "Score API"),
        ("/v1/score", pair.clone(), 501, 200, "Score API"),
        ("/rerank", pair.clone(), 501, 200, "Rerank API"),
        ("/v1/rerank", pair.clone(), 501, 200, "Rerank API"),
        ("/v2/rerank", pair, 501, 200, "Rerank API"),
        ("/tokenize", json!({"prompt": "x"}), 200, 200, ""),
        ("/detokenize", json!({"tokens": [65]}), 200, 200, ""),
        ("/ping", json!({}), 200, 200, ""),
        // By the body's shape.
        ("/invocations", json!({"messages": messages}), 200, 501, "Chat Completions API"),
        ("/invocations", json!({"prompt": "x"}), 200, 501, "Completions API"),
        ("/invocations", json!({"input": ["x"]}), 501, 200, "Embeddings API"),
        ("/invocations", json!({"text_1": "x", "text_2": "y"}), 501, 200, "Score API"),
        ("/invocations", json!({"query": "x", "documents": ["y"]}), 501, 200, "Rerank API"),
        ("/invocations", json!({"x": 1}), 400, 400, ""),
        // Whatever the body: the model could not answer any.
        ("/v1/chat/completions", json!({"messages": 5}), 400, 501, "Chat Completions API"),
        ("/v1/embeddings", json!({"input": 5}), 501, 400, "Embeddings API"),
    ]
}

#[tokio::test]
async fn endpoints_that_the_model_cannot_serve_say_so() {
    let servers = [Task::Generate, Task::Embed].map(|task| Server::over(app_for(task, config())));
    let [generating, embedding] = servers;
    let (generating, embedding) = (generating.await, embedding.await);
    for (path, body, if_generating, if_embedding, name) in cases() {
        for (server, expected) in [(&generating, if_generating), (&embedding, if_embedding)] {
            let head = format!("POST {path}\ncontent-type: application/json");
            let (status, text) = server.exchange(&head, body.to_string().as_bytes()).await;
            assert_eq!(status, expected, "{path} {body}: {text}");
            if status != 501 {
                continue;
            }
            let message = format!("The model does not support {name}");
            let answer: Value = serde_json::from_str(&text).expect("JSON");
            let expected = if path.starts_with("/v1/messages") {
                json!({"type": "error", "error": {"type": "api_error", "message": message}})
            } else {
                json!({"error": {"message": message, "type": "NotImplementedError", "param": null, "code": 501}})
            };
            assert_eq!(answer, expected, "{path}");
        }
    }
}

#[tokio::test]
async fn the_document_has_what_the_model_serves() {
    for (task, served, other) in [
        (Task::Generate, "/v1/chat/completions", "/v1/embeddings"),
        (Task::Embed, "/v1/embeddings", "/v1/chat/completions"),
    ] {
        let (_, text) = Server::over(app_for(task, config())).await.exchange("GET /openapi.json", b"").await;
        let document: Value = serde_json::from_str(&text).expect("JSON");
        let paths = document["paths"].as_object().expect("paths");
        assert!(paths.contains_key(served) && paths.contains_key("/tokenize") && !paths.contains_key(other), "{text}");
    }
}
