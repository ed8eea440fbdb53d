//! [`ThinkingBudget`]: how many tokens a model may reason before it must answer.

/// A limit of an output's reasoning. When it is used up, the tokens that end reasoning are the only ones that may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingBudget {
    /// Most tokens between `start` and `end`, those in the prompt included.
    pub n_tokens: u32,
    /// Tokens that begin reasoning.
    pub start: Vec<u32>,
    /// Tokens that end it; not empty.
    pub end: Vec<u32>,
    /// The output begins within reasoning even if `start` is not in the prompt.
    pub begins_inside: bool,
}

/// How far one sequence's reasoning has come. Once it has ended, more of it has no limit.
#[derive(Debug)]
pub(crate) struct Thinking {
    budget: ThinkingBudget,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    /// After so many tokens.
    Inside(usize),
    /// So many of the tokens that end it have come.
    Ending(usize),
    Over,
}

impl Thinking {
    /// That of an output to `prompt`.
    pub(crate) fn new(budget: ThinkingBudget, prompt: &[u32]) -> Self {
        let last = |part: &[u32]| prompt.windows(part.len().max(1)).rposition(|window| window == part);
        let state = match (last(&budget.start), last(&budget.end)) {
            (Some(start), end) if end.is_none_or(|end| end < start) => {
                State::Inside(prompt.len() - start - budget.start.len())
            }
            _ if budget.begins_inside => State::Inside(0),
            _ => State::Before,
        };
        let mut thinking = Self { budget, state };
        thinking.end_if_used_up(&[]);
        thinking
    }

    /// Takes in a token: the last of `output`, the whole output so far.
    pub(crate) fn push(&mut self, output: &[u32]) {
        let ThinkingBudget { start, end, .. } = &self.budget;
        self.state = match self.state {
            State::Before if output.ends_with(start) => State::Inside(0),
            State::Inside(_) if output.ends_with(end) => State::Over,
            // Where outputs begin within reasoning, they may still mark its beginning.
            State::Inside(_) if output == start => State::Inside(0),
            State::Inside(n) => State::Inside(n + 1),
            State::Ending(n) if n + 1 == end.len() => State::Over,
            State::Ending(n) => State::Ending(n + 1),
            state @ (State::Before | State::Over) => state,
        };
        self.end_if_used_up(output);
    }

    /// The token that must come next, if only one may.
    pub(crate) fn forced(&self) -> Option<u32> {
        match self.state {
            State::Ending(n) => self.budget.end.get(n).copied(),
            _ => None,
        }
    }

    /// Whether what may come after `n` tokens that are not known yet depends on them.
    pub(crate) fn depends_on_next(&self, n: usize) -> bool {
        let budget = self.budget.n_tokens as usize;
        match self.state {
            // One of them may be the beginning.
            State::Before => n > budget,
            State::Inside(so_far) => so_far + n >= budget,
            State::Ending(_) => true,
            State::Over => false,
        }
    }

    fn end_if_used_up(&mut self, output: &[u32]) {
        if matches!(self.state, State::Inside(n) if n >= self.budget.n_tokens as usize) {
            // The model may have begun to end it.
            let end = &self.budget.end;
            let begun = (1..end.len()).rev().find(|&n| output.ends_with(&end[..n]));
            self.state = State::Ending(begun.unwrap_or(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u32 = 1;

    /// What an output becomes whose model would say `wants`, token by token.
    fn output(budget: u32, end: &[u32], prompt: &[u32], wants: &[u32]) -> Vec<u32> {
        let budget = ThinkingBudget { n_tokens: budget, start: vec![START], end: end.to_vec(), begins_inside: false };
        let mut thinking = Thinking::new(budget, prompt);
        let mut output = Vec::new();
        for &want in wants {
            output.push(thinking.forced().unwrap_or(want));
            thinking.push(&output);
        }
        output
    }

    #[test]
    fn reasoning_ends_when_the_budget_is_used_up() {
        let end = [2];
        assert_eq!(output(2, &end, &[9], &[START, 5, 6, 7, 8]), [START, 5, 6, 2, 8]);
        assert_eq!(output(2, &end, &[9], &[START, 5, 2, 7, 8, START, 5, 6, 7]), [START, 5, 2, 7, 8, START, 5, 6, 7]);
        assert_eq!(output(0, &end, &[9], &[START, 5, 6]), [START, 2, 6]);
        assert_eq!(output(2, &end, &[9], &[5, 6, 7, 8]), [5, 6, 7, 8]);
        // The prompt's part counts.
        assert_eq!(output(2, &end, &[9, START], &[5, 6, 7, 8]), [5, 6, 2, 8]);
        assert_eq!(output(2, &end, &[9, START, 4], &[5, 6, 7, 8]), [5, 2, 7, 8]);
        assert_eq!(output(0, &end, &[9, START, 4], &[5, 6, 7]), [2, 6, 7]);
        assert_eq!(output(0, &end, &[START, 4, 2], &[5, 6, 7]), [5, 6, 7]);
    }

    #[test]
    fn an_end_of_several_tokens_is_not_begun_twice() {
        let end = [2, 3, 4];
        assert_eq!(output(1, &end, &[START], &[5, 6, 7, 8, 9]), [5, 2, 3, 4, 9]);
        assert_eq!(output(2, &end, &[START], &[5, 2, 7, 8, 9]), [5, 2, 3, 4, 9]);
        assert_eq!(output(2, &end, &[START], &[2, 3, 7, 8, 9]), [2, 3, 4, 8, 9]);
        assert_eq!(output(3, &end, &[START], &[2, 3, 4, 8, 9]), [2, 3, 4, 8, 9]);
    }

    #[test]
    fn outputs_that_begin_inside_may_mark_it_all_the_same() {
        let budget = ThinkingBudget { n_tokens: 2, start: vec![START], end: vec![2], begins_inside: true };
        for (wants, expected) in [([5, 6, 7, 8], [5, 6, 2, 8]), ([START, 5, 6, 7], [START, 5, 6, 2])] {
            let mut thinking = Thinking::new(budget.clone(), &[9]);
            let mut output = Vec::new();
            for want in wants {
                output.push(thinking.forced().unwrap_or(want));
                thinking.push(&output);
            }
            assert_eq!(output, expected);
        }
    }

    #[test]
    fn tokens_are_waited_for_only_near_the_end() {
        let budget = ThinkingBudget { n_tokens: 3, start: vec![START], end: vec![2], begins_inside: false };
        let mut thinking = Thinking::new(budget, &[9]);
        let mut output = Vec::new();
        let mut depends = Vec::new();
        for token in [5, START, 5, 6, 7, 2, 8] {
            depends.push(thinking.depends_on_next(1));
            output.push(token);
            thinking.push(&output);
        }
        assert_eq!(depends, [false, false, false, false, true, true, false]);
        assert!(!thinking.depends_on_next(1));
    }
}
