//! Server-sent events: a response body that is the request in flight.

mod body;
mod chat_frames;
mod chunk_writer;
mod completion_frames;
mod message_frames;
mod response_frames;
mod usage_meter;

pub use body::{Frames, SseBody};
pub use chat_frames::ChatFrames;
pub use chunk_writer::{ChunkHead, ChunkWriter};
pub use completion_frames::{ChoiceState, CompletionFrames};
pub use message_frames::MessageFrames;
pub use response_frames::ResponseFrames;
pub use usage_meter::UsageMeter;
