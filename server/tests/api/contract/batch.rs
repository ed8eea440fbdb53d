//! Fields of `/v1/chat/completions/batch`, and its answers.

use serde_json::{Value, json};

use super::Case;
use crate::fake::{TEXT, ask};

pub const PATH: &str = "/v1/chat/completions/batch";

/// Beside one conversation.
pub fn cases() -> Vec<Case> {
    let user = json!({"role": "user", "content": "x"});
    vec![
        (json!({}), 200, "", ""),
        (json!({"messages": [[user], [user, user]]}), 200, "", ""),
        (json!({"messages": []}), 400, "1 to 1024 conversations, not 0", "messages"),
        (json!({"messages": vec![json!([user]); 1025]}), 400, "not 1025", "messages"),
        (json!({"messages": [[user], user]}), 400, "a list of messages", "body.messages.1"),
        (json!({"messages": [[user], []]}), 400, "at least one message", "messages"),
        (json!({"stream": true}), 400, "several conversations", "stream"),
        (json!({"stream": false, "n": 1}), 200, "", ""),
        (json!({"n": 2}), 400, "several conversations", "n"),
        (json!({"use_beam_search": true}), 400, "several conversations", "use_beam_search"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), 400, "several conversations", "tools"),
        (json!({"prompt_logprobs": 1}), 400, "several conversations", "prompt_logprobs"),
        (json!({"return_token_ids": true}), 400, "several conversations", "return_token_ids"),
        (json!({"return_prompt_text": true}), 400, "several conversations", "return_prompt_text"),
        (json!({"temperature": 3}), 400, "temperature must be in [0, 2]", "temperature"),
        (json!({"model": "gpt"}), 404, "The model `gpt` does not exist", "model"),
        (json!({"logprobs": true, "top_logprobs": 2, "max_completion_tokens": 3}), 200, "", ""),
    ]
}

#[tokio::test]
async fn every_conversation_has_a_choice_in_its_place() {
    let said = |text: &str| json!([{"role": "user", "content": text}]);
    let body = json!({"messages": [said("a"), said("bc"), said("d")]});
    let (status, text) = ask(PATH, &body).await;
    assert_eq!(status, 200, "{text}");
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(answer["object"], "chat.completion");
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    assert!(choices.iter().all(|choice| choice["message"]["content"] == TEXT), "{text}");
    let mut prompt_tokens = 0;
    for conversation in body["messages"].as_array().expect("conversations") {
        let (_, alone) = ask("/v1/chat/completions", &json!({"messages": conversation})).await;
        let alone: Value = serde_json::from_str(&alone).expect("JSON");
        prompt_tokens += alone["usage"]["prompt_tokens"].as_u64().expect("a count");
    }
    assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
    assert_eq!(answer["usage"]["completion_tokens"], 3 * (TEXT.len() + 1));
}
