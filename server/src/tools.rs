//! [`ToolPlan`]: which tools a request offers and how the answer is made to call them.

use ember_common::{
    FinishReason,
    openai::{ChatFields, Tool, ToolChoice},
};
use ember_engine::{OutputForm, StructuredOutputs};
use serde_json::{Map, Value, json};

use crate::{
    ApiError,
    config::AppConfig,
    output::{self, Parser, ToolFormat},
};

/// Keys under which a schema keeps the parts that it refers to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// Whether and how the answer calls tools.
#[derive(Debug, Clone)]
pub struct ToolPlan {
    choice: Choice,
    /// Whether more than the first call counts.
    pub is_parallel: bool,
}

#[derive(Debug, Clone)]
enum Choice {
    /// The answer is text.
    None,
    /// The model may call.
    Auto(&'static ToolFormat),
    /// The answer is a list of calls.
    Required(Vec<Tool>),
    /// The answer is the arguments of one call.
    Named(Tool),
}

impl ToolPlan {
    /// Checks `tools` and `tool_choice`.
    ///
    /// # Errors
    /// Status 400 naming the field, and the option that the server lacks.
    pub fn resolve(own: &ChatFields, config: &AppConfig) -> Result<Self, ApiError> {
        let is_parallel = own.parallel_tool_calls.unwrap_or(true);
        let plan = |choice| Ok(Self { choice, is_parallel });
        let Some(tools) = &own.tools else {
            return match &own.tool_choice {
                Some(ToolChoice::Mode(mode)) if matches!(mode.as_str(), "none" | "auto") => plan(Choice::None),
                None => plan(Choice::None),
                Some(_) => Err(ApiError::invalid("tool_choice", "When using `tool_choice`, `tools` must be set.")),
            };
        };
        if tools.is_empty() {
            return Err(ApiError::invalid("tools", "`tools` must not be an empty array. Leave it out instead."));
        }
        let tools = tools.iter().enumerate().map(|(idx, tool)| parse(idx, tool)).collect::<Result<Vec<_>, _>>()?;
        let needs_parser = |what: &str| {
            ApiError::invalid("tool_choice", format!("{what} requires --tool-call-parser to be set on the server."))
        };
        let mode = match &own.tool_choice {
            None => "auto",
            Some(ToolChoice::Mode(mode)) => mode.as_str(),
            Some(ToolChoice::Named { function, .. }) => {
                config.tool_call_parser.ok_or_else(|| needs_parser("A named `tool_choice`"))?;
                let tool = tools.into_iter().find(|tool| tool.function.name == function.name);
                let tool = tool.ok_or_else(|| {
                    let message = format!("The tool `{}` of `tool_choice` is not among `tools`.", function.name);
                    ApiError::invalid("tool_choice", message)
                })?;
                return plan(Choice::Named(tool));
            }
        };
        match mode {
            "none" => plan(Choice::None),
            "auto" => match config.tool_call_parser {
                Some(format) if config.enable_auto_tool_choice => plan(Choice::Auto(format)),
                _ => Err(ApiError::invalid(
                    "tool_choice",
                    "\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set on the server.",
                )),
            },
            "required" => {
                config.tool_call_parser.ok_or_else(|| needs_parser("\"required\" tool choice"))?;
                plan(Choice::Required(tools))
            }
            other => Err(ApiError::invalid(
                "tool_choice",
                format!("Invalid value for `tool_choice`: `{other}`; it is none, auto, required or a named function."),
            )),
        }
    }

    /// The grammar that makes the answer a call.
    ///
    /// # Errors
    /// Status 400 if two tools define different things under one name.
    pub fn grammar(&self) -> Result<Option<StructuredOutputs>, ApiError> {
        Ok(match &self.choice {
            Choice::None | Choice::Auto(_) => None,
            Choice::Named(tool) => Some(OutputForm::JsonSchema(parameters(tool)).into()),
            Choice::Required(tools) => Some(OutputForm::JsonSchema(list_schema(tools, self.is_parallel)?).into()),
        })
    }

    /// Finds the calls in one answer.
    pub fn parser(&self) -> Option<Box<dyn Parser>> {
        match &self.choice {
            Choice::None => None,
            Choice::Auto(format) => Some((format.parser)()),
            Choice::Required(_) => Some(Box::<output::Required>::default()),
            Choice::Named(tool) => Some(Box::new(output::Named::new(tool.function.name.clone()))),
        }
    }

    /// Why an answer with `n_calls` calls ended; one that had to call a named function just stopped.
    pub fn finish_reason(&self, reason: FinishReason, n_calls: usize) -> FinishReason {
        match (&self.choice, reason) {
            (Choice::Auto(_) | Choice::Required(_), FinishReason::Stop) if n_calls > 0 => FinishReason::ToolCalls,
            _ => reason,
        }
    }
}

fn parse(idx: usize, tool: &Value) -> Result<Tool, ApiError> {
    let parsed: Tool = serde_path_to_error::deserialize(tool).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." { format!("tools.{idx}") } else { format!("tools.{idx}.{path}") };
        ApiError::schema(&at, error.inner())
    })?;
    if parsed.kind != "function" {
        return Err(ApiError::schema(&format!("tools.{idx}.type"), "expected `function`"));
    }
    if parsed.function.name.is_empty() {
        return Err(ApiError::schema(&format!("tools.{idx}.function.name"), "must not be empty"));
    }
    Ok(parsed)
}

/// The schema of a call's arguments.
fn parameters(tool: &Tool) -> Value {
    match &tool.function.parameters {
        Some(Value::Object(schema)) if !schema.is_empty() => Value::Object(schema.clone()),
        _ => json!({"type": "object", "properties": {}}),
    }
}

/// The schema of a list of calls.
fn list_schema(tools: &[Tool], is_parallel: bool) -> Result<Value, ApiError> {
    let mut definitions: [Map<String, Value>; DEFINITIONS.len()] = Default::default();
    let mut calls = Vec::with_capacity(tools.len());
    for tool in tools {
        let mut parameters = parameters(tool);
        // References start at the root, so what they name must be there.
        for (key, all) in DEFINITIONS.iter().zip(&mut definitions) {
            let own = parameters.as_object_mut().and_then(|schema| schema.remove(*key));
            for (name, schema) in own.as_ref().and_then(Value::as_object).into_iter().flatten() {
                if all.insert(name.clone(), schema.clone()).is_some_and(|other| other != *schema) {
                    let message = format!("Two tools have different definitions of `{name}` in `{key}`.");
                    return Err(ApiError::invalid("tools", message));
                }
            }
        }
        calls.push(json!({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": false
        }));
    }
    let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
    if !is_parallel {
        schema["maxItems"] = json!(1);
    }
    for (key, all) in DEFINITIONS.into_iter().zip(definitions) {
        if !all.is_empty() {
            schema[key] = Value::Object(all);
        }
    }
    Ok(schema)
}
