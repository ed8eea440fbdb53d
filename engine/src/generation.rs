//! [`Generation`]: the caller's end of a request. Turns tokens to text and finds stop strings, so
//! that neither costs the engine's thread anything.

use crate::{Error, Event};

/// The events of one request. Dropping it cancels its sequences.
pub struct Generation {}

impl Generation {
    /// The next event; `None` after every sequence has finished. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        unimplemented!()
    }

    /// [`Generation::next`] for callers outside an async runtime. Blocks.
    pub fn blocking_next(&mut self) -> Option<Result<Event, Error>> {
        unimplemented!()
    }
}
