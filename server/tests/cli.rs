//! The command line: what it comes to and how it refuses.

use std::path::PathBuf;

use ember_engine::{DTypeChoice, DeviceChoice, LoadFormat};
use ember_server::{Error, cli::Cli, commands::Command, config::ServeConfig};

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
    assert_eq!((config.host.as_str(), config.port), ("0.0.0.0", 8000));
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
