//! [`StopMatcher`]: finds stop strings in text that comes in pieces.

use std::sync::Arc;

/// Looks for stop strings in one sequence's text and holds back what may be the start of one.
///
/// The stop string that is complete first wins, however the text is cut; of two that end together, the one
/// earlier in the request's list.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    include_stop_str_in_output: bool,
    /// Text that may begin a stop string.
    held: String,
    /// Index of the stop string that was found.
    found: Option<usize>,
}

impl StopMatcher {
    /// A matcher for one sequence. `stops` must hold no empty string; without any, text passes through.
    pub fn new(stops: Arc<[String]>, include_stop_str_in_output: bool) -> Self {
        Self { stops, include_stop_str_in_output, held: String::new(), found: None }
    }

    /// Takes `text`, appends to `out` what is safe to show, and returns the stop string if one is complete.
    /// After that, everything is swallowed.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<&str> {
        if self.found.is_some() {
            return self.found();
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        self.held.push_str(text);
        let ends = self.stops.iter().enumerate().filter_map(|(i, stop)| Some((self.held.find(stop)? + stop.len(), i)));
        if let Some((end, i)) = ends.min() {
            let end = if self.include_stop_str_in_output { end } else { end - self.stops[i].len() };
            out.push_str(&self.held[..end]);
            self.held.clear();
            self.found = Some(i);
        } else {
            let safe = self.held.len() - self.longest_start_of_a_stop();
            out.extend(self.held.drain(..safe));
        }
        self.found()
    }

    /// The stop string that was found.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stops[i].as_str())
    }

    /// Appends what is held back; the text has ended otherwise.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn longest_start_of_a_stop(&self) -> usize {
        let starts = self.stops.iter().filter_map(|stop| {
            let longest = (stop.len() - 1).min(self.held.len());
            (1..=longest)
                .rev()
                .find(|&n| self.held.as_bytes().ends_with(&stop.as_bytes()[..n]) && stop.is_char_boundary(n))
        });
        starts.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<'a>(stops: &[&str], include: bool, chunks: impl IntoIterator<Item = &'a str>) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut out = String::new();
        for chunk in chunks {
            if matcher.push(chunk, &mut out).is_some() {
                break;
            }
        }
        matcher.finish(&mut out);
        (out, matcher.found().map(str::to_owned))
    }

    /// The definition: the first end of any stop string, by looking at the whole text.
    fn naive(stops: &[&str], include: bool, text: &str) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            if let Some(stop) = stops.iter().find(|stop| text[..end].ends_with(*stop)) {
                let end = if include { end } else { end - stop.len() };
                return (text[..end].to_owned(), Some((*stop).to_owned()));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn holds_back_only_what_may_stop() {
        let mut matcher = StopMatcher::new(["\n\nUser:".to_owned()].into(), false);
        let mut out = String::new();
        assert_eq!(matcher.push("Hello\n", &mut out), None);
        assert_eq!(out, "Hello");
        assert_eq!(matcher.push("\n", &mut out), None);
        assert_eq!(matcher.push("\n", &mut out), None);
        assert_eq!(out, "Hello\n");
        assert_eq!(matcher.push("User: more", &mut out), Some("\n\nUser:"));
        assert_eq!(out, "Hello\n");
        assert_eq!(matcher.push("more", &mut out), Some("\n\nUser:"));
        matcher.finish(&mut out);
        assert_eq!(out, "Hello\n");
    }

    #[test]
    fn characters_that_share_bytes_are_no_match() {
        assert_eq!(run(&["é"], false, ["è", "é"]), ("è".into(), Some("é".into())));
        assert_eq!(run(&[], false, ["a", "b"]), ("ab".into(), None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn any_cutting_gives_what_the_whole_text_gives(
            text in "[aébc]{0,24}",
            stops in prop::collection::vec("[aéb]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
            include in any::<bool>(),
        ) {
            let boundaries: Vec<usize> = (0..=text.len()).filter(|&i| text.is_char_boundary(i)).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| *cut.get(&boundaries)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let chunks = cuts.windows(2).map(|w| &text[w[0]..w[1]]);
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, include, chunks), naive(&stops, include, &text));
        }
    }
}
