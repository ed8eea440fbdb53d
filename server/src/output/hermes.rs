//! Hermes' and Qwen's format: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the text.

use super::{
    Parser, Piece, ToolFormat,
    call_scanner::CallScanner,
    tag::{self, Found},
};

pub const FORMAT: ToolFormat = ToolFormat { name: "hermes", parser: || Box::<Hermes>::default() };

const START: &str = "<tool_call>";
const END: &str = "</tool_call>";

#[derive(Default)]
struct Hermes {
    state: State,
    pending: String,
    /// The text of the call being read, for the case that it is none.
    raw: String,
    has_called: bool,
}

#[derive(Default)]
enum State {
    #[default]
    Text,
    Call(CallScanner),
    /// After a call's object.
    Closing,
}

impl Hermes {
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Text => match tag::find(&self.pending, START) {
                Found::At(at) => {
                    self.content(at, out);
                    self.pending.drain(..START.len());
                    self.raw = START.to_owned();
                    self.state = State::Call(CallScanner::default());
                    true
                }
                Found::NotIn(n) => {
                    self.content(n, out);
                    false
                }
            },
            State::Call(scanner) => {
                let read = scanner.push(&self.pending, out);
                let has_begun = scanner.has_begun();
                match read {
                    Ok(n) => {
                        let is_done = scanner.is_done();
                        self.raw.extend(self.pending.drain(..n));
                        self.has_called |= has_begun;
                        if is_done {
                            self.state = State::Closing;
                        }
                        is_done
                    }
                    Err(_) => {
                        self.state = State::Text;
                        if !has_begun {
                            out.push(Piece::Content(std::mem::take(&mut self.raw)));
                        }
                        true
                    }
                }
            }
            State::Closing => {
                self.pending = self.pending.trim_start().to_owned();
                match self.pending.strip_prefix(END) {
                    Some(rest) => self.pending = rest.to_owned(),
                    None if END.starts_with(&self.pending) => return false,
                    None => {}
                }
                self.state = State::Text;
                true
            }
        }
    }

    /// Gives out the first `n` bytes. Whitespace around calls is no content.
    fn content(&mut self, n: usize, out: &mut Vec<Piece>) {
        if self.has_called && self.pending[..n].trim().is_empty() {
            self.pending.drain(..n);
            return;
        }
        let text: String = self.pending.drain(..n).collect();
        if !text.is_empty() {
            out.push(Piece::Content(text));
        }
    }
}

impl Parser for Hermes {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.pending.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        match &self.state {
            State::Text => self.content(self.pending.len(), out),
            // Cut off before it was clear what it is.
            State::Call(scanner) if !scanner.has_begun() => {
                out.push(Piece::Content(std::mem::take(&mut self.raw) + &std::mem::take(&mut self.pending)));
            }
            State::Call(_) | State::Closing => {}
        }
    }
}
