//! [`CallScanner`]: one tool call as a JSON object, read as it comes.

use super::Piece;

/// Keys that hold a call's arguments.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];

/// Reads `{"name": "f", "arguments": {...}}`, keys in any order, and gives the arguments out as they come.
#[derive(Debug, Default)]
pub struct CallScanner {
    state: State,
    /// The key, or the value of a key that is not arguments, as JSON text.
    token: String,
    key: String,
    /// Brackets open within a value.
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    /// Whether the value has begun.
    has_value: bool,
    has_name: bool,
    /// Arguments that came before the name.
    early: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Before `{`.
    #[default]
    Start,
    /// Before a key's `"` or `}`.
    Key,
    InKey,
    Colon,
    /// Before a value.
    Value,
    InValue,
    /// Before `,` or `}`.
    Comma,
    Done,
}

/// What is not a call.
#[derive(Debug, PartialEq, Eq)]
pub struct NotACall;

impl CallScanner {
    /// Whether the object is complete.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether a call has been given out.
    pub fn has_begun(&self) -> bool {
        self.has_name
    }

    /// Takes in `text` up to the object's end and returns how many bytes that were.
    ///
    /// # Errors
    /// If it is not an object with a name; nothing was given out then unless [`CallScanner::has_begun`].
    pub fn push(&mut self, text: &str, out: &mut Vec<Piece>) -> Result<usize, NotACall> {
        let mut arguments = String::new();
        let mut n_bytes = 0;
        for c in text.chars() {
            if self.is_done() {
                break;
            }
            self.take(c, &mut arguments, out)?;
            n_bytes += c.len_utf8();
        }
        self.give(arguments, out);
        if self.is_done() && !self.has_name {
            return Err(NotACall);
        }
        Ok(n_bytes)
    }

    fn give(&mut self, arguments: String, out: &mut Vec<Piece>) {
        if !self.has_name {
            self.early.push_str(&arguments);
        } else if !arguments.is_empty() {
            out.push(Piece::Arguments(arguments));
        }
    }

    fn take(&mut self, c: char, arguments: &mut String, out: &mut Vec<Piece>) -> Result<(), NotACall> {
        match (self.state, c) {
            (State::InKey, _) => {
                self.token.push(c);
                if self.ends_string(c) {
                    self.key = serde_json::from_str(&std::mem::take(&mut self.token)).map_err(|_| NotACall)?;
                    self.state = State::Colon;
                }
            }
            (State::InValue, _) => self.take_value(c, arguments, out)?,
            (_, ' ' | '\t' | '\n' | '\r') => {}
            (State::Start, '{') => self.state = State::Key,
            (State::Key, '"') => {
                self.token.push(c);
                self.state = State::InKey;
            }
            (State::Colon, ':') => self.state = State::Value,
            (State::Value, _) => {
                self.state = State::InValue;
                (self.depth, self.has_value) = (0, false);
                self.take_value(c, arguments, out)?;
            }
            (State::Comma, ',') => self.state = State::Key,
            (State::Key | State::Comma, '}') => self.state = State::Done,
            _ => return Err(NotACall),
        }
        Ok(())
    }

    fn take_value(&mut self, c: char, arguments: &mut String, out: &mut Vec<Piece>) -> Result<(), NotACall> {
        let is_scalar_end = self.depth == 0 && !self.in_string && matches!(c, ',' | '}' | ' ' | '\n' | '\r' | '\t');
        if is_scalar_end && self.has_value {
            // A number, true, false or null.
            self.end_value(arguments, out)?;
            return self.take(c, arguments, out);
        }
        self.has_value = true;
        if ARGUMENTS.contains(&self.key.as_str()) {
            arguments.push(c);
        } else {
            self.token.push(c);
        }
        if self.in_string {
            if self.ends_string(c) {
                self.in_string = false;
                if self.depth == 0 {
                    return self.end_value(arguments, out);
                }
            }
            return Ok(());
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.checked_sub(1).ok_or(NotACall)?;
                if self.depth == 0 {
                    return self.end_value(arguments, out);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn end_value(&mut self, arguments: &mut String, out: &mut Vec<Piece>) -> Result<(), NotACall> {
        self.state = State::Comma;
        let value = std::mem::take(&mut self.token);
        if self.key == "name" && !self.has_name {
            let name: String = serde_json::from_str(&value).map_err(|_| NotACall)?;
            out.push(Piece::Call(name));
            self.has_name = true;
            let early = std::mem::take(&mut self.early) + &std::mem::take(arguments);
            self.give(early, out);
        }
        Ok(())
    }

    /// Whether `c` closes the string it is in.
    fn ends_string(&mut self, c: char) -> bool {
        let closes = c == '"' && !self.is_escaped;
        self.is_escaped = c == '\\' && !self.is_escaped;
        closes
    }
}
