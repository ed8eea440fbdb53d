//! Owns the custom dataset: one prompt a line, always as plain text.

use super::{Dataset, Prompt};

/// `--dataset custom`.
pub struct Custom;

impl Dataset for Custom {
    fn name(&self) -> &'static str {
        "custom"
    }

    fn format(&self) -> &'static str {
        "one prompt a line, plain text"
    }

    fn parse(&self, text: &str) -> Result<Vec<Prompt>, (usize, String)> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        Ok(lines.map(|line| Prompt::Text(line.to_owned())).collect())
    }
}
