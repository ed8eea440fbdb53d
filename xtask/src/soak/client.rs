//! One client of the soak: a good request, a bad one, or one that hangs up, over and over.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

/// A request that has to wait behind all others still comes to its end long before.
const PATIENCE: Duration = Duration::from_secs(600);
const MAX_FAILURES_KEPT: usize = 20;

/// What came of one request.
pub struct Outcome {
    kind: &'static str,
    result: Result<(), String>,
}

/// What came of all.
#[derive(Default)]
pub struct Tally {
    counts: BTreeMap<&'static str, u64>,
    pub failures: Vec<String>,
}

impl Tally {
    pub fn add(&mut self, Outcome { kind, result }: Outcome) {
        *self.counts.entry(kind).or_default() += 1;
        if let Err(failure) = result
            && self.failures.len() < MAX_FAILURES_KEPT
        {
            self.failures.push(format!("{kind}: {failure}"));
        }
    }

    pub fn rows(&self) -> Vec<Vec<String>> {
        let mut rows: Vec<_> = self.counts.iter().map(|(kind, n)| vec![(*kind).to_owned(), n.to_string()]).collect();
        rows.push(vec!["failures".to_owned(), self.failures.len().to_string()]);
        rows
    }
}

pub struct Client {
    port: u16,
    /// Of the random numbers (xorshift64).
    state: u64,
}

impl Client {
    pub fn new(port: u16, number: u32) -> Client {
        Client { port, state: 0x9e37_79b9_7f4a_7c15 ^ (u64::from(number) + 1).wrapping_mul(0xd1b5_4a32_d192_ed03) }
    }

    /// A number from 0 to `n - 1`.
    fn below(&mut self, n: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 16) % n
    }

    /// One request.
    pub fn turn(&mut self) -> Outcome {
        match self.below(10) {
            0 => Outcome { kind: "bad requests", result: self.bad() },
            1 | 2 => Outcome { kind: "requests hung up", result: self.hang_up() },
            3..=5 => Outcome { kind: "whole answers", result: self.good(false) },
            _ => Outcome { kind: "streamed answers", result: self.good(true) },
        }
    }

    /// A path, a good body and how many choices it asks for.
    fn request(&mut self, stream: bool) -> (&'static str, Value, usize) {
        // Mostly short, some long; each its own from the first words on, so that few are cached.
        let n_words = match self.below(8) {
            0 => 200 + self.below(800),
            _ => 1 + self.below(60),
        };
        let prompt: String =
            (0..n_words).map(|_| format!("{} ", WORDS[self.below(WORDS.len() as u64) as usize])).collect();
        let n = if self.below(6) == 0 { 2 + self.below(3) } else { 1 };
        let mut body = json!({
            "model": "smollm2", "max_tokens": 1 + self.below(64), "temperature": 0.8, "n": n, "stream": stream,
        });
        if stream {
            body["stream_options"] = json!({ "include_usage": true });
        }
        match self.below(8) {
            0 => body["stop"] = json!(["the", "\n"]),
            1 => body["logprobs"] = json!(1),
            2 => body["repetition_penalty"] = json!(1.2),
            3 => body["structured_outputs"] = json!({ "regex": "[a-z ]{1,40}" }),
            _ => {}
        }
        if self.below(2) == 0 {
            body["prompt"] = json!(prompt);
            ("/v1/completions", body, n as usize)
        } else {
            if body.get("logprobs").is_some() {
                body["logprobs"] = json!(true);
            }
            body["messages"] = json!([{ "role": "user", "content": prompt }]);
            ("/v1/chat/completions", body, n as usize)
        }
    }

    fn good(&mut self, stream: bool) -> Result<(), String> {
        let (path, body, n) = self.request(stream);
        let (status, answer) = self.exchange(path, &body.to_string())?;
        if status != 200 {
            return Err(format!("status {status}: {}", start_of(&answer)));
        }
        let n_finished = if stream { finished_in_stream(&answer) } else { finished_in_whole(&answer) };
        if n_finished != Some(n) {
            return Err(format!("{n_finished:?} of {n} choices came to their end: {}", start_of(&answer)));
        }
        Ok(())
    }

    fn bad(&mut self) -> Result<(), String> {
        let long = "word ".repeat(5000);
        let (path, body, status) = match self.below(6) {
            0 => ("/v1/completions", "{\"prompt\": \"x\"".to_owned(), 400),
            1 => ("/v1/completions", json!({ "prompt": "x", "temperature": 9 }).to_string(), 400),
            2 => ("/v1/completions", json!({ "prompt": long }).to_string(), 400),
            3 => ("/v1/chat/completions", json!({ "model": "none", "messages": [] }).to_string(), 404),
            4 => {
                let outputs = json!({ "regex": "(" });
                ("/v1/completions", json!({ "prompt": "x", "structured_outputs": outputs }).to_string(), 400)
            }
            _ => ("/v1/none", "{}".to_owned(), 404),
        };
        let (got, answer) = self.exchange(path, &body)?;
        if got != status {
            return Err(format!("{path}: status {got} instead of {status}: {}", start_of(&answer)));
        }
        Ok(())
    }

    /// Sends a request and leaves: at once, after a while, or in the midst of the answer.
    fn hang_up(&mut self) -> Result<(), String> {
        let stream = self.below(3) > 0;
        let (path, body, _) = self.request(stream);
        let mut socket = self.send(path, &body.to_string())?;
        match self.below(3) {
            0 => {}
            1 => std::thread::sleep(Duration::from_millis(self.below(2000))),
            _ => {
                let mut some = vec![0; 1 + self.below(4000) as usize];
                let _ = socket.read(&mut some);
            }
        }
        let _ = socket.shutdown(Shutdown::Both);
        Ok(())
    }

    fn send(&self, path: &str, body: &str) -> Result<TcpStream, String> {
        let text = |error: std::io::Error| error.to_string();
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).map_err(text)?;
        socket.set_read_timeout(Some(PATIENCE)).map_err(text)?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).and_then(|()| socket.write_all(body.as_bytes())).map_err(text)?;
        Ok(socket)
    }

    /// Status and body; the chunk sizes of a streamed one are left in it.
    fn exchange(&self, path: &str, body: &str) -> Result<(u16, String), String> {
        let mut answer = Vec::new();
        self.send(path, body)?.read_to_end(&mut answer).map_err(|error| error.to_string())?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is not HTTP")?;
        let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).ok_or("the answer has no status")?;
        Ok((status, body.to_owned()))
    }
}

/// Choices that came to their end in a stream that did, too.
fn finished_in_stream(answer: &str) -> Option<usize> {
    let mut n_finished = 0;
    let mut is_done = false;
    for line in answer.lines() {
        match line.strip_prefix("data: ") {
            None => {}
            Some("[DONE]") => is_done = true,
            Some(data) => {
                let chunk: Value = serde_json::from_str(data).ok()?;
                let choices = chunk["choices"].as_array()?;
                n_finished += choices.iter().filter(|it| it["finish_reason"].is_string()).count();
            }
        }
    }
    is_done.then_some(n_finished)
}

fn finished_in_whole(answer: &str) -> Option<usize> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    Some(answer["choices"].as_array()?.iter().filter(|it| it["finish_reason"].is_string()).count())
}

fn start_of(answer: &str) -> String {
    answer.chars().take(300).collect()
}

const WORDS: &[&str] = &[
    "river", "stone", "winter", "engine", "letter", "garden", "number", "silver", "doctor", "music", "planet",
    "window", "history", "copper", "market", "bridge", "ocean", "theory", "paper", "candle", "mountain", "forest",
    "signal", "pepper", "travel", "island", "memory", "system", "summer", "answer",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_did_not_end_are_told_apart() {
        let whole = |reason: &str| format!(r#"{{"choices": [{{"finish_reason": {reason}}}]}}"#);
        assert_eq!(finished_in_whole(&whole("\"stop\"")), Some(1));
        assert_eq!(finished_in_whole(&whole("null")), Some(0));
        assert_eq!(finished_in_whole("{"), None);
        let stream = format!("1a\r\ndata: {}\n\n\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", whole("\"length\""));
        assert_eq!(finished_in_stream(&stream), Some(1));
        assert_eq!(finished_in_stream(&stream.replace("data: [DONE]", "")), None);
        assert_eq!(finished_in_stream("data: {\"error\": {}}\n\ndata: [DONE]\n\n"), None);
    }

    #[test]
    fn clients_differ() {
        let sample = |number| {
            let mut client = Client::new(0, number);
            (0..8).map(|_| client.below(100)).collect::<Vec<_>>()
        };
        assert_ne!(sample(0), sample(1));
        assert_eq!(sample(3), sample(3));
    }
}
