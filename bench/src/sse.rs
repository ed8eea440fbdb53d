//! Owns the splitter of server-sent events: bytes in any cut in, `data:` payloads out.

/// Splits a `text/event-stream` body into the payloads of its `data:` lines.
///
/// Follows the WHATWG server-sent events format: lines end in LF, CR or CRLF, a blank line ends an event, several
/// `data:` lines of an event are joined by LF, comments (`:`) and other fields are skipped. It works on bytes, so a
/// character cut in two by the network is whole again in its payload.
#[derive(Debug, Default)]
pub struct SseSplitter {
    /// The line that has not ended yet.
    line: Vec<u8>,
    /// Payload of the event that has not ended yet.
    data: Vec<u8>,
    has_data: bool,
    /// The last line ended in CR: an LF right after it belongs to that line end.
    after_cr: bool,
}

impl SseSplitter {
    /// Takes the next piece of the body and calls `on_data` for each event that it completes.
    pub fn push(&mut self, mut piece: &[u8], mut on_data: impl FnMut(&[u8])) {
        while !piece.is_empty() {
            if std::mem::take(&mut self.after_cr) && piece[0] == b'\n' {
                piece = &piece[1..];
                continue;
            }
            let Some(end) = piece.iter().position(|&byte| byte == b'\n' || byte == b'\r') else {
                self.line.extend_from_slice(piece);
                return;
            };
            self.after_cr = piece[end] == b'\r';
            if self.line.is_empty() {
                self.end_line(&piece[..end], &mut on_data);
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&piece[..end]);
                self.end_line(&line, &mut on_data);
                line.clear();
                self.line = line;
            }
            piece = &piece[end + 1..];
        }
    }

    /// The body has ended. An event without its blank line still counts: servers that fail midway leave it out.
    pub fn finish(&mut self, mut on_data: impl FnMut(&[u8])) {
        let line = std::mem::take(&mut self.line);
        self.end_line(&line, &mut on_data);
        self.end_line(b"", &mut on_data);
    }

    fn end_line(&mut self, line: &[u8], on_data: &mut impl FnMut(&[u8])) {
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                on_data(&self.data);
                self.data.clear();
            }
            return;
        }
        let value = match line.strip_prefix(b"data") {
            Some([b':', b' ', value @ ..]) | Some([b':', value @ ..]) => value,
            Some([]) => &[],
            _ => return,
        };
        if self.has_data {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
        self.has_data = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(pieces: &[&[u8]]) -> Vec<String> {
        let mut events = Vec::new();
        let mut splitter = SseSplitter::default();
        for piece in pieces {
            splitter.push(piece, |data| events.push(String::from_utf8(data.to_vec()).unwrap()));
        }
        splitter.finish(|data| events.push(String::from_utf8(data.to_vec()).unwrap()));
        events
    }

    #[test]
    fn follows_the_event_stream_format() {
        let check = |body: &str, expected: &[&str]| assert_eq!(split(&[body.as_bytes()]), expected, "{body:?}");
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data:a\r\n\r\ndata:  b\r\n\r\n", &["a", " b"]);
        check("data: a\r\rdata: b\r\r", &["a", "b"]);
        check(": ping\n\nevent: x\nid: 1\ndata: a\ndata: b\n\n", &["a\nb"]);
        check("data\n\n", &[""]);
        check("database: x\n\n", &[]);
        check("data: cut off", &["cut off"]);
        check("", &[]);
        check("\n\n\n", &[]);
    }

    #[test]
    fn every_cut_of_a_body_gives_the_same_events() {
        let body = "data: {\"a\":\"你好\"}\r\n\r\n: 注\n\ndata: b\r\rdata: é\n\n".as_bytes();
        let expected = ["{\"a\":\"你好\"}", "b", "é"];
        for first in 0..=body.len() {
            for second in first..=body.len() {
                assert_eq!(split(&[&body[..first], &body[first..second], &body[second..]]), expected);
            }
        }
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            payloads in prop::collection::vec("[^\r\n]{0,40}", 0..12),
            line_end in prop::sample::select(vec!["\n", "\r\n", "\r"]),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let body: String = payloads.iter().map(|p| format!(": c{line_end}data: {p}{line_end}{line_end}")).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &body.as_bytes()[w[0]..w[1]]).collect();
            prop_assert_eq!(split(&pieces), payloads);
        }
    }
}
