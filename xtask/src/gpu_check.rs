//! `cargo xtask gpu-check`: on a GPU machine, correctness, sanitizer and speed in one run, one table with each figure
//! beside its bar. Needs only the binaries of `cargo xtask gpu-pack`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::bench::read_results;
use crate::child::{self, Interrupt, Server, http_get};
use crate::dummy_model::{DummyModel, LLAMA_3_1_8B, QWEN2_0_5B};
use crate::sanitizer::{Sanitizer, Tool};
use crate::table;

const READY_LIMIT: Duration = Duration::from_secs(180);
/// For the driver to write a core dump of the device without its global memory.
const DUMP_LIMIT: Duration = Duration::from_secs(60);

#[derive(Args)]
pub struct GpuCheckArgs {
    /// Folder with the binaries ember and ember-bench.
    #[arg(long, value_name = "DIR")]
    bin_dir: PathBuf,
    /// Folder of the results.
    #[arg(long, value_name = "DIR", default_value = "gpu-results")]
    out: PathBuf,
    /// Which GPUs, with commas between. The sanitizers use all of them, the other parts the first.
    #[arg(long = "gpu", value_name = "N,...", value_delimiter = ',', default_value = "0")]
    gpus: Vec<u32>,
    /// Only these parts.
    #[arg(long, value_delimiter = ',', default_value = "doctor,kernels,reference,memcheck,racecheck,speed")]
    only: Vec<Part>,
    /// Of the speed loads, only those whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    load: String,
    /// The compute-sanitizer to use; racecheck needs that of CUDA 13.5 or a later one. Default: that of CUDA_PATH.
    #[arg(long, value_name = "FILE")]
    sanitizer: Option<PathBuf>,
    /// How long the part `soak` takes.
    #[arg(long, value_name = "MINUTES", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    soak_minutes: u64,
    /// More flags for `ember serve`, split at spaces.
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true)]
    serve_flags: String,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    /// What the machine offers, and a self-test.
    Doctor,
    /// Each kernel against its float32 reference.
    Kernels,
    /// Tiny checkpoints against `transformers` in float32; needs Python with torch and transformers.
    Reference,
    /// The kernel tests under compute-sanitizer's memcheck.
    Memcheck,
    /// The kernel tests under its racecheck.
    Racecheck,
    /// The loads, over HTTP.
    Speed,
    /// Long prompts for minutes on one server, with core dumps of the device: for faults that are rare.
    Soak,
}

/// One load, closed loop over HTTP, with random prompts and forced output lengths.
struct Load {
    name: &'static str,
    model: &'static DummyModel,
    lengths: Lengths,
    parallel: u32,
    number: u32,
    is_streamed: bool,
    draws: Draws,
    bars: &'static [Bar],
}

impl Load {
    /// Whether the part `soak` runs it: long prompts and many sequences.
    fn is_soaked(&self) -> bool {
        matches!(self.lengths, Lengths::Of("longalpaca")) && self.parallel > 1
    }
}

/// How tokens are drawn.
enum Draws {
    /// As load generators do by default.
    Greedy,
    /// At the temperature and top-p that Llama 3.1 comes with.
    TopP,
}

impl Draws {
    /// The flags of `ember-bench perf`, with spaces between.
    fn flags(&self) -> &'static str {
        match self {
            Self::Greedy => "--temperature 0",
            Self::TopP => "--temperature 0.6 --top-p 0.9",
        }
    }
}

/// Tokens of prompts and answers.
enum Lengths {
    /// Of one of ember-bench's distributions.
    Of(&'static str),
    /// All alike: where requests are so few that drawn lengths would decide their median.
    Fixed { prompt: u32, output: u32 },
}

impl Lengths {
    /// The flags of `ember-bench perf`, with spaces between.
    fn flags(&self) -> String {
        match self {
            Self::Of(name) => format!("--length-distribution {name}"),
            Self::Fixed { prompt, output } => format!(
                "--length-distribution uniform --min-prompt-length {prompt} --max-prompt-length {prompt} \
                 --max-tokens {output}"
            ),
        }
    }
}

/// A figure of the result and what it must reach.
struct Bar {
    figure: &'static str,
    /// Where it stands in the result, as a JSON pointer.
    pointer: &'static str,
    /// To the figure's unit: results are in seconds, bars in ms.
    scale: f64,
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

const fn output_tok_s(limit: f64) -> Bar {
    Bar { figure: "output tok/s", pointer: "/output_tok_s", scale: 1.0, limit: Limit::AtLeast(limit) }
}

const fn at_most_ms(figure: &'static str, pointer: &'static str, limit: f64) -> Bar {
    Bar { figure, pointer, scale: 1e3, limit: Limit::AtMost(limit) }
}

const TTFT_P50: &str = "/percentiles/ttft/p50";
const TTFT_P99: &str = "/percentiles/ttft/p99";
const TPOT_P50: &str = "/percentiles/tpot/p50";

/// Grouped by model: each group runs against one server.
const LOADS: &[Load] = &[
    Load {
        name: "openqa p1",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("openqa"),
        parallel: 1,
        number: 6,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[
            output_tok_s(190.0),
            at_most_ms("TTFT p50 ms", TTFT_P50, 11.0),
            at_most_ms("TPOT p50 ms", TPOT_P50, 5.3),
        ],
    },
    Load {
        name: "openqa p16",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("openqa"),
        parallel: 16,
        number: 96,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[output_tok_s(2600.0)],
    },
    Load {
        name: "openqa p128 whole",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("openqa"),
        parallel: 128,
        number: 640,
        is_streamed: false,
        draws: Draws::Greedy,
        bars: &[output_tok_s(15_000.0)],
    },
    Load {
        name: "openqa p128",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("openqa"),
        parallel: 128,
        number: 640,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[
            output_tok_s(14_500.0),
            at_most_ms("TTFT p50 ms", TTFT_P50, 80.0),
            at_most_ms("TTFT p99 ms", TTFT_P99, 300.0),
        ],
    },
    Load {
        name: "openqa p128 top-p",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("openqa"),
        parallel: 128,
        number: 640,
        is_streamed: true,
        draws: Draws::TopP,
        bars: &[output_tok_s(14_500.0)],
    },
    Load {
        name: "longalpaca p1",
        model: &LLAMA_3_1_8B,
        // The means of the load that the bar comes from.
        lengths: Lengths::Fixed { prompt: 9679, output: 343 },
        parallel: 1,
        number: 4,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[output_tok_s(150.0), at_most_ms("TTFT p50 ms", TTFT_P50, 260.0)],
    },
    Load {
        name: "longalpaca p16",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("longalpaca"),
        parallel: 16,
        number: 48,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[output_tok_s(620.0)],
    },
    Load {
        name: "longalpaca p128",
        model: &LLAMA_3_1_8B,
        lengths: Lengths::Of("longalpaca"),
        parallel: 128,
        number: 192,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[output_tok_s(750.0)],
    },
    Load {
        name: "qwen2-0.5b openqa p1",
        model: &QWEN2_0_5B,
        lengths: Lengths::Of("openqa"),
        parallel: 1,
        number: 6,
        is_streamed: true,
        draws: Draws::Greedy,
        bars: &[output_tok_s(900.0)],
    },
];

/// Of the large model's server, before any load. A first start also compiles the kernels.
const READY_COLD_S: Limit = Limit::AtMost(20.0);
const READY_WARM_S: Limit = Limit::AtMost(8.0);
const KV_TOKENS: Limit = Limit::AtLeast(440_000.0);

/// The rows of the final table, and whether all of them are good.
#[derive(Default)]
struct Outcome {
    rows: Vec<Vec<String>>,
    n_missed: usize,
}

impl Outcome {
    fn add(&mut self, check: &str, figure: &str, measured: Option<f64>, limit: Limit) {
        let (is_met, bar) = match limit {
            Limit::AtLeast(bar) => (measured.is_some_and(|it| it >= bar), format!(">= {bar}")),
            Limit::AtMost(bar) => (measured.is_some_and(|it| it <= bar), format!("<= {bar}")),
        };
        let shown = match measured {
            Some(it) if it < 100.0 => format!("{it:.2}"),
            Some(it) => format!("{it:.0}"),
            None => "-".to_owned(),
        };
        self.add_row([check, figure, &shown, &bar], is_met);
    }

    fn add_verdict(&mut self, check: &str, res: Result<()>) {
        if let Err(err) = &res {
            eprintln!("{check}: {err:#}");
        }
        self.add_row([check, "passes", if res.is_ok() { "yes" } else { "no" }, "yes"], res.is_ok());
    }

    fn add_row(&mut self, cells: [&str; 4], is_met: bool) {
        let mut row: Vec<_> = cells.iter().map(|it| it.to_string()).collect();
        row.push(if is_met { "ok" } else { "MISSED" }.to_owned());
        self.rows.push(row);
        self.n_missed += usize::from(!is_met);
    }
}

pub fn run(args: &GpuCheckArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    let check = Check { args, interrupt, results: Default::default() };
    let mut outcome = Outcome::default();
    if args.only.contains(&Part::Doctor) {
        outcome.add_verdict("doctor", check.ember(&["doctor", "--device", "cuda:0"]));
    }
    if args.only.contains(&Part::Kernels) {
        outcome.add_verdict("kernel tests", check.ember(&["cuda-test"]));
    }
    if args.only.contains(&Part::Reference) {
        outcome.add_verdict("transformers", check.reference());
    }
    for (part, tool) in [(Part::Memcheck, Tool::Memcheck), (Part::Racecheck, Tool::Racecheck)] {
        if args.only.contains(&part) {
            outcome.add_verdict(tool.name(), check.sanitize(tool));
        }
    }
    if args.only.contains(&Part::Speed) {
        check.speed(&mut outcome)?;
    }
    if args.only.contains(&Part::Soak) {
        outcome.add_verdict("soak", check.soak());
    }
    let text = table::markdown(&["check", "figure", "measured", "bar", "result"], &outcome.rows);
    fs::write(args.out.join("gpu-check.md"), &text)?;
    let results: Vec<_> =
        check.results.into_inner().into_iter().map(|(load, it)| json!({ "load": load, "result": it })).collect();
    // A run of other parts leaves what the loads before it measured.
    if !results.is_empty() {
        fs::write(args.out.join("gpu-check.json"), serde_json::to_string_pretty(&results)? + "\n")?;
    }
    println!("\n{text}");
    if outcome.n_missed > 0 {
        bail!("{} of {} figures missed their bar", outcome.n_missed, outcome.rows.len());
    }
    Ok(())
}

struct Check<'a> {
    args: &'a GpuCheckArgs,
    interrupt: Interrupt,
    /// By load, the raw result.
    results: std::cell::RefCell<BTreeMap<&'static str, Value>>,
}

impl Check<'_> {
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("CUDA_VISIBLE_DEVICES", self.args.gpus[0].to_string());
        command
    }

    fn ember(&self, args: &[&str]) -> Result<()> {
        println!("\n== ember {}", args.join(" "));
        let mut command = self.command(&self.args.bin_dir.join("ember"));
        child::run_ok(command.args(args), &self.interrupt, &format!("ember {}", args[0]))
    }

    fn reference(&self) -> Result<()> {
        println!("\n== against transformers");
        let dir = self.args.out.join("reference");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let script = dir.join("transformers_check.py");
        fs::write(&script, include_str!("../reference/transformers_check.py"))?;
        let mut command = self.command(Path::new("python3"));
        command.arg(&script).arg(self.args.bin_dir.join("ember")).arg(&dir);
        child::run_ok(&mut command, &self.interrupt, "the comparison with transformers")
    }

    fn sanitize(&self, tool: Tool) -> Result<()> {
        println!("\n== compute-sanitizer {}", tool.name());
        let program = match &self.args.sanitizer {
            Some(program) => program.clone(),
            None => cuda_tool(&["bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"])
                .context("name one with --sanitizer, or leave out the parts memcheck and racecheck")?,
        };
        let gpus = self.args.gpus.clone();
        let sanitizer = Sanitizer { program, tool, ember: self.args.bin_dir.join("ember"), gpus };
        sanitizer.run(&self.args.out.join(tool.name()), &self.interrupt)
    }

    /// Starts one server per model, and runs its loads.
    fn speed(&self, outcome: &mut Outcome) -> Result<()> {
        let chosen: Vec<_> = LOADS.iter().filter(|it| it.name.contains(&self.args.load)).collect();
        for loads in chosen.chunk_by(|a, b| a.model.name == b.model.name) {
            let model = loads[0].model;
            let res = self.speed_of_model(model, loads, outcome);
            self.interrupt.check()?;
            if let Err(err) = res {
                outcome.add_verdict(&format!("serving {}", model.name), Err(err));
            }
        }
        Ok(())
    }

    fn speed_of_model(&self, model: &DummyModel, loads: &[&Load], outcome: &mut Outcome) -> Result<()> {
        let dir = model.write(&self.args.out.join("models"))?;
        if model.name == LLAMA_3_1_8B.name {
            // The first start may find no compiled kernels, the second finds those of the first.
            let server = self.start_server(model, self.server_command(model, &dir))?;
            outcome.add("first start", "ready s", Some(server.ready.as_secs_f64()), READY_COLD_S);
            server.stop()?;
        }
        let mut server = self.start_server(model, self.server_command(model, &dir))?;
        if model.name == LLAMA_3_1_8B.name {
            outcome.add("next start", "ready s", Some(server.ready.as_secs_f64()), READY_WARM_S);
            outcome.add("memory", "KV tokens", kv_tokens(server.port), KV_TOKENS);
        }
        for load in loads {
            println!("\n== {}: {} requests", load.name, load.number);
            let res = self.run_load(load, server.port);
            self.interrupt.check()?;
            match res {
                Ok(result) => {
                    for bar in load.bars {
                        let measured = result.pointer(bar.pointer).and_then(Value::as_f64).map(|it| it * bar.scale);
                        outcome.add(load.name, bar.figure, measured, bar.limit);
                    }
                    self.results.borrow_mut().insert(load.name, result);
                }
                Err(err) => outcome.add_verdict(load.name, Err(err)),
            }
            server.check_alive()?;
        }
        server.stop()
    }

    /// Loads of long prompts in turns, on one server. The first failure ends it, with the device's core dump, if there is
    /// one, described beside it.
    fn soak(&self) -> Result<()> {
        let model = &LLAMA_3_1_8B;
        let core = fs::canonicalize(&self.args.out)?.join("device.core");
        if core.exists() {
            fs::remove_file(&core).with_context(|| format!("cannot remove the old {}", core.display()))?;
        }
        let mut command = self.server_command(model, &model.write(&self.args.out.join("models"))?);
        command.env("CUDA_ENABLE_COREDUMP_ON_EXCEPTION", "1").env("CUDA_COREDUMP_FILE", &core);
        command.env("CUDA_COREDUMP_GENERATION_FLAGS", "skip_global_memory,skip_local_memory");
        let mut server = self.start_server(model, command)?;
        let started = Instant::now();
        for load in LOADS.iter().filter(|load| load.is_soaked()).cycle() {
            if started.elapsed() >= Duration::from_secs(60 * self.args.soak_minutes) {
                break;
            }
            println!("\n== soak, {} s: {}", started.elapsed().as_secs(), load.name);
            let res = self.run_load(load, server.port).and_then(|_| server.check_alive());
            self.interrupt.check()?;
            if let Err(err) = res {
                let failed = Instant::now();
                while server.check_alive().is_ok() && failed.elapsed() < DUMP_LIMIT {
                    sleep(Duration::from_millis(200));
                }
                let dump = self.describe(&core).unwrap_or_else(|err| format!("no core dump described: {err:#}"));
                bail!("after {} s, in {}: {err:#}\n{dump}", started.elapsed().as_secs(), load.name);
            }
        }
        server.stop()
    }

    /// Where what cuda-gdb says of a device's core dump is written.
    fn describe(&self, core: &Path) -> Result<String> {
        let mut command = Command::new(cuda_tool(&["bin/cuda-gdb"])?);
        command.arg("-batch").arg("-ex").arg(format!("target cudacore {}", core.display()));
        for what in ["info cuda kernels", "p/x $errorpc", "x/48i $errorpc-0x200", "info registers", "info cuda warps"] {
            command.args(["-ex", what]);
        }
        let text = self.args.out.join("device-core.txt");
        let file = fs::File::create(&text).with_context(|| format!("cannot create {}", text.display()))?;
        command.stderr(file.try_clone()?).stdout(file);
        child::run_ok(&mut command, &self.interrupt, "cuda-gdb")?;
        Ok(format!("what cuda-gdb says of {}: {}", core.display(), text.display()))
    }

    fn server_command(&self, model: &DummyModel, dir: &Path) -> Command {
        let mut command = self.command(&self.args.bin_dir.join("ember"));
        command.arg("serve").arg(dir).args(["--served-model-name", model.name, "--device", "cuda"]);
        command.args(["--load-format", "dummy", "--dtype", "bfloat16", "--no-enable-prefix-caching"]);
        command.args(self.args.serve_flags.split_whitespace());
        command
    }

    fn start_server(&self, model: &DummyModel, command: Command) -> Result<Server> {
        let log = self.args.out.join(format!("server-{}.log", model.name));
        Server::start(command, &log, READY_LIMIT, &self.interrupt)
    }

    fn run_load(&self, load: &Load, port: u16) -> Result<Value> {
        let json_path = self.args.out.join(format!("{}.json", load.name.replace(' ', "-")));
        let mut command = Command::new(self.args.bin_dir.join("ember-bench"));
        command.args(["perf", "--url", &format!("http://127.0.0.1:{port}"), "--model", load.model.name]);
        command.args(["--dataset", "random", "--random-vocab-size", &load.model.vocab_size.to_string()]);
        command.args(load.lengths.flags().split_whitespace()).arg("--ignore-eos");
        command.args(load.draws.flags().split_whitespace());
        command.args(["--parallel", &load.parallel.to_string(), "--number", &load.number.to_string()]);
        command.arg(if load.is_streamed { "--stream" } else { "--no-stream" });
        // Kernels' and graphs' first uses are not the load's.
        command.args(["--warmup", &load.parallel.to_string()]);
        command.arg("--db").arg(self.args.out.join("bench.db")).arg("--json").arg(&json_path);
        child::run_ok(&mut command, &self.interrupt, "ember-bench perf")?;
        let result = read_results(&json_path)?.swap_remove(0);
        if result["failed"].as_u64() != Some(0) {
            bail!("{} requests failed: {}", result["failed"], result["errors"]);
        }
        Ok(result)
    }
}

/// The KV cache's size in tokens, from the labels of the server's `cache_config_info` metric.
fn kv_tokens(port: u16) -> Option<f64> {
    let (_, metrics) = http_get(port, "/metrics").ok()?;
    let line = metrics.lines().find(|it| it.starts_with("vllm:cache_config_info{"))?;
    let label = |name: &str| {
        let (_, rest) = line.split_once(&format!("{name}=\""))?;
        rest.split('"').next()?.parse::<f64>().ok()
    };
    Some(label("num_gpu_blocks")? * label("block_size")?)
}

/// The first that exists of `places` in the CUDA toolkit.
fn cuda_tool(places: &[&str]) -> Result<PathBuf> {
    let cuda = std::env::var_os("CUDA_PATH").map_or_else(|| PathBuf::from("/usr/local/cuda"), PathBuf::from);
    match places.iter().map(|place| cuda.join(place)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("no {} under {} (set CUDA_PATH)", places[0], cuda.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn loads_have_unique_names_and_bars_and_are_grouped_by_model() {
        let names: BTreeSet<_> = LOADS.iter().map(|it| it.name).collect();
        assert_eq!(names.len(), LOADS.len());
        assert!(LOADS.iter().all(|it| !it.bars.is_empty() && it.number >= it.parallel));
        let models: BTreeSet<_> = LOADS.iter().map(|it| it.model.name).collect();
        assert_eq!(LOADS.chunk_by(|a, b| a.model.name == b.model.name).count(), models.len());
    }

    #[test]
    fn a_soak_has_deep_and_shallow_queues_of_one_model() {
        let soaked: Vec<_> = LOADS.iter().filter(|it| it.is_soaked()).collect();
        assert_eq!(soaked.iter().map(|it| it.parallel).collect::<Vec<_>>(), [16, 128]);
        assert!(soaked.iter().all(|it| it.model.name == LLAMA_3_1_8B.name));
    }

    #[test]
    fn a_missing_figure_misses_its_bar() {
        let mut outcome = Outcome::default();
        outcome.add("a", "tok/s", Some(190.0), Limit::AtLeast(190.0));
        outcome.add("a", "ms", Some(5.0), Limit::AtMost(5.3));
        assert_eq!(outcome.n_missed, 0);
        outcome.add("b", "tok/s", None, Limit::AtLeast(190.0));
        outcome.add("b", "ms", Some(5.4), Limit::AtMost(5.3));
        assert_eq!(outcome.n_missed, 2);
        assert_eq!(outcome.rows[2][2..], ["-", ">= 190", "MISSED"]);
    }
}
