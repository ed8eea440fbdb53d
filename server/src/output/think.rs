//! [`Think`]: reasoning between two tags.

use super::{
    Parser, Piece, ReasoningFormat,
    tag::{self, Found},
};

/// Takes reasoning from before the content.
pub struct Think {
    format: &'static ReasoningFormat,
    state: State,
    pending: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but whitespace has come; a start tag may.
    Before {
        /// Without one it is reasoning all the same.
        is_inside: bool,
    },
    /// After a start tag; line ends between it and the reasoning belong to neither.
    Begun,
    Inside,
    /// Line ends between the end tag and the content belongs to neither.
    Ended,
    After,
}

impl Think {
    /// At the start of an answer.
    pub fn new(format: &'static ReasoningFormat, is_inside: bool) -> Self {
        Self { format, state: State::Before { is_inside }, pending: String::new() }
    }

    /// Whether the text so far ends within reasoning.
    pub fn is_inside(&self) -> bool {
        matches!(self.state, State::Begun | State::Inside | State::Before { is_inside: true })
    }

    /// Goes one state further if the pending text decides it.
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Before { is_inside } => {
                let text = self.pending.trim_start();
                if let Some(rest) = text.strip_prefix(self.format.start) {
                    self.pending = rest.to_owned();
                    self.state = State::Begun;
                } else if self.format.start.starts_with(text) {
                    return false;
                } else {
                    self.state = if is_inside { State::Inside } else { State::After };
                }
                true
            }
            State::Begun => {
                self.pending = self.pending.trim_start_matches('\n').to_owned();
                if self.pending.is_empty() {
                    return false;
                }
                self.state = State::Inside;
                true
            }
            State::Inside => match tag::find(&self.pending, self.format.end) {
                Found::At(at) => {
                    out.push(Piece::Reasoning(self.pending[..at].to_owned()));
                    self.pending.drain(..at + self.format.end.len());
                    self.state = State::Ended;
                    true
                }
                Found::NotIn(n) => {
                    out.push(Piece::Reasoning(self.pending.drain(..n).collect()));
                    false
                }
            },
            State::Ended => {
                self.pending = self.pending.trim_start_matches('\n').to_owned();
                if self.pending.is_empty() {
                    return false;
                }
                self.state = State::After;
                true
            }
            State::After => {
                out.push(Piece::Content(std::mem::take(&mut self.pending)));
                false
            }
        }
    }
}

impl Parser for Think {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.pending.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = std::mem::take(&mut self.pending);
        out.push(if self.is_inside() { Piece::Reasoning(rest) } else { Piece::Content(rest) });
    }
}
