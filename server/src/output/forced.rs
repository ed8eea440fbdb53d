//! Answers that a grammar forces to be calls: of one named function, or of any.

use super::{Parser, Piece, call_scanner::CallScanner};

/// The answer is the arguments of one function.
pub struct Named {
    name: Option<String>,
}

impl Named {
    /// A call of `name`.
    pub fn new(name: String) -> Self {
        Self { name: Some(name) }
    }
}

impl Parser for Named {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        out.extend(self.name.take().map(Piece::Call));
        out.push(Piece::Arguments(text.to_owned()));
    }

    fn finish(&mut self, _: &mut Vec<Piece>) {}
}

/// The answer is a JSON array of calls.
#[derive(Default)]
pub struct Required {
    call: Option<CallScanner>,
}

impl Parser for Required {
    fn push(&mut self, mut text: &str, out: &mut Vec<Piece>) {
        while !text.is_empty() {
            let Some(call) = &mut self.call else {
                // Brackets, commas and whitespace.
                let Some(at) = text.find('{') else { return };
                text = &text[at..];
                self.call = Some(CallScanner::default());
                continue;
            };
            // The grammar knows no other objects.
            let n = call.push(text, out).unwrap_or(text.len());
            text = &text[n..];
            if call.is_done() {
                self.call = None;
            }
        }
    }

    fn finish(&mut self, _: &mut Vec<Piece>) {}
}
