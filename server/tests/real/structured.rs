//! Prescribed forms: whatever the model would rather say, the output is of the form.

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::server::{EOS, Server, text};

/// The end and closers are favoured and whitespace is not, so that random outputs come to an end; numbers get no
/// exponents, which no reader of JSON could hold.
fn biases() -> Value {
    let biases = [('"', 4), ('}', 5), (']', 5), (' ', -4), ('\n', -4), ('\t', -4), ('\r', -4), ('e', -20), ('E', -20)];
    let biases = biases.map(|(c, bias)| (u32::from(c), bias)).into_iter().chain([(EOS, 4)]);
    biases.map(|(id, bias)| (id.to_string(), json!(bias))).collect::<serde_json::Map<_, _>>().into()
}

async fn complete(server: &Server, fields: Value) -> (u16, Value) {
    let mut body = json!({"prompt": "x", "max_tokens": 400, "temperature": 1, "logit_bias": biases()});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let response = server.post("/v1/completions", &body).await;
    let status = response.status().as_u16();
    (status, serde_json::from_str(&text(response).await).unwrap())
}

/// The output, which must have come to its own end.
async fn output(server: &Server, fields: Value) -> String {
    let (status, answer) = complete(server, fields.clone()).await;
    assert_eq!(status, 200, "{fields}: {answer}");
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().unwrap();
    assert_eq!(choice["finish_reason"], "stop", "{fields}: {text}");
    text.to_owned()
}

#[tokio::test]
async fn every_output_is_valid_under_its_schema() {
    let server = Server::tiny(&[]);
    let schemas: Vec<Value> = serde_json::from_str(include_str!("schemas.json")).unwrap();
    assert!(schemas.len() >= 60);
    // Schemas of a few kinds at a time, so that rows of different grammars share their steps.
    for (group_idx, group) in schemas.chunks(8).enumerate() {
        let asked = group.iter().enumerate().flat_map(|(idx, schema)| {
            let seeds = (0..6).map(move |seed| (seed, schema));
            seeds.map(move |(seed, schema)| (group_idx * 100 + idx * 10 + seed, schema))
        });
        let check = |(seed, schema): (usize, &Value)| {
            let (server, schema) = (&server, schema.clone());
            async move {
                // Both ways to ask for it.
                let form = match seed % 2 {
                    0 => {
                        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}})
                    }
                    _ => json!({"structured_outputs": {"json": schema.to_string()}}),
                };
                let mut fields = form;
                fields["seed"] = json!(seed);
                let text = output(server, fields).await;
                let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
                let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert!(validator.is_valid(&value), "{schema}: {text}");
            }
        };
        join_all(asked.map(check)).await;
    }
}

#[tokio::test]
async fn other_forms_hold_too_beside_free_requests() {
    let server = Server::tiny(&["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]);
    let free = complete(&server, json!({"ignore_eos": true}));
    let object = output(&server, json!({"response_format": {"type": "json_object"}, "seed": 1}));
    let choice = output(&server, json!({"structured_outputs": {"choice": ["left", "right"]}, "n": 1}));
    let digits = output(&server, json!({"structured_outputs": {"regex": "[0-9]{3}-[ab]"}, "min_tokens": 50}));
    let lark =
        output(&server, json!({"structured_outputs": {"grammar": "start: \"<\" /[a-z]/ \">\""}, "ignore_eos": true}));
    let gbnf = output(&server, json!({"structured_outputs": {"grammar": "root ::= \"<\" [a-z] \">\""}}));
    let (free, object, choice, digits, lark, gbnf) = tokio::join!(free, object, choice, digits, lark, gbnf);
    assert_eq!(free.1["usage"]["completion_tokens"], 400);
    assert!(serde_json::from_str::<&serde_json::value::RawValue>(&object).unwrap().get().starts_with('{'));
    assert!(["left", "right"].contains(&choice.as_str()), "{choice}");
    assert!(digits.len() == 5 && digits.as_bytes()[3] == b'-', "{digits}");
    for text in [lark, gbnf] {
        assert!(text.len() == 3 && text.starts_with('<') && text.ends_with('>'), "{text}");
    }
    // Cut off, the output is the beginning of one of the form.
    let cut = json!({"structured_outputs": {"choice": ["abcdefgh"]}, "max_tokens": 3});
    let (_, answer) = complete(&server, cut).await;
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]),
        (&json!("abc"), &json!("length"))
    );
}

#[tokio::test]
async fn tools_are_called_as_they_are_declared() {
    // The template is not the model's own, and takes a variable of the server's.
    let template = "{{ word }}{% for message in messages %}{{ message.content }}{% endfor %}";
    let kwargs = r#"{"word": "Hello "}"#;
    let server = Server::tiny(&[
        "--tool-call-parser",
        "hermes",
        "--chat-template",
        template,
        "--default-chat-template-kwargs",
        kwargs,
    ]);
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "return_prompt_text": true});
    let answer: Value = serde_json::from_str(&text(server.post("/v1/chat/completions", &body).await).await).unwrap();
    assert_eq!(answer["prompt_text"], "Hello x");
    let parameters = json!({
        "type": "object", "required": ["city", "days"], "additionalProperties": false, "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"$ref": "#/$defs/days"}}
    });
    let schema = jsonschema::validator_for(&parameters).unwrap();
    for seed in 0..8 {
        for choice in [json!("required"), json!({"type": "function", "function": {"name": "weather"}})] {
            let body = json!({
                "messages": [{"role": "user", "content": "x"}], "seed": seed, "logit_bias": biases(), "max_tokens": 400,
                "tool_choice": choice, "parallel_tool_calls": seed % 2 == 0,
                "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
            });
            let response = server.post("/v1/chat/completions", &body).await;
            let answer: Value = serde_json::from_str(&text(response).await).unwrap();
            let message = &answer["choices"][0]["message"];
            let calls = message["tool_calls"].as_array().unwrap_or_else(|| panic!("no call: {answer}"));
            for call in calls {
                assert_eq!(call["function"]["name"], "weather");
                let arguments = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
                assert!(schema.is_valid(&arguments), "{arguments}");
            }
            assert_eq!(message["content"], Value::Null);
        }
    }
}

#[tokio::test]
async fn wrong_forms_are_400_and_name_their_field() {
    let server = Server::tiny(&[]);
    for (fields, param) in [
        (json!({"structured_outputs": {"json": {"type": "nonsense"}}}), "structured_outputs"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs"),
        (json!({"structured_outputs": {"grammar": "start: gone"}}), "structured_outputs"),
        (json!({"structured_outputs": {"grammar": "root ::= \"x"}}), "structured_outputs"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#/gone"}}}}),
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "pattern": "["}}}}),
            "response_format",
        ),
        (json!({"bad_words": (0..200).map(|i| format!("w{i}")).collect::<Vec<_>>()}), "bad_words"),
    ] {
        let (status, answer) = complete(&server, fields.clone()).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{fields}: {answer}");
    }
}

#[tokio::test]
async fn bad_words_do_not_come() {
    let server = Server::tiny(&[]);
    let bias = json!({"97": 20, "98": 20});
    let fields = |bad_words: Value| json!({"logit_bias": bias, "bad_words": bad_words, "max_tokens": 200, "ignore_eos": true, "seed": 3});
    let output =
        async |bad_words: Value| complete(&server, fields(bad_words)).await.1["choices"][0]["text"].to_string();
    assert!(output(json!([])).await.contains("aab"));
    let text = output(json!(["aab", "bb"])).await;
    assert!(!text.contains("aab") && !text.contains("bb"), "{text}");
}

#[tokio::test]
async fn after_a_trigger_one_of_its_structures_comes_whole() {
    let server = Server::tiny(&[]);
    let structure = |name: &str, schema: Value| json!({"begin": format!("<{name}>"), "schema": schema, "end": "</>"});
    let structures = [structure("f", json!({"enum": [1, 22]})), structure("gg", json!({"const": "x"}))];
    for seed in 0..8 {
        let fields = json!({
            // What begins a tag is favoured, so that there are some; the rest is what the model says.
            "logit_bias": {"60": 8, "511": 3}, "seed": seed, "max_tokens": 300,
            "response_format": {"type": "structural_tag", "structures": structures, "triggers": ["<"]}
        });
        let (status, answer) = complete(&server, fields).await;
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        let mut rest = choice["text"].as_str().unwrap();
        let mut n_tags = 0;
        while let Some((_, tag)) = rest.split_once('<') {
            let whole = ["f>1</>", "f>22</>", "gg>\"x\"</>"].iter().find_map(|whole| tag.strip_prefix(whole));
            match whole {
                Some(after) => rest = after,
                None if choice["finish_reason"] == "length" => break,
                None => panic!("seed {seed}: {rest}"),
            }
            n_tags += 1;
        }
        assert!(n_tags > 0, "seed {seed}: {choice}");
    }
}

#[tokio::test]
async fn outputs_that_go_round_in_circles_end_if_asked_to() {
    let server = Server::tiny(&[]);
    let detection = json!({"max_pattern_size": 3, "min_count": 4});
    let fields =
        json!({"logit_bias": {"97": 100}, "temperature": 0, "repetition_detection": detection, "max_tokens": 50});
    let (status, answer) = complete(&server, fields).await;
    let choice = &answer["choices"][0];
    assert_eq!((status, choice["text"].as_str()), (200, Some("aaaa")), "{answer}");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("repetition"), &json!("repetition_detected"))
    );
}
