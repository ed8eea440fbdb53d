//! What the operator chooses before a model is loaded.

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first CUDA device if this build has CUDA and one is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index, after `CUDA_VISIBLE_DEVICES`.
    Cuda(usize),
}

/// The element type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DTypeChoice {
    /// The executor's best: float32 on CPU, bfloat16 on CUDA.
    #[default]
    Auto,
    /// IEEE single precision.
    Float32,
    /// IEEE half precision.
    Float16,
    /// bfloat16.
    BFloat16,
}

/// Element type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDType {
    /// The executor's best: float16 on CPU, that of the activations elsewhere.
    #[default]
    Auto,
    /// IEEE half precision. CPU only.
    Float16,
    /// 8-bit integers with a scale for each token, head and 32 dimensions. CPU only.
    Q8_0,
}

/// What float weights are rounded to at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 8-bit integers with a scale per 32.
    Q8_0,
    /// 4-bit integers with a scale per 32.
    Q4_0,
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The safetensors or GGUF files at the model path.
    #[default]
    Auto,
    /// Seeded random weights of the model's dimensions; only config.json is read. For benchmarks.
    Dummy,
}

/// Who goes first when there is not room for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SchedulingPolicy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// The lowest [`crate::GenerateRequest::priority`]; among equals, first come, first served.
    Priority,
}

/// Options of [`crate::Engine::load`]. The default serves any model on any machine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where the model runs.
    pub device: DeviceChoice,
    /// Element type of weights and activations.
    pub dtype: DTypeChoice,
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// Rounds the float weights of projections at load; `None` keeps them. CPU only.
    pub quantization: Option<Quantization>,
    /// Longest prompt + output in tokens; `None` takes the model's own limit, lowered to what the KV cache holds.
    pub max_model_len: Option<usize>,
    /// Most sequences in one step; `None` lets the executor choose.
    pub max_num_seqs: Option<usize>,
    /// Most tokens (prompt chunks + one per decoding sequence) in one step; `None` lets the executor choose.
    pub max_num_batched_tokens: Option<usize>,
    /// Share of the device's memory that the engine may use, weights included. CUDA only.
    pub gpu_memory_utilization: f32,
    /// Bytes for the KV cache; overrides `gpu_memory_utilization` and the CPU's default.
    pub kv_cache_memory_bytes: Option<usize>,
    /// Element type of the KV cache.
    pub kv_cache_dtype: KvCacheDType,
    /// Reuse the KV pages of equal prompt prefixes.
    pub enable_prefix_caching: bool,
    /// A file with a chat template in place of the model's, or the template itself.
    pub chat_template: Option<String>,
    /// Who waits, and who gives pages back when they run out.
    pub scheduling_policy: SchedulingPolicy,
    /// Seeds dummy weights and requests that carry no seed.
    pub seed: u64,
    /// Label `model_name` of the metrics.
    pub model_name: String,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            dtype: DTypeChoice::Auto,
            load_format: LoadFormat::Auto,
            quantization: None,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            gpu_memory_utilization: 0.9,
            kv_cache_memory_bytes: None,
            kv_cache_dtype: KvCacheDType::Auto,
            enable_prefix_caching: true,
            chat_template: None,
            scheduling_policy: SchedulingPolicy::Fcfs,
            seed: 0,
            model_name: "default".into(),
        }
    }
}
