//! From a request's `response_format` or `structured_outputs` to the engine's [`StructuredOutputs`].

use ember_common::openai::{SamplingFields, StructuredOutputsFields};
use ember_engine::{OutputForm, StructuredOutputs};
use serde_json::Value;

use crate::ApiError;

/// Deepest nesting of a schema.
const MAX_DEPTH: usize = 64;

/// The field that prescribes the output's form, for error messages.
pub fn param(fields: &SamplingFields) -> &'static str {
    if fields.structured_outputs.is_some() { "structured_outputs" } else { "response_format" }
}

/// What the output must look like; `None` if the request leaves it open.
///
/// # Errors
/// Status 400 if it is not exactly one form, or one that is not supported.
pub fn resolve(fields: &SamplingFields) -> Result<Option<StructuredOutputs>, ApiError> {
    let mut forms = Vec::new();
    if let Some(format) = &fields.response_format {
        match format.kind.as_str() {
            "text" => {}
            "json_object" => forms.push(OutputForm::JsonObject),
            "json_schema" => {
                let schema = format.json_schema.as_ref().and_then(|format| format.schema.clone());
                let schema = schema.ok_or_else(|| {
                    ApiError::invalid(
                        "response_format",
                        "response_format of type `json_schema` needs `json_schema` with `name` and `schema`.",
                    )
                })?;
                forms.push(json_schema("response_format", schema)?);
            }
            "structural_tag" => return Err(ApiError::unsupported("structural_tag")),
            other => {
                return Err(ApiError::invalid(
                    "response_format",
                    format!("response_format has no type `{other}`: text, json_object, json_schema."),
                ));
            }
        }
    }
    let options = fields.structured_outputs.clone().unwrap_or_default();
    if fields.structured_outputs.is_some() {
        forms.extend(own_forms(&options)?);
    }
    let n_forms = forms.len();
    match forms.pop() {
        None if fields.structured_outputs.is_none() => Ok(None),
        Some(form) if n_forms == 1 => Ok(Some(StructuredOutputs {
            disable_any_whitespace: options.disable_any_whitespace == Some(true),
            disable_additional_properties: options.disable_additional_properties == Some(true),
            whitespace_pattern: options.whitespace_pattern,
            ..form.into()
        })),
        _ => Err(ApiError::invalid(
            param(fields),
            format!(
                "Exactly one of `json`, `regex`, `choice`, `grammar`, `json_object` and `response_format` must prescribe the output, got {n_forms}."
            ),
        )),
    }
}

fn own_forms(fields: &StructuredOutputsFields) -> Result<Vec<OutputForm>, ApiError> {
    if fields.structural_tag.is_some() {
        return Err(ApiError::unsupported("structural_tag"));
    }
    let json = match &fields.json {
        // As text or as it is.
        Some(Value::String(text)) => Some(serde_json::from_str(text).map_err(|error| {
            ApiError::invalid("structured_outputs", format!("structured_outputs.json is not JSON: {error}."))
        })?),
        json => json.clone(),
    };
    let json = json.map(|schema| json_schema("structured_outputs", schema)).transpose()?;
    if fields.choice.as_ref().is_some_and(Vec::is_empty) {
        return Err(ApiError::invalid("structured_outputs", "structured_outputs.choice must not be empty."));
    }
    let forms = [
        json,
        fields.regex.clone().map(OutputForm::Regex),
        fields.choice.clone().map(OutputForm::Choice),
        fields.grammar.clone().map(OutputForm::Grammar),
        (fields.json_object == Some(true)).then_some(OutputForm::JsonObject),
    ];
    Ok(forms.into_iter().flatten().collect())
}

fn json_schema(param: &'static str, schema: Value) -> Result<OutputForm, ApiError> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(ApiError::invalid(param, "A JSON schema is an object."));
    }
    if depth(&schema) > MAX_DEPTH {
        return Err(ApiError::invalid(param, format!("The JSON schema is nested deeper than {MAX_DEPTH} levels.")));
    }
    Ok(OutputForm::JsonSchema(schema))
}

fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Object(fields) => fields.values().map(depth).max(),
        Value::Array(items) => items.iter().map(depth).max(),
        _ => return 0,
    };
    1 + inner.unwrap_or(0)
}
