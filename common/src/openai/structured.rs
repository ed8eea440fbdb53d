//! How a request prescribes the output's form.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

/// OpenAI's way.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct ResponseFormat {
    /// `text`, `json_object`, `json_schema` or `structural_tag`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `json_schema`.
    pub json_schema: Option<JsonSchemaFormat>,
    /// With `structural_tag`.
    pub structures: Option<Vec<Structure>>,
    /// With `structural_tag`.
    pub triggers: Option<Vec<String>>,
}

/// Free text with parts of a prescribed form.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct StructuralTagFields {
    /// The parts.
    pub structures: Vec<Structure>,
    /// Texts after which one of the parts that begin with them must come.
    pub triggers: Vec<String>,
}

/// A part of a prescribed form.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct Structure {
    /// Its beginning, which begins with a trigger.
    pub begin: String,
    /// JSON schema of what is between.
    pub schema: Value,
    /// Its end.
    pub end: String,
}

/// A named schema.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct JsonSchemaFormat {
    /// For people.
    pub name: String,
    /// The schema.
    pub schema: Option<Value>,
}

/// vLLM's way: one form and its options.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct StructuredOutputsFields {
    /// A JSON schema, or its text.
    pub json: Option<Value>,
    pub regex: Option<String>,
    pub choice: Option<Vec<String>>,
    /// In Lark's or GBNF's notation.
    pub grammar: Option<String>,
    pub json_object: Option<bool>,
    /// A [`StructuralTagFields`], or its JSON as text.
    pub structural_tag: Option<Value>,
    pub disable_any_whitespace: Option<bool>,
    pub disable_additional_properties: Option<bool>,
    pub whitespace_pattern: Option<String>,
}
