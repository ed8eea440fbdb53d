//! `ember generate`: continues prompts without a server, as one batch.

use std::{
    io::{BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use clap::Args;
use ember_engine::{Engine, Prompt, SamplingParams, text::ChatOptions};
use serde::Serialize;
use serde_json::json;

use super::engine_args::EngineArgs;
use crate::{Backend, Error};

/// Options of `ember generate`, as typed.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A Hugging Face model folder or a GGUF file.
    pub model: PathBuf,

    /// A prompt; may be given several times.
    #[arg(long, required_unless_present = "file", value_name = "TEXT", help_heading = "Prompts")]
    pub prompt: Vec<String>,

    /// A file with one prompt per line; empty lines are skipped.
    #[arg(long, value_name = "PATH", help_heading = "Prompts")]
    pub file: Option<PathBuf>,

    /// Treat each prompt as a user's message and let the assistant answer.
    #[arg(long, help_heading = "Prompts")]
    pub chat: bool,

    /// Most output tokens of each prompt.
    #[arg(long, default_value_t = 16, help_heading = "Sampling")]
    pub max_tokens: u32,

    /// 0 is greedy [default: the model's own].
    #[arg(long, help_heading = "Sampling")]
    pub temperature: Option<f32>,

    /// Nucleus sampling [default: the model's own].
    #[arg(long, help_heading = "Sampling")]
    pub top_p: Option<f32>,

    /// One JSON object per prompt instead of text.
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    text: &'a str,
    finish_reason: ember_common::FinishReason,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// Runs the batch.
///
/// # Errors
/// What the operator has to mend.
pub fn run(args: GenerateArgs) -> Result<ExitCode, Error> {
    let config = args.engine.resolve(&args.model.display().to_string())?;
    let texts = read_prompts(&args)?;
    let engine = Engine::load(&args.model, config)?;
    eprintln!("{}: {}", engine.info().architecture, engine.info().executor);
    let prompts = texts.iter().map(|text| prompt(&engine, text, args.chat)).collect::<Result<Vec<_>, Error>>()?;
    let defaults = Engine::default_sampling_params(&engine);
    let params = SamplingParams {
        max_tokens: Some(args.max_tokens),
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        ..defaults.clone()
    };
    let started = Instant::now();
    let outputs = engine.generate(prompts, &params)?;
    let seconds = started.elapsed().as_secs_f64();

    let mut out = BufWriter::new(std::io::stdout().lock());
    for output in &outputs {
        let prompt = &texts[output.prompt_index];
        if args.json {
            let line = Line {
                prompt,
                text: &output.text,
                finish_reason: output.finish.reason,
                prompt_tokens: output.prompt_token_ids.len(),
                completion_tokens: output.token_ids.len(),
            };
            serde_json::to_writer(&mut out, &line).map_err(std::io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "Prompt: {prompt:?}\nGenerated text: {:?}\n", output.text)?;
        }
    }
    out.flush()?;
    let n_prompt: usize = outputs.iter().map(|output| output.prompt_token_ids.len()).sum();
    let n_output: usize = outputs.iter().map(|output| output.token_ids.len()).sum();
    eprintln!(
        "{} prompts, {n_prompt} prompt tokens, {n_output} output tokens in {seconds:.2} s: {:.1} output tokens/s",
        texts.len(),
        n_output as f64 / seconds.max(f64::EPSILON)
    );
    Ok(ExitCode::SUCCESS)
}

fn read_prompts(args: &GenerateArgs) -> Result<Vec<String>, Error> {
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.file {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.clone(), source })?;
        prompts.extend(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
    }
    if prompts.is_empty() {
        return Err(Error::config("--file", "the file has no prompts: every line is empty"));
    }
    Ok(prompts)
}

fn prompt(engine: &Engine, text: &str, chat: bool) -> Result<Prompt, Error> {
    if !chat {
        return Ok(Prompt::Text(text.to_owned()));
    }
    let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
    let rendered = engine.render_chat(&[json!({"role": "user", "content": text})], &options)?;
    Ok(Prompt::Tokens(engine.encode_with_special(&rendered)?))
}
