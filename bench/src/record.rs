//! Owns what is known of one request: the raw row that every figure is computed from.

/// One request and its answer. Times are seconds since the start of the run, on a monotonic clock.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestRecord {
    /// Request body, JSON.
    pub request: String,
    /// Text of the answer: content, reasoning and tool calls in order of arrival.
    pub response: String,
    pub success: bool,
    /// Why the request failed.
    pub error: Option<String>,
    pub http_status: Option<i64>,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<i64>,
    pub completion_tokens: Option<i64>,
    /// Prompt tokens that the server says it took from its cache.
    pub cached_tokens: Option<i64>,
    /// The answer came as server-sent events.
    pub streamed: bool,
    /// When the request should have left: the schedule's time in an open loop, else the same as `sent_s`.
    pub intended_s: f64,
    pub sent_s: f64,
    /// First message of any kind.
    pub first_message_s: Option<f64>,
    /// First message with non-empty `choices`, even of empty text: EvalScope's time to first token.
    pub first_choices_s: Option<f64>,
    /// First message that carries text, reasoning, a tool call or token ids.
    pub first_token_s: Option<f64>,
    /// Last message but one, which the 2024 package latency ends at.
    pub penultimate_message_s: Option<f64>,
    /// Last message (`[DONE]` does not count), or the end of a whole answer, or the moment of failure.
    pub end_s: f64,
    /// Messages of the stream; 1 for a whole answer.
    pub n_messages: i64,
    /// Microseconds since `sent_s` at which each message with output arrived.
    pub token_offsets_us: Vec<u64>,
}

impl RequestRecord {
    /// Seconds from the intended send to the end of the answer.
    pub fn latency_s(&self) -> f64 {
        self.end_s - self.intended_s
    }

    /// Seconds from the intended send to the first token; the latency if the answer came whole.
    pub fn ttft_s(&self) -> f64 {
        self.first_token_s.unwrap_or(self.end_s) - self.intended_s
    }

    /// EvalScope's time to first token: up to the first message with `choices`, even an empty one.
    pub fn evalscope_ttft_s(&self) -> f64 {
        self.first_choices_s.unwrap_or(self.end_s) - self.intended_s
    }

    /// Seconds per output token after the first: (latency - TTFT) / (tokens - 1). None for whole answers and for
    /// answers of one token, which have no such time.
    pub fn tpot_s(&self) -> Option<f64> {
        let tokens = self.completion_tokens?;
        (self.streamed && tokens > 1).then(|| (self.latency_s() - self.ttft_s()) / (tokens - 1) as f64)
    }

    /// Seconds between neighbouring messages with output.
    pub fn itl_s(&self) -> impl Iterator<Item = f64> + '_ {
        self.token_offsets_us.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e6)
    }
}
