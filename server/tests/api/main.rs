//! The server as a tower service, without a socket (but for draining), against an engine whose
//! output is known.

mod contract;
mod endpoints;
mod fake;
mod lifecycle;
mod observing;
mod snapshots;
mod streaming;
mod tools;
mod transport;
