//! Owns the line_by_line dataset: each line plain text, a JSON array of messages, or a whole JSON request body.

use serde_json::Value;

use super::{Dataset, Prompt};

/// `--dataset line_by_line`.
pub struct LineByLine;

impl Dataset for LineByLine {
    fn name(&self) -> &'static str {
        "line_by_line"
    }

    fn format(&self) -> &'static str {
        "one prompt a line: text, a JSON array of messages, or a JSON request body"
    }

    fn parse(&self, text: &str) -> Result<Vec<Prompt>, (usize, String)> {
        let mut prompts = Vec::new();
        for (line_idx, line) in text.lines().map(str::trim).enumerate() {
            let wrong = |message: String| (line_idx + 1, message);
            match line.as_bytes().first() {
                None => {}
                Some(b'{') => match serde_json::from_str(line) {
                    Ok(body) => prompts.push(Prompt::Body(body)),
                    Err(error) => {
                        return Err(wrong(format!("starts like a JSON request body: {error}")));
                    }
                },
                Some(b'[') => match serde_json::from_str::<Value>(line) {
                    Ok(messages) if is_messages(&messages) => prompts.push(Prompt::Messages(messages)),
                    Ok(_) => {
                        return Err(wrong("a JSON array, but not of messages with a \"role\"".into()));
                    }
                    // Text may well start with a bracket.
                    Err(_) => prompts.push(Prompt::Text(line.to_owned())),
                },
                Some(_) => prompts.push(Prompt::Text(line.to_owned())),
            }
        }
        Ok(prompts)
    }
}

fn is_messages(value: &Value) -> bool {
    let mut messages = value.as_array().into_iter().flatten().peekable();
    messages.peek().is_some() && messages.all(|message| message.get("role").is_some_and(Value::is_string))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_are_text_messages_or_bodies() {
        let text =
            "hello\n\n[1] a footnote\n[{\"role\":\"user\",\"content\":\"x\"}]\n{\"model\":\"m\",\"prompt\":\"y\"}\n";
        let expected = [
            Prompt::Text("hello".into()),
            Prompt::Text("[1] a footnote".into()),
            Prompt::Messages(json!([{"role": "user", "content": "x"}])),
            Prompt::Body(json!({"model": "m", "prompt": "y"}).as_object().unwrap().clone()),
        ];
        assert_eq!(LineByLine.parse(text).unwrap(), expected);
    }
}
