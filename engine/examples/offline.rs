//! Offline inference: four prompts through one engine.
//!
//! `cargo run --release -p ember-engine --example offline -- MODEL`

use ember_engine::{Engine, EngineConfig, SamplingParams};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: offline MODEL (a folder or a GGUF file)")?;
    let prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ];
    let params = SamplingParams { temperature: 0.8, top_p: 0.95, max_tokens: Some(16), ..Default::default() };

    let engine = Engine::load(model, EngineConfig::default())?;
    for output in engine.generate(prompts, &params)? {
        println!("Prompt: {:?}, Generated text: {:?}", prompts[output.prompt_index], output.text);
    }
    Ok(())
}
