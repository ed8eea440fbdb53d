//! Clients that hang up midway: their pages come back, nobody else notices, memory stays.
//!
//! `EMBER_TEST_MODEL=model.gguf cargo test --release -p ember-server --test real hang_up -- --nocapture` runs the same
//! on a real model, `EMBER_TEST_ROUNDS` sets its length.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use ember_common::openai::CompletionChunk;
use futures_util::future::join_all;
use http_body_util::BodyExt;
use serde_json::json;

use crate::server::Server;

const N_CLIENTS: usize = 64;
/// Every so manyth client hangs up.
const HANGS_UP: usize = 4;
/// Unless `EMBER_TEST_ROUNDS` says otherwise. Memory is looked at in the second half.
const N_ROUNDS: usize = 48;
/// From the third to the last quarter of the rounds; a leak of 2 KiB a request would be larger.
const MAX_GROWTH_BYTES: f64 = (1 << 20) as f64;

/// Streams one completion of `n_tokens` tokens, of which the client reads `n_read`; returns how many came.
async fn client(server: &Server, prompt: String, n_tokens: usize, n_read: usize) -> usize {
    let body = json!({
        "prompt": prompt, "stream": true, "max_tokens": n_tokens, "ignore_eos": true, "return_token_ids": true,
        "stream_options": {"include_usage": true}
    });
    let response = server.post("/v1/completions", &body).await;
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let (mut pending, mut n_seen, mut usage, mut finish, mut done) = (String::new(), 0, None, None, false);
    while n_seen < n_read || n_read == n_tokens {
        let Some(frame) = body.frame().await else { break };
        pending.push_str(std::str::from_utf8(&frame.unwrap().into_data().unwrap()).unwrap());
        while let Some((event, rest)) = pending.split_once("\n\n") {
            let data = event.strip_prefix("data: ").unwrap();
            if data == "[DONE]" {
                done = true;
            } else {
                let chunk: CompletionChunk = serde_json::from_str(data).unwrap();
                usage = chunk.usage.or(usage);
                for choice in chunk.choices {
                    n_seen += choice.token_ids.map_or(0, |ids| ids.len());
                    finish = choice.finish_reason.or(finish);
                }
            }
            pending = rest.to_owned();
        }
    }
    if n_read == n_tokens {
        assert!(done && pending.is_empty(), "the stream ends with [DONE]");
        assert_eq!(usage.expect("asked for").completion_tokens, n_tokens);
        assert_eq!(finish, Some(ember_common::FinishReason::Length));
        assert_eq!(n_seen, n_tokens);
    }
    n_seen
}

/// All clients at once; returns how long it took until every page was free again.
async fn round(server: &Server) -> Duration {
    let clients = (0..N_CLIENTS).map(|i| {
        // Lengths, and with them ends, are spread. The same prompts in every round: the tokenizer's cache of
        // words (10,000 at most) is not what is measured.
        let prompt = format!("{i}: {}", "and so on ".repeat(i % 7));
        let n_tokens = 24 + (i * 7) % 40;
        match i % HANGS_UP {
            // Far from the end, so that few are through before the server notices.
            0 => client(server, prompt, 400, n_tokens / 2),
            _ => client(server, prompt, n_tokens, n_tokens),
        }
    });
    join_all(clients).await;
    let ended = Instant::now();
    while server.metric("vllm:kv_cache_usage_perc", "").await > 0.0 {
        assert!(ended.elapsed() < Duration::from_secs(5), "pages are lost:\n{}", server.get("/metrics").await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for gauge in ["vllm:num_requests_running", "vllm:num_requests_waiting"] {
        assert_eq!(server.metric(gauge, "").await, 0.0, "{gauge}");
    }
    ended.elapsed()
}

#[tokio::test]
async fn clients_that_hang_up_cost_nobody_anything() {
    // Fewer places than clients and too few pages for all: some wait, some are preempted.
    let server = match std::env::var_os("EMBER_TEST_MODEL") {
        // A cache that the first rounds touch in full: resident memory grows until they have.
        Some(model) => Server::start(Path::new(&model), &["--max-num-seqs", "48", "--kv-cache-memory-bytes", "128M"]),
        None => Server::tiny(&["--max-num-seqs", "48", "--kv-cache-memory-bytes", "400K"]),
    };
    let n_rounds = std::env::var("EMBER_TEST_ROUNDS").map_or(N_ROUNDS, |n| n.parse().unwrap());
    let mut resident = Vec::new();
    for number in 0..n_rounds {
        let started = Instant::now();
        let until_free = round(&server).await;
        resident.push(server.resident_bytes() as f64);
        println!(
            "round {number}: {:.2} s, pages free {:.1} ms after the last answer, resident {:.1} MiB",
            started.elapsed().as_secs_f64(),
            until_free.as_secs_f64() * 1e3,
            resident[number] / f64::from(1 << 20)
        );
    }
    let n_cut = N_CLIENTS / HANGS_UP;
    let ends = |reason| server.metric("vllm:request_success_total", reason);
    let (n_whole, n_aborted) = (ends("length").await, ends("abort").await);
    assert_eq!(n_whole + n_aborted, (n_rounds * N_CLIENTS) as f64);
    // What was sent whole into a socket that nobody reads any more counts as finished.
    assert!(n_aborted <= (n_rounds * n_cut) as f64 && n_aborted > (n_rounds * n_cut) as f64 / 2.0, "{n_aborted}");
    let preemptions = server.metric("vllm:num_preemptions_total", "").await;
    println!("{preemptions} preemptions");
    assert!(preemptions > 0.0 || std::env::var_os("EMBER_TEST_MODEL").is_some());
    let quarter = n_rounds / 4;
    let mean = |rounds: &[f64]| rounds.iter().sum::<f64>() / rounds.len() as f64;
    let grown = mean(&resident[3 * quarter..]) - mean(&resident[2 * quarter..3 * quarter]);
    assert!(grown < MAX_GROWTH_BYTES, "resident memory grew by {grown} bytes: {resident:?}");
}
