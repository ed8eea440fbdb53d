//! [`ChunkWriter`]: writes the frames of one stream. What is the same in every chunk is rendered
//! once; serde only sees the parts that change.

use bytes::{Bytes, BytesMut};
use serde::Serialize;

/// Room for this many bytes of frames is made at a time.
const BLOCK_BYTES: usize = 4 << 10;

/// The fields that every chunk of a stream begins with.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ChunkHead<'a> {
    /// The answer's id.
    pub id: &'a str,
    /// `chat.completion.chunk` or `text_completion`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// The served name.
    pub model: &'a str,
}

/// Writes the frames of one stream into a growing buffer.
#[derive(Debug)]
pub struct ChunkWriter {
    /// `data: {"id":...,"model":"...","choices":[`
    head: Vec<u8>,
    out: BytesMut,
}

impl ChunkWriter {
    /// A writer whose chunks begin with `head`.
    pub fn new(head: ChunkHead<'_>) -> Self {
        let mut bytes = b"data: ".to_vec();
        serde_json::to_writer(&mut bytes, &head).expect("strings and numbers are always JSON");
        bytes.pop();
        bytes.extend_from_slice(br#","choices":["#);
        Self { head: bytes, out: BytesMut::with_capacity(BLOCK_BYTES) }
    }

    /// A writer of events with names.
    pub fn of_events() -> Self {
        Self { head: Vec::new(), out: BytesMut::with_capacity(BLOCK_BYTES) }
    }

    /// One event with a name.
    pub fn event(&mut self, name: &str, value: &impl Serialize) {
        self.raw("event: ").raw(name).raw("\ndata: ").value(value).raw("\n\n");
    }

    /// Begins a chunk: everything up to and including `"choices":[`.
    pub fn begin(&mut self) -> &mut Self {
        self.out.reserve(self.head.len() + BLOCK_BYTES / 8);
        self.out.extend_from_slice(&self.head);
        self
    }

    /// Writes text that is JSON already.
    pub fn raw(&mut self, json: &str) -> &mut Self {
        self.out.extend_from_slice(json.as_bytes());
        self
    }

    /// Writes a value.
    pub fn value(&mut self, value: &(impl Serialize + ?Sized)) -> &mut Self {
        serde_json::to_writer(Append(&mut self.out), value).expect("wire types are always JSON");
        self
    }

    /// Ends a chunk.
    pub fn end(&mut self) {
        self.raw("}\n\n");
    }

    /// One frame of any JSON.
    pub fn frame(&mut self, json: &[u8]) {
        self.raw("data: ");
        self.out.extend_from_slice(json);
        self.raw("\n\n");
    }

    /// Bytes written and not taken.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Takes what was written.
    pub fn take(&mut self) -> Bytes {
        self.out.split().freeze()
    }
}

/// `BytesMut` as a writer that grows; its own `Writer` needs the buffer by value.
struct Append<'a>(&'a mut BytesMut);

impl std::io::Write for Append<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
