//! The server as a tower service, without a socket (but for draining), against an engine whose
//! output is known.

mod contract;
mod endpoints;
mod fake;
mod fields;
mod lifecycle;

mod observing;
mod snapshots;
mod streaming;
mod tools;
mod transport;
