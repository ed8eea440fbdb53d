//! Llama 3's format: an answer that is `{"name": ..., "parameters": {...}}`, several separated by `;`, after
//! `<|python_tag|>` or not.

use super::{Parser, Piece, ToolFormat, call_scanner::CallScanner};

pub const FORMAT: ToolFormat = ToolFormat { name: "llama3_json", parser: || Box::<Llama3Json>::default() };

const TAG: &str = "<|python_tag|>";

#[derive(Default)]
struct Llama3Json {
    state: State,
    pending: String,
    /// The text of the call being read, for the case that it is none.
    raw: String,
}

#[derive(Default)]
enum State {
    /// Before the first call.
    #[default]
    Start,
    Call(CallScanner),
    /// After a call: another one or text.
    Between,
    Text,
}

impl Llama3Json {
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Start => {
                let text = self.pending.trim_start();
                let text = text.strip_prefix(TAG).unwrap_or(text).trim_start();
                if text.is_empty() || TAG.starts_with(text) {
                    return false;
                }
                self.state = if text.starts_with('{') {
                    let n_before = self.pending.len() - text.len();
                    self.raw = self.pending.drain(..n_before).collect();
                    State::Call(CallScanner::default())
                } else {
                    State::Text
                };
                true
            }
            State::Call(scanner) => match scanner.push(&self.pending, out) {
                Ok(n) => {
                    let is_done = scanner.is_done();
                    self.raw.extend(self.pending.drain(..n));
                    if is_done {
                        self.raw.clear();
                        self.state = State::Between;
                    }
                    is_done
                }
                Err(_) => {
                    if !scanner.has_begun() {
                        out.push(Piece::Content(std::mem::take(&mut self.raw)));
                    }
                    self.state = State::Text;
                    true
                }
            },
            State::Between => {
                self.pending = self.pending.trim_start().to_owned();
                if self.pending.is_empty() {
                    return false;
                }
                match self.pending.strip_prefix(';').map(str::trim_start) {
                    Some("") => return false,
                    Some(rest) if rest.starts_with('{') => {
                        self.pending = rest.to_owned();
                        self.state = State::Call(CallScanner::default());
                    }
                    _ => self.state = State::Text,
                }
                true
            }
            State::Text => {
                out.push(Piece::Content(std::mem::take(&mut self.pending)));
                false
            }
        }
    }
}

impl Parser for Llama3Json {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.pending.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        match &self.state {
            State::Start | State::Text => out.push(Piece::Content(std::mem::take(&mut self.pending))),
            // Cut off before it was clear what it is.
            State::Call(scanner) if !scanner.has_begun() => {
                out.push(Piece::Content(std::mem::take(&mut self.raw) + &std::mem::take(&mut self.pending)));
            }
            State::Call(_) | State::Between => {}
        }
    }
}
