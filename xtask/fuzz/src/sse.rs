//! The answers that ember-bench reads: a stream of events, and each event's JSON in every shape that it knows.

use ember_bench::{
    api::{self, Answer},
    sse::SseSplitter,
};

/// The first byte says where the body is cut.
pub fn run(bytes: &[u8]) {
    let Some((&cut, body)) = bytes.split_first() else {
        return;
    };
    let whole = events(std::iter::once(body));
    assert_eq!(events(body.chunks(usize::from(cut).max(1))), whole, "the cut changes the events");
    for api in api::TABLE {
        let mut answer = Answer::default();
        for event in &whole {
            let _ = api.read_message(event, &mut answer);
        }
        let _ = api.read_body(body, &mut answer);
    }
}

fn events<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut splitter = SseSplitter::default();
    let mut events = Vec::new();
    for piece in pieces {
        splitter.push(piece, |event| events.push(event.to_vec()));
    }
    splitter.finish(|event| events.push(event.to_vec()));
    events
}
