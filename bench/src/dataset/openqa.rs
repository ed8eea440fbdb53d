//! Owns the openqa dataset: HC3-Chinese `open_qa.jsonl`, short Chinese questions.

use serde::Deserialize;

use super::{Dataset, Prompt};
use crate::synthetic;

/// `--dataset openqa`.
pub struct OpenQa;

#[derive(Deserialize)]
struct Row {
    question: String,
}

impl Dataset for OpenQa {
    fn name(&self) -> &'static str {
        "openqa"
    }

    fn format(&self) -> &'static str {
        "one JSON object a line with a string \"question\""
    }

    fn synthetic(&self) -> Option<&'static synthetic::Kind> {
        Some(&synthetic::OPENQA)
    }

    fn parse(&self, text: &str) -> Result<Vec<Prompt>, (usize, String)> {
        let mut prompts = Vec::new();
        for (line_idx, line) in text.lines().enumerate() {
            if !line.trim().is_empty() {
                let row: Row = serde_json::from_str(line).map_err(|error| (line_idx + 1, error.to_string()))?;
                prompts.push(Prompt::Text(row.question.trim().to_owned()));
            }
        }
        Ok(prompts)
    }
}
