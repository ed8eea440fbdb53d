//! [`Graph`]: a captured sequence of launches, replayed by one call.

use cudarc::driver::sys;

use super::{device::Gpu, status::Check};
use crate::Error;

/// A replayable graph.
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: a graph may be launched from any thread that has its context current, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `enqueue` puts into `gpu`'s stream; nothing of it runs now.
    pub(super) fn capture(gpu: &Gpu, enqueue: impl FnOnce() -> Result<(), Error>) -> Result<Self, Error> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and not capturing.
        unsafe { sys::cuStreamBeginCapture_v2(gpu.cu_stream(), mode) }.check("cuStreamBeginCapture")?;
        let enqueued = enqueue();
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: valid places for the results; the graph is alive until it is destroyed here.
        let result = unsafe {
            // The capture must be ended even if the work failed.
            let ended = sys::cuStreamEndCapture(gpu.cu_stream(), &mut graph).check("cuStreamEndCapture");
            let result = enqueued
                .and(ended)
                .and_then(|()| sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).check("cuGraphInstantiate"));
            if !graph.is_null() {
                sys::cuGraphDestroy(graph);
            }
            result
        };
        result.map(|()| Self(exec))
    }

    /// Enqueues the whole graph.
    pub(super) fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        // SAFETY: graph and stream are alive.
        unsafe { sys::cuGraphLaunch(self.0, gpu.cu_stream()) }.check("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: alive and not used again. A failure leaves nothing to do.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
