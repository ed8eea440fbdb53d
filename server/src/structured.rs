//! From a request's `response_format` or `structured_outputs` to the engine's [`StructuredOutputs`].

use ember_common::openai::{SamplingFields, StructuralTagFields, StructuredOutputsFields};
use ember_engine::{OutputForm, StructuredOutputs};
use serde_json::Value;

use crate::{ApiError, structural_tag};

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
            "structural_tag" => {
                let (Some(structures), Some(triggers)) = (format.structures.clone(), format.triggers.clone()) else {
                    return Err(ApiError::invalid(
                        "response_format",
                        "response_format of type `structural_tag` needs `structures` and `triggers`.",
                    ));
                };
                forms.push(structural_tag("response_format", &StructuralTagFields { structures, triggers })?);
            }
            other => {
                return Err(ApiError::invalid(
                    "response_format",
                    format!("response_format has no type `{other}`: text, json_object, json_schema, structural_tag."),
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
                "Exactly one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag` and `response_format` must prescribe the output, got {n_forms}."
            ),
        )),
    }
}

fn own_forms(fields: &StructuredOutputsFields) -> Result<Vec<OutputForm>, ApiError> {
    let tag = fields.structural_tag.as_ref().map(|tag| {
        let tag: Result<StructuralTagFields, _> = match tag {
            Value::String(text) => serde_json::from_str(text),
            tag => serde_json::from_value(tag.clone()),
        };
        let tag = tag.map_err(|error| {
            let message = format!("structured_outputs.structural_tag: {error}.");
            ApiError::invalid("structured_outputs", message)
        })?;
        structural_tag("structured_outputs", &tag)
    });
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
        tag.transpose()?,
    ];
    Ok(forms.into_iter().flatten().collect())
}

fn structural_tag(param: &'static str, tag: &StructuralTagFields) -> Result<OutputForm, ApiError> {
    tag.structures.iter().try_for_each(|structure| json_schema(param, structure.schema.clone()).map(drop))?;
    structural_tag::to_lark(tag).map(OutputForm::Grammar).map_err(|message| ApiError::invalid(param, message))
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
