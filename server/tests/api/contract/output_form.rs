//! Fields that prescribe the output's form.

use serde_json::{Value, json};

use super::{Case, nested};

/// A structural tag with these triggers.
fn tag(triggers: Value) -> Value {
    json!({"type": "structural_tag", "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": triggers})
}

/// The table.
pub fn cases() -> Vec<Case> {
    vec![
        (json!({"response_format": {"type": "text"}}), 200, "", ""),
        (json!({"response_format": {"type": "json_object"}}), 200, "", ""),
        (json!({"response_format": {"type": "xml"}}), 400, "no type `xml`", "response_format"),
        (json!({"response_format": {}}), 400, "missing field `type`", "body.response_format.type"),
        (json!({"response_format": {"type": "structural_tag"}}), 400, "`structures` and `triggers`", "response_format"),
        (json!({"response_format": tag(json!(["<f"]))}), 200, "", ""),
        (json!({"response_format": tag(json!([]))}), 400, "at least one", "response_format"),
        (json!({"response_format": tag(json!([""]))}), 400, "must not be empty", "response_format"),
        (json!({"response_format": tag(json!(["g"]))}), 400, "No trigger is the beginning", "response_format"),
        (json!({"response_format": tag(json!("<f"))}), 400, "validation error", "body.response_format.triggers"),
        (json!({"structured_outputs": {"structural_tag": tag(json!(["<f"]))}}), 200, "", ""),
        (json!({"structured_outputs": {"structural_tag": tag(json!(["<f"])).to_string()}}), 200, "", ""),
        (
            json!({"structured_outputs": {"structural_tag": {"structures": []}}}),
            400,
            "missing field `triggers`",
            "structured_outputs",
        ),
        (json!({"response_format": {"type": "json_schema"}}), 400, "needs `json_schema`", "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
            400,
            "`name` and `schema`",
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
            400,
            "missing field `name`",
            "body.response_format.json_schema.name",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": [1]}}}),
            400,
            "A JSON schema is an object",
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": true}}}),
            200,
            "",
            "",
        ),
        (json!({"structured_outputs": {"regex": "a"}}), 200, "", ""),
        (json!({"structured_outputs": {"json": "{\"type\": \"null\"}"}}), 200, "", ""),
        (json!({"structured_outputs": {"json": "{"}}), 400, "is not JSON", "structured_outputs"),
        (json!({"structured_outputs": {"json": nested(65)}}), 400, "deeper than 64", "structured_outputs"),
        (json!({"structured_outputs": {"choice": []}}), 400, "must not be empty", "structured_outputs"),
        (json!({"structured_outputs": {"choice": "a"}}), 400, "validation error", "body.structured_outputs.choice"),
        (json!({"structured_outputs": {}}), 400, "got 0", "structured_outputs"),
        (json!({"structured_outputs": {"json_object": false}}), 400, "got 0", "structured_outputs"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), 400, "got 2", "structured_outputs"),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
            400,
            "Exactly one",
            "structured_outputs",
        ),
        (json!({"structured_outputs": {"json_object": true, "disable_any_whitespace": true}}), 200, "", ""),
        (json!({"structured_outputs": {"structural_tag": "x"}}), 400, "structural_tag: expected", "structured_outputs"),
        (json!({"response_format": "json"}), 400, "validation error", "body.response_format"),
        (json!({"response_format": {"type": 5}}), 400, "validation error", "body.response_format.type"),
        (json!({"response_format": null}), 200, "", ""),
        (json!({"structured_outputs": null}), 200, "", ""),
        (json!({"structured_outputs": {"json": nested(64)}}), 200, "", ""),
        (json!({"structured_outputs": {"json": 5}}), 400, "A JSON schema is an object", "structured_outputs"),
        (json!({"structured_outputs": {"choice": ["a", "b"]}}), 200, "", ""),
        (json!({"structured_outputs": {"regex": 5}}), 400, "validation error", "body.structured_outputs.regex"),
        (json!({"structured_outputs": {"grammar": {}}}), 400, "validation error", "body.structured_outputs.grammar"),
        (json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}), 200, "", ""),
        (json!({"guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "x"}), 200, "", ""),
    ]
}
