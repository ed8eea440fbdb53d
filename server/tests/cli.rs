//! The command line: what it comes to and how it refuses.

use std::path::PathBuf;

use ember_engine::{DTypeChoice, DeviceChoice, LoadFormat};
use ember_server::{
    Error,
    cli::Cli,
    commands::Command,
    config::{Listen, ServeConfig},
};

fn serve(args: &[&str]) -> Result<ServeConfig, Error> {
    let cli = Cli::try_from_args(["ember", "serve"].into_iter().chain(args.iter().copied()));
    match cli.unwrap_or_else(|error| panic!("{error}")).command {
        Command::Serve(args) => args.resolve(),
        other => panic!("{other:?}"),
    }
}

fn usage_error(args: &[&str]) -> String {
    Cli::try_from_args(["ember"].iter().chain(args).copied()).map(|cli| format!("{cli:?}")).unwrap_err().to_string()
}

#[test]
fn defaults() {
    let config = serve(&["some/model"]).unwrap();
    assert_eq!(config.model, PathBuf::from("some/model"));
    assert_eq!(config.listen, Listen::Tcp("0.0.0.0".into(), 8000));
    assert_eq!(config.app.served_model_names, ["some/model"]);
    assert!(config.app.api_keys.is_empty());
    assert_eq!(config.shutdown_timeout.as_secs(), 30);
    assert_eq!(config.engine.max_model_len, None);
    assert!(config.engine.enable_prefix_caching);
    assert_eq!(config.engine.gpu_memory_utilization, 0.9);
}

#[test]
fn options() {
    let config = serve(&[
        "m",
        "--served-model-name",
        "a",
        "b",
        "--api-key",
        "k1",
        "k2",
        "--max_model_len=8K",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--load-format",
        "dummy",
        "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes",
        "4G",
        "--max-num-queued-reqs",
        "7",
    ])
    .unwrap();
    assert_eq!(config.app.served_model_names, ["a", "b"]);
    assert_eq!(config.app.api_keys, ["k1", "k2"]);
    assert_eq!(config.app.max_num_queued_reqs, Some(7));
    assert_eq!(config.engine.model_name, "a");
    assert_eq!(config.engine.max_model_len, Some(8192));
    assert_eq!(config.engine.device, DeviceChoice::Cpu);
    assert_eq!(config.engine.dtype, DTypeChoice::Float32);
    assert_eq!(config.engine.load_format, LoadFormat::Dummy);
    assert_eq!(config.engine.kv_cache_memory_bytes, Some(4 << 30));
    assert!(!config.engine.enable_prefix_caching);
    assert_eq!(serve(&["m", "--max-model-len", "-1"]).unwrap().engine.max_model_len, None);
}

#[test]
fn wrong_values_name_their_flag() {
    for (args, flag) in [
        (&["--gpu-memory-utilization", "1.5"][..], "--gpu-memory-utilization"),
        (&["--gpu-memory-utilization", "NaN"], "--gpu-memory-utilization"),
        (&["--max-num-seqs", "0"], "--max-num-seqs"),
        (&["--max-model-len", "0"], "--max-model-len"),
        (&["--stream-interval", "0"], "--stream-interval"),
        (&["--served-model-name", ""], "--served-model-name"),
        (&["--enable-auto-tool-choice"], "--enable-auto-tool-choice"),
        (&["--root-path", "llm"], "--root-path"),
        (&["--allowed-origins", "[1]"], "--allowed-origins"),
        (&["--request-timeout", "0"], "--request-timeout"),
        (&["--write-timeout=-1"], "--write-timeout"),
    ] {
        let error = serve(&[&["m"], args].concat()).unwrap_err().to_string();
        assert!(error.starts_with(flag), "{args:?}: {error}");
    }
    assert!(usage_error(&["serve", "m", "--max-model-len", "8x"]).contains("8k (8000) or 8K (8192)"));
    assert!(usage_error(&["serve", "m", "--device", "tpu"]).contains("auto, cpu, cuda or cuda:N"));
    assert!(usage_error(&["serve", "m", "--max-model-length", "5"]).contains("--max-model-len"));
    assert!(usage_error(&["generate", "m"]).contains("--prompt"));
    assert!(usage_error(&["serve"]).contains("<MODEL>"));
}

#[test]
fn transport_options() {
    let config = serve(&[
        "m",
        "--uds",
        "/run/ember.sock",
        "--root-path",
        "/llm/",
        "--allowed-origins",
        r#"["https://a.example"]"#,
        "--ssl-certfile",
        "c.pem",
        "--ssl-keyfile",
        "k.pem",
        "--request-timeout",
        "0.5",
        "--sse-keep-alive-interval",
        "2",
        "--tool-call-parser",
        "llama3_json",
        "--enable-auto-tool-choice",
        "--reasoning-parser",
        "qwen3",
        "--scheduling-policy",
        "priority",
    ])
    .unwrap();
    assert_eq!(config.listen, Listen::Unix("/run/ember.sock".into()));
    assert_eq!(config.app.root_path, "/llm");
    assert!(config.app.cors.is_some());
    assert_eq!(config.tls, Some(("c.pem".into(), "k.pem".into())));
    assert_eq!(config.app.request_timeout, Some(std::time::Duration::from_millis(500)));
    assert_eq!(config.app.sse_keep_alive_interval, Some(std::time::Duration::from_secs(2)));
    assert_eq!(config.write_timeout.as_secs(), 60);
    assert_eq!(config.app.tool_call_parser.unwrap().name, "llama3_json");
    assert_eq!(config.app.reasoning_parser.unwrap().name, "qwen3");
    assert_eq!(config.engine.scheduling_policy, ember_engine::SchedulingPolicy::Priority);
    assert!(serve(&["m"]).unwrap().app.cors.is_none());
    for (args, part) in [
        (&["--tool-call-parser", "pythonic"][..], "no parser `pythonic`: hermes, llama3_json"),
        (&["--reasoning-parser", "x"], "no parser `x`: deepseek_r1, qwen3"),
        (&["--ssl-keyfile", "k.pem"], "--ssl-certfile"),
    ] {
        let error = usage_error(&[&["serve", "m"], args].concat());
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_configuration_file_can_hold_everything() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ember.yaml");
    std::fs::write(&file, "model: some/model\nport: 81\nserved-model-name: [a, b]\nmax_model_len: 8k\n").unwrap();
    let file = file.to_str().unwrap();
    let cli = Cli::try_from_args(["ember", "serve", "--config", file, "--port", "82"]).unwrap();
    let Command::Serve(args) = cli.command else { panic!("serve was asked for") };
    let config = args.resolve().unwrap();
    assert_eq!(config.model, PathBuf::from("some/model"));
    assert_eq!(config.listen, Listen::Tcp("0.0.0.0".into(), 82));
    assert_eq!(config.app.served_model_names, ["a", "b"]);
    assert_eq!(config.engine.max_model_len, Some(8000));
    std::fs::write(file, "max-model-length: 5\n").unwrap();
    let error = usage_error(&["serve", "m", "--config", file]);
    assert!(error.contains("--max-model-length") && error.contains("--max-model-len"), "{error}");
    assert!(usage_error(&["serve", "m", "--config", "/nowhere.yaml"]).contains("/nowhere.yaml"));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_how_to_get_one() {
    let error = serve(&["m", "--device", "cuda:1"]).unwrap_err().to_string();
    assert!(error.starts_with("--device") && error.contains("--features cuda"), "{error}");
}

#[test]
fn the_definition_is_sound() {
    <Cli as clap::CommandFactory>::command().debug_assert();
}
