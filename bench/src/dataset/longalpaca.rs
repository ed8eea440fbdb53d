//! Owns the longalpaca dataset: `LongAlpaca-12k.json`, long English documents with a question.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Dataset, Prompt};
use crate::synthetic;

/// `--dataset longalpaca`.
pub struct LongAlpaca;

#[derive(Deserialize)]
struct Row {
    instruction: String,
}

impl Dataset for LongAlpaca {
    fn name(&self) -> &'static str {
        "longalpaca"
    }

    fn format(&self) -> &'static str {
        "one JSON array of objects with a string \"instruction\""
    }

    fn synthetic(&self) -> Option<&'static synthetic::Kind> {
        Some(&synthetic::LONGALPACA)
    }

    fn parse(&self, text: &str) -> Result<Vec<Prompt>, (usize, String)> {
        let rows: Vec<&RawValue> = serde_json::from_str(text).map_err(|error| {
            let what = if text.trim_start().starts_with('[') { "" } else { "not a JSON array: " };
            (error.line().max(1), format!("{what}{error}"))
        })?;
        let mut prompts = Vec::with_capacity(rows.len());
        for (row_idx, raw) in rows.iter().enumerate() {
            let row: Row = serde_json::from_str(raw.get()).map_err(|error| {
                let offset = raw.get().as_ptr() as usize - text.as_ptr() as usize;
                let line = text[..offset].lines().count().max(1) + error.line().saturating_sub(1);
                (line, format!("row {}: {error}", row_idx + 1))
            })?;
            prompts.push(Prompt::Text(row.instruction.trim().to_owned()));
        }
        Ok(prompts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_instruction_is_used() {
        let text = r#"[{"instruction":" a ","output":"x"},{"output":"y","instruction":"b","input":""}]"#;
        let expected = ["a", "b"].map(|text| Prompt::Text(text.into()));
        assert_eq!(LongAlpaca.parse(text).unwrap(), expected);
    }
}
