//! [`Engine`]: loads a model and answers requests. The loop itself is in [`crate::serving`].

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    EngineConfig, Error, Event, GenerateRequest, Generation, Output, Prompt, SamplingParams, SchedulingPolicy,
    executors::{self, Capacity},
    generation::CancelFlag,
    grammar::{Grammar, GrammarCompiler},
    models::{GenerationDefaults, Model},
    sequence::NewSequence,
    serving::{Arrival, Serving, Shared},
    text::{ChatTemplate, Tokenizer},
};

/// Most token sequences that a request's `bad_words` may come to.
const MAX_BAD_WORDS: usize = 128;

/// A loaded model that answers requests until it is dropped.
pub struct Engine {
    info: EngineInfo,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    defaults: SamplingParams,
    eos_token_ids: Arc<[u32]>,
    shared: Arc<Shared>,
    grammars: GrammarCompiler,
    scheduling_policy: SchedulingPolicy,
    seed: u64,
    n_requests: AtomicU64,
    /// `None` once the engine is being dropped.
    arrivals: Option<mpsc::Sender<Arrival>>,
    thread: Option<JoinHandle<()>>,
}

/// What was loaded, and how.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// The model folder or file.
    pub model_path: PathBuf,
    /// Upstream name, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// Parameters of the model.
    pub n_parameters: usize,
    /// Stored element type of most weights, such as `BF16` or `Q4_1`.
    pub file_dtype: String,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Longest prompt + output in tokens.
    pub max_model_len: usize,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Most log-probabilities per position: the vocabulary, or what a device's kernels leave room for.
    pub max_logprobs: usize,
    /// Tokens that the KV cache holds.
    pub n_kv_tokens: usize,
    /// Device, element type and memory plan, in one line.
    pub executor: String,
    /// End-of-sequence tokens, primary first.
    pub eos_token_ids: Vec<u32>,
    /// When the model was loaded, seconds since the Unix epoch.
    pub created: u64,
}

/// The engine's state now and its counters since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences in the batch.
    pub n_running: usize,
    /// Sequences waiting for a place in it.
    pub n_waiting: usize,
    /// KV pages held by sequences.
    pub n_pages_in_use: usize,
    /// KV pages in all.
    pub n_pages: usize,
    /// Prompt tokens looked up in the prefix cache.
    pub n_prefix_queries: u64,
    /// Prompt tokens found there.
    pub n_prefix_hits: u64,
    /// Sequences put back to recompute.
    pub n_preemptions: u64,
    /// Prompt tokens processed.
    pub n_prompt_tokens: u64,
    /// Tokens sampled.
    pub n_generation_tokens: u64,
}

impl Engine {
    /// Loads the model at `source` (a Hugging Face folder or a GGUF file) and starts its thread.
    ///
    /// # Errors
    /// [`Error::Model`] for missing, broken or unsupported files; [`Error::Config`] for options that
    /// cannot be honoured; [`Error::Device`] if the device fails or lacks memory.
    pub fn load(source: impl AsRef<Path>, config: EngineConfig) -> Result<Self, Error> {
        let model = Model::open(source.as_ref(), config.load_format, config.seed)?;
        let Model { path, spec, weights, tokenizer, chat_template, generation, file_dtype } = model;
        let chat_template = match &config.chat_template {
            Some(given) => Some(ChatTemplate::from_file_or_text(given, &tokenizer)?),
            None => chat_template,
        };
        let (vocab_size, n_parameters) = (spec.vocab_size, spec.n_parameters());
        let architecture = spec.architecture.clone();
        let (seed, scheduling_policy) = (config.seed, config.scheduling_policy);

        let shared = Arc::new(Shared::new());
        let (arrivals, inbox) = mpsc::channel();
        let (loaded, wait_loaded) = mpsc::sync_channel::<Result<(Capacity, String), Error>>(1);
        // The executor is made on the thread that uses it: device contexts belong to threads.
        let thread_shared = shared.clone();
        let thread = std::thread::Builder::new()
            .name("ember-engine".into())
            .spawn(move || {
                let executor = match executors::create(&spec, &*weights, &config) {
                    Ok(executor) => executor,
                    Err(error) => return drop(loaded.send(Err(error))),
                };
                drop(weights);
                let capacity = executor.capacity().clone();
                let _ = loaded.send(Ok((capacity, executor.describe())));
                Serving::new(executor, &config, thread_shared).run(&inbox);
            })
            .map_err(|e| Error::Device(format!("cannot start the engine's thread: {e}")))?;
        let (capacity, executor) =
            wait_loaded.recv().map_err(|_| Error::Device("the engine's thread died while loading".into()))??;

        let grammars = GrammarCompiler::new(&tokenizer, &generation.eos_token_ids);
        give_back_freed_memory();
        Ok(Self {
            info: EngineInfo {
                model_path: path,
                architecture,
                n_parameters,
                file_dtype,
                vocab_size,
                max_model_len: capacity.max_model_len,
                max_num_seqs: capacity.max_num_seqs,
                max_num_batched_tokens: capacity.max_num_batched_tokens,
                max_logprobs: capacity.max_logprobs,
                n_kv_tokens: capacity.n_pages * crate::step::PAGE_SIZE,
                executor,
                eos_token_ids: generation.eos_token_ids.clone(),
                created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            },
            tokenizer,
            chat_template,
            defaults: default_sampling_params(&generation),
            eos_token_ids: generation.eos_token_ids.into(),
            shared,
            grammars,
            scheduling_policy,
            seed,
            n_requests: AtomicU64::new(0),
            arrivals: Some(arrivals),
            thread: Some(thread),
        })
    }

    /// Starts one request. Compiles `structured_outputs`, which can take milliseconds.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for parameters out of range or a prompt longer than the context;
    /// [`Error::Stopped`] after a device error.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, Error> {
        let arrived = Instant::now();
        let GenerateRequest { prompt, params, cache_salt, priority } = request;
        params.validate(self.info.vocab_size)?;
        self.check_logprobs(&params)?;
        let prompt: Arc<[u32]> = match prompt {
            Prompt::Text(text) => self.tokenizer.encode(&text, true)?.into(),
            Prompt::Tokens(ids) => ids.into(),
        };
        self.check_prompt(&prompt)?;
        let grammar = params.structured_outputs.as_ref().map(|outputs| self.grammars.compile(outputs)).transpose()?;
        let bad_words: Arc<[Vec<u32>]> = self.bad_words(&params.bad_words)?.into();
        if let Some(error) = self.shared.failure() {
            return Err(Error::Stopped(error.to_string()));
        }

        let n_requests = self.n_requests.fetch_add(1, Ordering::Relaxed);
        let seed = params.seed.unwrap_or_else(|| mix(self.seed ^ mix(n_requests)));
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        let cancels: Vec<CancelFlag> = (0..params.n).map(|_| CancelFlag::default()).collect();
        let generation = Generation::new(prompt.clone(), &params, &self.tokenizer, cancels.clone(), receiver);
        let params = Arc::new(params);
        for (index, cancel) in cancels.into_iter().enumerate() {
            let sequence = NewSequence {
                prompt: prompt.clone(),
                params: params.clone(),
                seed: seed.wrapping_add(index as u64),
                max_len: self.info.max_model_len,
                eos_token_ids: self.eos_token_ids.clone(),
                cache_salt: cache_salt.clone(),
                priority: if self.scheduling_policy == SchedulingPolicy::Priority { priority } else { 0 },
                grammar: grammar.as_ref().map(Grammar::fork),
                bad_words: bad_words.clone(),
            };
            let arrival = Arrival { sequence, index, events: events.clone(), cancel, arrived };
            let arrivals = self.arrivals.as_ref().expect("set until drop");
            arrivals.send(arrival).map_err(|_| Error::Stopped("its thread has ended".into()))?;
        }
        Ok(generation)
    }

    /// The spellings of `words`, each also with a space before it if that is a token of its own.
    fn check_logprobs(&self, params: &SamplingParams) -> Result<(), Error> {
        let most = self.info.max_logprobs;
        for (param, asked) in [("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)] {
            if let Some(asked) = asked.filter(|&asked| asked as usize > most) {
                let message = format!("Requested {param} of {asked}, which is greater than max allowed: {most}");
                return Err(Error::invalid(param, message));
            }
        }
        Ok(())
    }

    fn bad_words(&self, words: &[String]) -> Result<Vec<Vec<u32>>, Error> {
        let mut spellings: Vec<Vec<u32>> = Vec::new();
        for word in words {
            let bare = self.tokenizer.encode(word.trim_start(), false)?;
            let spaced = self.tokenizer.encode(&format!(" {}", word.trim_start()), false)?;
            let is_other_spelling = spaced.len() == bare.len() && spaced.first() != bare.first();
            spellings.push(bare);
            spellings.extend(is_other_spelling.then_some(spaced));
        }
        if spellings.len() > MAX_BAD_WORDS {
            let message =
                format!("bad_words come to {} token sequences, which is more than {MAX_BAD_WORDS}.", spellings.len());
            return Err(Error::invalid("bad_words", message));
        }
        Ok(spellings)
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), Error> {
        let max = self.info.max_model_len;
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "The prompt is empty: it must hold at least one token."));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= self.info.vocab_size) {
            let message = format!("Token id {id} is out of vocabulary (size {}).", self.info.vocab_size);
            return Err(Error::invalid("prompt", message));
        }
        if prompt.len() == max {
            return Err(Error::invalid(
                "max_tokens",
                format!("max_tokens must be at least 1, got 0: the prompt's {max} tokens fill the context."),
            ));
        }
        if prompt.len() > max {
            return Err(Error::invalid(
                "input_tokens",
                format!(
                    "This model's maximum context length is {max} tokens. However, your prompt contains {} input \
                     tokens. Please reduce the length of the input prompt.",
                    prompt.len()
                ),
            ));
        }
        Ok(())
    }

    /// Runs `prompts` to their end and returns the outputs ordered by prompt, then by index. Blocks.
    ///
    /// # Errors
    /// As [`Engine::submit`], and [`Error::Device`].
    pub fn generate(
        &self,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        params: &SamplingParams,
    ) -> Result<Vec<Output>, Error> {
        let generations = prompts
            .into_iter()
            .map(|prompt| self.submit(GenerateRequest::new(prompt, params.clone())))
            .collect::<Result<Vec<_>, _>>()?;
        let mut outputs = Vec::new();
        for (prompt_index, mut generation) in generations.into_iter().enumerate() {
            let mut of_prompt: Vec<Output> = (0..params.n as usize)
                .map(|index| Output {
                    prompt_index,
                    index,
                    prompt_token_ids: generation.prompt_token_ids().clone(),
                    text: String::new(),
                    token_ids: Vec::new(),
                    logprobs: Vec::new(),
                    finish: crate::Finish { reason: ember_common::FinishReason::Abort, stop_reason: None },
                })
                .collect();
            while let Some(event) = generation.blocking_next() {
                if let Event::Delta(delta) = event? {
                    let output = &mut of_prompt[delta.index];
                    output.text.push_str(&delta.text);
                    output.token_ids.extend(delta.token_ids);
                    output.logprobs.extend(delta.logprobs);
                    if let Some(finish) = delta.finish {
                        output.finish = finish;
                    }
                }
            }
            outputs.extend(of_prompt);
        }
        Ok(outputs)
    }

    /// What was loaded.
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// State and counters.
    pub fn stats(&self) -> EngineStats {
        self.shared.stats()
    }

    /// Tokens of each step since the last call, the latest 65,536.
    pub fn take_step_sizes(&self) -> Vec<u32> {
        self.shared.take_step_sizes()
    }

    /// False once the device has failed.
    pub fn is_healthy(&self) -> bool {
        self.shared.failure().is_none()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The model's own defaults (generation_config.json), for fields that a request leaves open.
    pub fn default_sampling_params(&self) -> &SamplingParams {
        &self.defaults
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.arrivals = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn default_sampling_params(model: &GenerationDefaults) -> SamplingParams {
    let base = SamplingParams::default();
    SamplingParams {
        temperature: model.temperature.unwrap_or(base.temperature),
        top_p: model.top_p.unwrap_or(base.top_p),
        top_k: model.top_k.unwrap_or(base.top_k),
        min_p: model.min_p.unwrap_or(base.min_p),
        repetition_penalty: model.repetition_penalty.unwrap_or(base.repetition_penalty),
        max_tokens: model.max_new_tokens,
        ..base
    }
}

/// SplitMix64 (Steele et al. 2014): spreads neighbouring numbers.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Panics of the engine's thread poison nothing worth keeping.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
/// Loading frees some megabytes of metadata and tables, which glibc would keep.
fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's function, which may be called at any time from any thread.
        unsafe { malloc_trim(0) };
    }
}
