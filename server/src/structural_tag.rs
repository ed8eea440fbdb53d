//! Structural tags: free text in which what follows a trigger has to be of a form, as a grammar in Lark's notation.

use std::fmt::Write;

use ember_common::openai::StructuralTagFields;
use serde_json::Value;

/// The grammar. Text is free up to a trigger; from there on one of the structures that begin with it comes whole.
///
/// # Errors
/// What is wrong with the fields.
pub fn to_lark(tag: &StructuralTagFields) -> Result<String, String> {
    let (structures, triggers) = (&tag.structures, &tag.triggers);
    if structures.is_empty() || triggers.is_empty() {
        return Err("A structural tag needs at least one of `structures` and of `triggers`.".into());
    }
    if triggers.iter().any(String::is_empty) {
        return Err("A trigger must not be empty.".into());
    }
    let mut bodies = vec![Vec::new(); triggers.len()];
    for structure in structures {
        let begin = &structure.begin;
        let trigger = triggers.iter().enumerate().find_map(|(i, trigger)| Some((i, begin.strip_prefix(&**trigger)?)));
        let (i, rest) = trigger.ok_or_else(|| format!("No trigger is the beginning of the structure {begin:?}."))?;
        if !structure.schema.is_object() {
            return Err(format!("The schema of the structure {begin:?} must be an object."));
        }
        bodies[i].push(format!("{} %json {} {}", literal(rest), structure.schema, literal(&structure.end)));
    }
    let mut grammar = String::from("TEXT: /(.|\\n)*/\nrest: TEXT\n");
    let mut parts = Vec::new();
    for (i, (trigger, bodies)) in triggers.iter().zip(bodies).enumerate().filter(|(_, (_, bodies))| !bodies.is_empty())
    {
        // Lazy: the text before ends at the first trigger.
        let _ = writeln!(grammar, "trigger_{i}[lazy]: TEXT {}", literal(trigger));
        for (j, body) in bodies.iter().enumerate() {
            let _ = writeln!(grammar, "tag_{i}_{j}: {body}");
            parts.push(format!("trigger_{i} tag_{i}_{j}"));
        }
    }
    let _ = writeln!(grammar, "start: ({})* rest", parts.join(" | "));
    Ok(grammar)
}

/// A text in the grammar; nothing for an empty one.
fn literal(text: &str) -> String {
    if text.is_empty() { String::new() } else { Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn mistakes_are_named() {
        let check = |tag: Value, expected: &str| {
            let tag: StructuralTagFields = serde_json::from_value(tag).unwrap();
            match to_lark(&tag) {
                Ok(grammar) => assert!(grammar.contains(expected), "{grammar}"),
                Err(message) => assert!(message.contains(expected), "{message}"),
            }
        };
        let structure = json!({"begin": "<f=a>", "schema": {}, "end": "</f>"});
        check(json!({"structures": [], "triggers": ["<f"]}), "at least one");
        check(json!({"structures": [structure], "triggers": []}), "at least one");
        check(json!({"structures": [structure], "triggers": [""]}), "must not be empty");
        check(json!({"structures": [structure], "triggers": ["<g"]}), "No trigger");
        check(json!({"structures": [{"begin": "<f", "schema": 1, "end": ""}], "triggers": ["<f"]}), "an object");
        check(json!({"structures": [structure], "triggers": ["<f"]}), r#"tag_0_0: "=a>" %json {} "</f>""#);
    }
}
