//! The real binary with the real engine over real sockets, on a tiny model with random weights.

mod beam_search;
mod disconnects;
mod embeddings;
mod server;
mod structured;
