//! `GET /openapi.json`: the endpoints that the model serves as an OpenAPI document, made from the table of routes and
//! the wire types.

use std::sync::Arc;

use ember_common::{anthropic::MessageErrorResponse, openai::ErrorResponse};
use hyper::Response;
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{AnswerBody, ROUTES, Route, SchemaOf};
use crate::{
    ApiError,
    app::{App, Body},
    json,
};

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    json::response(&document(|route| route.check_needs(&app).is_ok(), &app.config.root_path))
}

fn document(is_served: impl Fn(&Route) -> bool, root_path: &str) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for route in ROUTES.iter().filter(|route| is_served(route)) {
        let operation = operation(route, &mut generator);
        let methods = route.methods.iter().map(|method| (method.as_str().to_ascii_lowercase(), operation.clone()));
        paths.insert(route.path.into(), Value::Object(methods.collect()));
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ember",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's HTTP API with vLLM's extensions. Fields that are not described are ignored."
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}
        }
    });
    if !root_path.is_empty() {
        document["servers"] = json!([{"url": root_path}]);
    }
    document
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut body = |schema: SchemaOf| json!({"schema": schema(generator)});
    let content = match route.answer {
        AnswerBody::Empty => json!({}),
        AnswerBody::Text => json!({"text/plain": {"schema": {"type": "string"}}}),
        AnswerBody::Html => json!({"text/html": {"schema": {"type": "string"}}}),
        AnswerBody::Json(schema) => json!({"application/json": body(schema)}),
        AnswerBody::JsonOrStream(whole, chunk) => {
            json!({"application/json": body(whole), "text/event-stream": body(chunk)})
        }
    };
    let error = body(match route.path.starts_with("/v1/messages") {
        true => |generator| generator.subschema_for::<MessageErrorResponse>(),
        false => |generator| generator.subschema_for::<ErrorResponse>(),
    });
    let error = json!({"description": "What is wrong.", "content": {"application/json": error}});
    let mut operation = json!({
        "summary": route.summary,
        "responses": {"200": {"description": "The answer.", "content": content}, "default": error}
    });
    let parts: Vec<Value> = route.request.iter().map(|schema| schema(generator).into()).collect();
    if !parts.is_empty() {
        let schema = if parts.len() == 1 { parts[0].clone() } else { json!({"allOf": parts}) };
        operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
    }
    if route.path.starts_with("/v1") {
        // Only on servers with keys.
        operation["security"] = json!([{}, {"key": []}]);
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All `$ref`s in `value`.
    fn references(value: &Value, out: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                out.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| references(value, out));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, out)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_described_and_every_reference_leads_somewhere() {
        let document = document(|_| true, "/llm");
        assert_eq!(document["paths"].as_object().unwrap().len(), ROUTES.len());
        assert_eq!(document["servers"][0]["url"], "/llm");
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20, "{found:?}");
        for reference in found {
            let target = document.pointer(reference.strip_prefix('#').unwrap());
            assert!(target.is_some_and(Value::is_object), "{reference}");
        }
    }

    #[test]
    fn requests_and_answers_are_those_of_the_wire_types() {
        let document = document(|_| true, "");
        let schemas = &document["components"]["schemas"];
        assert_eq!(schemas["ChatFields"]["required"], json!(["messages"]));
        assert_eq!(schemas["SamplingFields"]["properties"]["temperature"]["type"], json!(["number", "null"]));
        assert!(schemas["ChatCompletion"]["properties"]["choices"]["items"]["$ref"].is_string());
        let chat = &document["paths"]["/v1/chat/completions"]["post"];
        assert_eq!(chat["requestBody"]["content"]["application/json"]["schema"]["allOf"].as_array().unwrap().len(), 2);
        assert!(chat["responses"]["200"]["content"]["text/event-stream"].is_object());
    }
}
