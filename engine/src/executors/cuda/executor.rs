//! [`CudaExecutor`]: steps in flight, from upload to sampled tokens.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use cudarc::driver::sys;

use super::{
    buckets::bucket_for,
    buffers::page_bytes,
    device::{Event, Gpu},
    inputs::{StepInputs, StepShape},
    ops::Contexts,
    sampling::{Sampling, SamplingOutput},
    setup::{self, Setup},
    status::Check,
};
use crate::{
    EngineConfig, Error,
    decoder::DecoderSpec,
    executors::{Capacity, Executor},
    step::{StepInput, StepOutput},
    weights::WeightSource,
};

/// A step takes longer than this only on a device that hangs, or under a sanitizer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Time to poll without sleeping: most steps that are waited for end soon.
const SPIN: Duration = Duration::from_micros(100);

/// A model on one NVIDIA device.
pub struct CudaExecutor {
    // Before `gpu`: dropped while the context is alive.
    setup: Setup,
    sampling: Sampling,
    /// Uploads and completion events of the steps in flight, used in turn.
    in_flight: [InFlight; 2],
    next: usize,
    pending: VecDeque<Pending>,
    /// The block tables on the device, and the pages of a row.
    uploaded_tables: (Vec<i32>, usize),
    /// When a step counts as hanging.
    timeout: Duration,
    gpu: Gpu,
}

struct InFlight {
    inputs: StepInputs,
    done: Event,
}

/// A launched step.
struct Pending {
    /// Which of [`CudaExecutor::in_flight`].
    index: usize,
    output: SamplingOutput,
    shape: StepShape,
}

impl CudaExecutor {
    /// Loads `weights` onto CUDA device `device` and prepares every batch size.
    ///
    /// # Errors
    /// [`Error::Device`] if a library or memory is missing, [`Error::Config`] about an option that cannot be
    /// honoured, [`Error::Model`] about a weight.
    pub fn new(
        spec: &DecoderSpec,
        weights: &dyn WeightSource,
        config: &EngineConfig,
        device: usize,
    ) -> Result<Self, Error> {
        let gpu = Gpu::open(device)?;
        let setup = setup::run(&gpu, spec, weights, config)?;
        let (limits, layout) = (setup.limits, &setup.forward.layout);
        let slot = || {
            let inputs = StepInputs::new(layout, limits.max_seqs, limits.max_blocks)?;
            Ok::<_, Error>(InFlight { inputs, done: Event::new(false)? })
        };
        let in_flight = [slot()?, slot()?];
        let sampling = Sampling::new(&gpu, spec, limits)?;
        Ok(Self {
            setup,
            sampling,
            in_flight,
            next: 0,
            pending: VecDeque::new(),
            uploaded_tables: (Vec::new(), 0),
            timeout: TIMEOUT,
            gpu,
        })
    }

    /// Waits for a step as long as `timeout` before it counts as hanging.
    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Puts the packed inputs on the device.
    fn upload(&mut self, index: usize, n_bytes: usize, shape: &StepShape) -> Result<(), Error> {
        let inputs = &mut self.in_flight[index].inputs;
        let buffers = &self.setup.forward.buffers;
        let stream = self.gpu.cu_stream();
        // SAFETY: source and destination are of the same layout; the source is not written before the step is done.
        unsafe { sys::cuMemcpyHtoDAsync_v2(buffers.inputs.ptr(), inputs.block().cast(), n_bytes, stream) }
            .check("cuMemcpyHtoDAsync")?;
        // A sequence enters a new page every 16 tokens only: a few of them often leave the tables as they were.
        let tables = &inputs.block_tables()[..shape.n_seqs * shape.n_blocks];
        let (uploaded, uploaded_blocks) = &mut self.uploaded_tables;
        if shape.n_blocks == 0 || (*uploaded_blocks == shape.n_blocks && uploaded == tables) {
            return Ok(());
        }
        uploaded.clear();
        uploaded.extend_from_slice(tables);
        *uploaded_blocks = shape.n_blocks;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: tables.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: shape.n_blocks * 4,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: buffers.block_tables.ptr(),
            dstArray: std::ptr::null_mut(),
            dstPitch: self.setup.limits.max_blocks * 4,
            WidthInBytes: shape.n_blocks * 4,
            Height: shape.n_seqs,
        };
        // SAFETY: rows fit their pitch on both sides, and there are at most `max_seqs`.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) }.check("cuMemcpy2DAsync")
    }

    /// Enqueues the forward pass of `step`, logits of the rows to sample included.
    fn forward(&mut self, step: &StepInput, shape: &StepShape, bucket: Option<usize>) -> Result<(), Error> {
        if let Some(bucket) = bucket {
            return self.setup.graphs[bucket][Contexts::of(shape.n_blocks) as usize].launch(&self.gpu);
        }
        let forward = &mut self.setup.forward;
        if !shape.scores_prompts {
            return forward.sampled_chunks(&self.gpu, shape);
        }
        forward.chunks(&self.gpu, shape)?;
        self.sampling.prompt_logprobs(&self.gpu, forward, step)?;
        let rows = forward.input(forward.layout.sample_rows);
        forward.logits(&self.gpu, rows, shape.n_samples)
    }

    fn shape(&self, step: &StepInput) -> StepShape {
        let forward = &self.setup.forward;
        let group = forward.spec.n_heads / forward.spec.n_kv_heads;
        let mut shape = StepShape::of(step, group, forward.contexts.n_pages());
        shape.decode_blocks = forward.decode_blocks(&self.gpu, &shape);
        shape
    }

    fn check_size(&self, step: &StepInput, shape: &StepShape) -> Result<(), Error> {
        let limits = self.setup.limits;
        let too_large = step.n_tokens() > limits.max_tokens
            || shape.n_seqs > limits.max_seqs
            || shape.n_blocks > limits.max_blocks
            || self.pending.len() >= self.setup.capacity.max_in_flight;
        if too_large {
            return Err(Error::Device(format!("a step is larger than the executor's capacity: {shape:?}")));
        }
        Ok(())
    }
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> &Capacity {
        &self.setup.capacity
    }

    fn describe(&self) -> String {
        self.setup.description.clone()
    }

    fn launch(&mut self, step: StepInput) -> Result<(), Error> {
        self.gpu.bind()?;
        let shape = self.shape(&step);
        self.check_size(&step, &shape)?;
        let bucket = if shape.is_decode() { bucket_for(&self.setup.buckets, shape.n_seqs) } else { None };
        let index = self.next;
        self.next = 1 - self.next;
        let size = bucket.map(|bucket| self.setup.buckets[bucket]);
        let n_bytes = self.in_flight[index].inputs.pack(&self.setup.forward.layout, &step, &shape, size);
        self.upload(index, n_bytes, &shape)?;
        self.forward(&step, &shape, bucket)?;
        let output = self.sampling.sample(&self.gpu, &self.setup.forward, &step, index)?;
        self.in_flight[index].done.record(self.gpu.cu_stream())?;
        self.pending.push_back(Pending { index, output, shape });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.gpu.bind()?;
        let Some(Pending { index, output, shape }) = self.pending.pop_front() else {
            return Err(Error::Device("collect was called with no step in flight".into()));
        };
        wait(&self.in_flight[index].done, &shape, self.timeout)?;
        tracing::trace!(
            rows = shape.n_tokens,
            decoding = shape.n_decode,
            decode_context = shape.n_decode_context,
            prompt_pairs = shape.n_chunk_pairs,
            "step done"
        );
        Ok(self.sampling.finish(output, index))
    }

    fn hidden_states(&mut self, step: &StepInput) -> Result<Vec<f32>, Error> {
        self.gpu.bind()?;
        let n = step.n_tokens() * self.setup.forward.spec.hidden_size;
        let shape = self.shape(step);
        self.check_size(step, &shape)?;
        let index = self.next;
        let n_bytes = self.in_flight[index].inputs.pack(&self.setup.forward.layout, step, &shape, None);
        self.upload(index, n_bytes, &shape)?;
        let forward = &mut self.setup.forward;
        forward.chunks(&self.gpu, &shape)?;
        forward.final_norm(&self.gpu, shape.n_tokens)?;
        let bits: Vec<u16> = forward.buffers.h.read(&self.gpu, 0, n)?;
        Ok(bits.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect())
    }

    fn fill_cache(&mut self, step: StepInput) -> Result<(), Error> {
        let n_pages = step.block_tables.len();
        self.launch(step)?;
        self.collect()?;
        let forward = &self.setup.forward;
        let n_bytes = n_pages * page_bytes(&forward.spec);
        forward.kv.layers.iter().try_for_each(|layer| layer.repeat(&self.gpu, n_bytes))
    }
}

/// Waits for `event`, the end of a step of `shape`, but not for ever.
fn wait(event: &Event, shape: &StepShape, timeout: Duration) -> Result<(), Error> {
    let started = Instant::now();
    while !event.is_done()? {
        let elapsed = started.elapsed();
        if elapsed > timeout {
            return Err(Error::Device(format!(
                "the device did not finish a step of {} rows, {} of them of decoding sequences with {} tokens of context, within {} s",
                shape.n_tokens,
                shape.n_decode,
                shape.n_decode_context,
                timeout.as_secs()
            )));
        }
        if elapsed > SPIN {
            std::thread::sleep(Duration::from_micros(20));
        } else {
            std::hint::spin_loop();
        }
    }
    Ok(())
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        // Buffers must not be freed under running kernels. A failure leaves nothing to do.
        let _ = self.gpu.bind().and_then(|()| self.gpu.synchronize());
    }
}
