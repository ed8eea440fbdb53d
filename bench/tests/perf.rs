//! Runs `perf` against a scripted server over real sockets and checks what it records.

mod common;

use std::time::{Duration, Instant};

use clap::Parser;
use common::{Script, Server, Step, send, wait_ms};
use ember_bench::cli::{Cli, Command};
use ember_bench::config::Config;
use ember_bench::report::Report;
use ember_bench::{Error, perf, store::Store};
use tempfile::TempDir;

const WHOLE: &str = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}"#;
const ROLE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

fn delta(text: &str, finish_reason: &str) -> Step {
    send(&format!(
        "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":{finish_reason}}}]}}\n\n"
    ))
}

/// Role, then three tokens 30 ms apart, then usage.
fn three_tokens(_request_idx: usize) -> Script {
    let steps = vec![
        send(ROLE),
        wait_ms(40),
        delta("a", "null"),
        wait_ms(30),
        delta("b", "null"),
        wait_ms(30),
        delta("c", "\"stop\""),
        send(USAGE),
        send(DONE),
    ];
    Script::sse(steps)
}

async fn run_in(folder: &TempDir, server: &Server, flags: &str) -> Result<Vec<Report>, Error> {
    let (url, db) = (server.url(), folder.path().join("results.db"));
    let db = db.display();
    let line = format!("ember-bench perf --model m --url {url} --db {db} --prompt hi --max-tokens 3 {flags}");
    match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
        Command::Perf(args) => perf::command(Config::new(*args)?).await,
        Command::Report(_) => unreachable!("perf was asked for"),
    }
}

async fn run(server: &Server, flags: &str) -> Report {
    run_in(&tempfile::tempdir().unwrap(), server, flags).await.unwrap().remove(0)
}

async fn only_error(script: fn(usize) -> Script, flags: &str) -> String {
    let server = Server::start(script).await;
    let report = run(&server, &format!("-n 1 {flags}")).await;
    assert_eq!((report.summary.succeeded, report.summary.failed), (0, 1));
    assert_eq!(report.summary.errors.len(), 1);
    report.summary.errors.into_keys().next().unwrap()
}

fn near(value: Option<f64>, expected: f64) {
    let value = value.expect("there is a value");
    assert!((expected * 0.9..expected + 0.03).contains(&value), "{value} is not near {expected}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_timed_token_by_token() {
    let server = Server::start(three_tokens).await;
    let summary = run(&server, "-n 4 --parallel 2").await.summary;
    assert_eq!((summary.total_requests, summary.succeeded, summary.failed), (4, 4, 0));
    assert_eq!((summary.avg_input_tokens, summary.avg_output_tokens), (Some(7.0), Some(3.0)));
    near(summary.avg_ttft_s, 0.040);
    near(summary.avg_latency_s, 0.100);
    near(summary.avg_tpot_s, 0.030);
    near(summary.avg_itl_s, 0.030);
    near(Some(summary.wall_s), 0.200);
    assert!(summary.avg_evalscope_ttft_s.unwrap() < 0.030, "the empty role message counts for EvalScope's TTFT");
    assert_eq!(summary.avg_packages, Some(5.0));
    // Of the five messages the first and last do not count: from the role's to the third token's, three packages.
    near(summary.avg_package_latency_s, 0.100 / 3.0);
    let connections: std::collections::HashSet<usize> = server.seen().iter().map(|seen| seen.connection).collect();
    assert_eq!(connections.len(), 2, "each worker keeps its connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_has_a_latency_and_no_tpot() {
    let server = Server::start(|_| Script { head_delay: Duration::from_millis(50), ..Script::json(200, WHOLE) }).await;
    let summary = run(&server, "-n 2 --no-stream").await.summary;
    near(summary.avg_latency_s, 0.050);
    assert_eq!(summary.avg_ttft_s, summary.avg_latency_s);
    assert_eq!((summary.avg_tpot_s, summary.avg_itl_s, summary.streamed), (None, None, 0));
    near(summary.wall_per_output_token_s, 0.100 / 6.0);
    assert_eq!(server.seen()[0].body["stream"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_carry_the_flags() {
    let server = Server::start(|_| Script::json(200, WHOLE)).await;
    run(&server, "-n 1 --api-key k --seed 5 --ignore-eos --min-tokens 3 --extra-args {\"x\":1}").await;
    let seen = &server.seen()[0];
    assert_eq!((seen.path.as_str(), seen.authorization.as_deref()), ("/v1/chat/completions", Some("Bearer k")));
    insta::assert_json_snapshot!("sent_body", seen.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_recorded_with_their_cause() {
    let bad_request = |_| Script::json(400, r#"{"error":{"message":"too long","type":"BadRequestError","code":400}}"#);
    assert_eq!(only_error(bad_request, "").await, "HTTP 400: too long");
    let plain = |_| Script { content_type: "text/plain", ..Script::json(502, "bad gateway") };
    assert_eq!(only_error(plain, "").await, "HTTP 502: bad gateway");
    let error_object =
        |_| Script::sse(vec![delta("a", "null"), send("data: {\"error\":{\"message\":\"died\"}}\n\n"), send(DONE)]);
    assert_eq!(only_error(error_object, "").await, "died");
    assert_eq!(only_error(|_| Script::sse(vec![send(DONE)]), "").await, "the stream has no choices");
    assert_eq!(only_error(|_| Script::sse(vec![send(USAGE), send(DONE)]), "").await, "the stream has no choices");
    let cut_short = |_| Script::sse(vec![delta("a", "null")]);
    assert_eq!(only_error(cut_short, "").await, "the stream ended before its finish_reason or [DONE]");
    let whole = |_| Script::json(200, "{\"object\":\"chat.completion\"}");
    assert_eq!(only_error(whole, "--no-stream").await, "the answer has no choices");
    let hang_up = |_| Script::sse(vec![delta("a", "null"), wait_ms(10), Step::HangUp]);
    let error = only_error(hang_up, "").await;
    assert!(error.contains("hung up") || error.starts_with("read: "), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_answers_run_into_their_limits() {
    let silent = |_| Script::sse(vec![delta("a", "null"), wait_ms(5_000)]);
    assert_eq!(only_error(silent, "--read-timeout 0.1").await, "read timeout: silent for 0.1 s");
    assert_eq!(only_error(silent, "--total-timeout 0.1").await, "total timeout after 0.1 s");
    let slow_head = |_| Script { head_delay: Duration::from_secs(5), ..Script::json(200, WHOLE) };
    assert_eq!(only_error(slow_head, "--read-timeout 0.1").await, "read timeout: silent for 0.1 s");
    // Slow, but never silent for as long as the limit.
    let server = Server::start(three_tokens).await;
    assert_eq!(run(&server, "-n 1 --read-timeout 0.2").await.summary.succeeded, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_does_not_disturb_the_next_request() {
    let script = |i| {
        if i == 0 { Script::sse(vec![delta("a", "null"), Step::HangUp]) } else { three_tokens(i) }
    };
    let server = Server::start(script).await;
    let summary = run(&server, "-n 3").await.summary;
    assert_eq!((summary.succeeded, summary.failed), (2, 1));
    near(summary.avg_latency_s, 0.100);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_counts_the_wait_for_a_slow_server() {
    // One request at a time of 60 ms, 100 a second due: each waits for all before it.
    let slow = |_| Script { head_delay: Duration::from_millis(60), ..Script::json(200, WHOLE) };
    let server = Server::start(slow).await;
    let capped = run(&server, "-n 8 --rate 100 --parallel 1 --no-stream").await.summary;
    assert!(capped.percentiles.latency.0[7].unwrap() > 0.25, "{:?}", capped.percentiles.latency);
    assert!(capped.percentiles.lag.0[7].unwrap() > 0.2, "{:?}", capped.percentiles.lag);
    let free = run(&server, "-n 8 --rate 100 --no-stream").await.summary;
    assert!(free.percentiles.latency.0[7].unwrap() < 0.2, "{:?}", free.percentiles.latency);
    assert!(free.percentiles.lag.0[7].unwrap() < 0.1, "{:?}", free.percentiles.lag);
    assert_eq!((capped.parallel, free.parallel, free.rate), (Some(1), None, Some(100.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_up_is_left_out_and_sweeps_do_not_repeat_prompts() {
    let server = Server::start(|_| Script::json(200, WHOLE)).await;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("lines.txt");
    std::fs::write(&data, (0..20).map(|i| format!("prompt {i}\n")).collect::<String>()).unwrap();
    let line = format!(
        "ember-bench perf --model m --url {} --db {} --dataset custom --dataset-path {} -n 3,4 --parallel 1,2 --warmup 2",
        server.url(),
        folder.path().join("r.db").display(),
        data.display()
    );
    let Command::Perf(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { unreachable!() };
    let reports = perf::command(Config::new(*args).unwrap()).await.unwrap();
    let totals: Vec<usize> = reports.iter().map(|report| report.summary.total_requests).collect();
    assert_eq!(totals, [3, 4]);
    let mut prompts: Vec<String> =
        server.seen().iter().map(|seen| seen.body["messages"][0]["content"].as_str().unwrap().to_owned()).collect();
    assert_eq!(prompts.len(), 11);
    prompts.sort();
    prompts.dedup();
    assert_eq!(prompts.len(), 11, "no prompt was sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn random_prompts_go_as_token_ids_with_exact_lengths() {
    let server =
        Server::start(|_| Script::json(200, r#"{"choices":[{"index":0,"text":"x","finish_reason":"length"}]}"#)).await;
    let folder = tempfile::tempdir().unwrap();
    let line = format!(
        "ember-bench perf --model m --url {} --db {} -n 5 --dataset random --random-vocab-size 90 \
         --min-prompt-length 4 --max-prompt-length 4 --min-tokens 2 --max-tokens 6",
        server.url(),
        folder.path().join("r.db").display()
    );
    let Command::Perf(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { unreachable!() };
    let reports = perf::command(Config::new(*args).unwrap()).await.unwrap();
    assert_eq!((reports[0].summary.succeeded, reports[0].summary.without_usage), (5, 5));
    for seen in server.seen() {
        assert_eq!(seen.path, "/v1/completions");
        assert_eq!(seen.body["prompt"].as_array().unwrap().len(), 4);
        assert_eq!(seen.body["ignore_eos"], true);
        assert_eq!(seen.body["min_tokens"], seen.body["max_tokens"]);
        assert!((2..=6).contains(&seen.body["max_tokens"].as_u64().unwrap()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_run_reports_the_same_again() {
    let server = Server::start(three_tokens).await;
    let folder = tempfile::tempdir().unwrap();
    let first = run_in(&folder, &server, "-n 2").await.unwrap().remove(0);
    let second = run_in(&folder, &server, "-n 1").await.unwrap().remove(0);
    assert_eq!((first.summary.run_id, second.summary.run_id), (1, 2), "runs are added to a database");
    let mut store = Store::open(&folder.path().join("results.db")).await.unwrap();
    let run = store.runs(Some(1)).await.unwrap().remove(0);
    assert_eq!(run, first.run);
    assert_eq!(run.config["max_tokens"][0], 3);
    let again = ember_bench::report::load(&mut store, run).await.unwrap();
    assert_eq!(ember_bench::report::json(&[again]), ember_bench::report::json(&[first]));
    let message = store.runs(Some(9)).await.unwrap_err().to_string();
    assert!(message.contains("no run 9"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_where_nobody_listens_is_an_error() {
    let server = Server { address: "127.0.0.1:9".parse().unwrap(), seen: Default::default() };
    let started = Instant::now();
    let error = run_in(&tempfile::tempdir().unwrap(), &server, "-n 1").await.unwrap_err().to_string();
    assert!(error.starts_with("cannot connect to 127.0.0.1:9: "), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn length_limits_do_not_make_synthetic_prompts_repeat() {
    let server = Server::start(|_| Script::json(200, WHOLE)).await;
    let cache = tempfile::tempdir().unwrap();
    let perf = |flags: &str| {
        let line = format!(
            "perf --model m --url {} --db {} --no-stream --dataset longalpaca --max-tokens 3 --parallel 8 {flags}",
            server.url(),
            cache.path().join("results.db").display()
        );
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ember-bench"));
        command.args(line.split_whitespace()).env("XDG_CACHE_HOME", cache.path());
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    // Of the generator's smallest file, 64 rows, about a quarter is as short.
    let output = perf("--max-prompt-length 2000 -n 60").await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let prompts: Vec<String> =
        server.seen().iter().map(|seen| seen.body["messages"][0]["content"].as_str().unwrap().to_owned()).collect();
    let distinct: std::collections::HashSet<&String> = prompts.iter().collect();
    assert_eq!((prompts.len(), distinct.len()), (60, 60));
    assert!(prompts.iter().all(|prompt| prompt.chars().count() <= 2000));
    let output = perf("--max-prompt-length 3 -n 60").await.unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && message.contains("none of 4096 synthetic rows of longalpaca"), "{message}");
    assert_eq!(server.seen().len(), 60);
}
