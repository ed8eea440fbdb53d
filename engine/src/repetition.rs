//! [`RepetitionDetection`]: finds outputs that go round in circles.

/// When an output counts as repeating itself (vLLM's `RepetitionDetectionParams`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepetitionDetection {
    /// Tokens of the shortest pattern that is looked for, at least 1.
    pub min_pattern_size: usize,
    /// Tokens of the longest.
    pub max_pattern_size: usize,
    /// Times that a pattern must follow itself, at least 2.
    pub min_count: usize,
}

impl RepetitionDetection {
    /// Whether `output` ends with a pattern that many times.
    pub fn finds(&self, output: &[u32]) -> bool {
        let sizes = self.min_pattern_size..=self.max_pattern_size.min(output.len() / self.min_count);
        sizes.into_iter().any(|size| {
            let tail = &output[output.len() - size * self.min_count..];
            // Each token is that of one pattern before.
            tail.iter().rev().zip(tail.iter().rev().skip(size)).all(|(token, before)| token == before)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_the_wanted_sizes_are_found_at_the_end_alone() {
        let check = |min_pattern_size, max_pattern_size, min_count, output: &[u32], expected| {
            let detection = RepetitionDetection { min_pattern_size, max_pattern_size, min_count };
            assert_eq!(detection.finds(output), expected, "{detection:?} {output:?}");
        };
        check(1, 3, 2, &[], false);
        check(1, 3, 2, &[7, 7], true);
        check(1, 3, 3, &[7, 7], false);
        check(1, 3, 3, &[5, 7, 7, 7], true);
        check(1, 3, 3, &[7, 7, 7, 5], false);
        check(2, 3, 2, &[7, 7, 7], false);
        check(2, 3, 2, &[9, 1, 2, 1, 2], true);
        check(2, 3, 3, &[1, 2, 1, 2], false);
        check(1, 3, 2, &[1, 2, 3, 1, 2, 3], true);
        check(1, 2, 2, &[1, 2, 3, 1, 2, 3], false);
        check(1, 3, 2, &[4, 2, 3, 1, 2, 3], false);
    }
}
