//! Owns what reports look like: console text, JSON and Markdown, all from one summary.

use std::fmt::Write;
use std::path::Path;

use crate::cli::{OutputArgs, ReportArgs};
use crate::metrics::{FEW_SUCCESSES, PERCENTILES, Percentiles, Summary, summarise};
use crate::store::{Run, Store};
use crate::{Error, Result};

/// A run with its figures.
#[derive(Debug, Clone)]
pub struct Report {
    pub run: Run,
    pub summary: Summary,
}

/// `ember-bench report`: prints runs of a database again.
///
/// # Errors
/// If the database or the run does not exist, or a file cannot be written.
pub async fn command(args: &ReportArgs) -> Result<()> {
    let mut store = Store::open(&args.db).await?;
    let mut reports = Vec::new();
    for run in store.runs(args.run).await? {
        let report = load(&mut store, run).await?;
        println!("{}", console(&report));
        reports.push(report);
    }
    store.close().await?;
    write_files(&reports, &args.output)
}

/// Computes the figures of a stored run.
pub async fn load(store: &mut Store, run: Run) -> Result<Report> {
    let records = store.requests(run.id).await?;
    let summary = summarise(&run, &records);
    Ok(Report { run, summary })
}

/// Writes the files that the flags ask for.
pub fn write_files(reports: &[Report], output: &OutputArgs) -> Result<()> {
    let write = |path: &Path, text: String| std::fs::write(path, text).map_err(Error::io(path));
    if let Some(path) = &output.json {
        write(path, json(reports))?;
    }
    if let Some(path) = &output.markdown {
        write(path, markdown(reports))?;
    }
    Ok(())
}

/// The summaries as a JSON array; `schema.json` describes it.
pub fn json(reports: &[Report]) -> String {
    let summaries: Vec<&Summary> = reports.iter().map(|report| &report.summary).collect();
    let mut text = serde_json::to_string_pretty(&summaries).expect("a summary has only JSON values");
    text.push('\n');
    text
}

/// The console report: the lines of EvalScope's 2024 report under their names and in their order, then the rest.
pub fn console(report: &Report) -> String {
    let (run, summary) = (&report.run, &report.summary);
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        writeln!(text, " {name}: {value}").expect("a String takes every write");
    };
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let seconds = |value: Option<f64>| number(value, 3);

    line("Dataset", format!("{}{}", run.dataset, if run.synthetic { " (synthetic)" } else { "" }));
    line("Load", load_text(summary));
    line("Time taken for tests", format!("{:.3} seconds", summary.wall_s));
    line("Expected number of requests", summary.number.to_string());
    line("Number of concurrency", summary.parallel.map_or("unlimited".into(), |parallel| parallel.to_string()));
    line("Total requests", summary.total_requests.to_string());
    line("Succeed requests", summary.succeeded.to_string());
    line("Failed requests", summary.failed.to_string());
    line("Average QPS", format!("{:.3}", summary.qps));
    line("Average latency", seconds(summary.avg_latency_s));
    line("Throughput(average output tokens per second)", format!("{:.3}", summary.output_tok_s));
    line("Average time to first token", seconds(summary.avg_ttft_s));
    line("Average input tokens per request", seconds(summary.avg_input_tokens));
    line("Average output tokens per request", seconds(summary.avg_output_tokens));
    line("Average time per output token", number(summary.wall_per_output_token_s, 5));
    line("Average package per request", seconds(summary.avg_packages));
    line("Average package latency", seconds(summary.avg_package_latency_s));
    let few = if summary.succeeded > FEW_SUCCESSES { "" } else { " (few requests, weak figures)" };
    for (name, percentiles) in [
        ("time to first token", &summary.percentiles.ttft),
        ("request latency", &summary.percentiles.latency),
        ("time per output token (TPOT)", &summary.percentiles.tpot),
        ("inter-token latency (ITL)", &summary.percentiles.itl),
    ] {
        line(&format!("Percentile of {name}{few}"), percentile_lines(percentiles));
    }

    line(
        "Time per output token, wall clock / all tokens (2024 definition)",
        number(summary.wall_per_output_token_s, 5),
    );
    line("Time per output token, mean per-request TPOT (current definition)", number(summary.avg_tpot_s, 5));
    line("Average inter-token latency (ITL)", number(summary.avg_itl_s, 5));
    line("Average time to first message with choices (EvalScope's TTFT)", seconds(summary.avg_evalscope_ttft_s));
    line("Input tokens per second", format!("{:.3}", summary.input_tok_s));
    line("Total tokens per second", format!("{:.3}", summary.total_tok_s));
    if let Some(share) = summary.cached_share {
        line("Prompt tokens from the server's cache", format!("{:.1} %", share * 100.0));
    }
    if summary.rate.is_some() {
        let lag = &summary.percentiles.lag.0;
        line("Send lag (sent - intended), p50 / p99", format!("{} / {}", number(lag[0], 4), number(lag[7], 4)));
    }
    if summary.without_usage > 0 {
        let note = "these count as 0 tokens; --tokenizer-path would count them";
        line("Answers without usage", format!("{} ({note})", summary.without_usage));
    }
    for (error, count) in &summary.errors {
        line("Failure", format!("{count} x {error}"));
    }
    if summary.interrupted {
        line("Interrupted", "yes, figures cover what had finished".into());
    }
    let gpu = run.environment.gpu.as_deref().unwrap_or("no NVIDIA GPU");
    let environment = &run.environment;
    line("Client", format!("ember-bench {} on {} ({}; {gpu})", environment.version, environment.host, environment.cpu));
    format!("Benchmarking summary (run {}, {}):\n{text}", run.id, run.model.as_deref().unwrap_or(&run.name))
}

fn load_text(summary: &Summary) -> String {
    match summary.rate {
        Some(rate) => {
            format!("open loop, {rate} requests/s (Poisson); times count from the intended send")
        }
        None => "closed loop; times count from the send".into(),
    }
}

fn percentile_lines(percentiles: &Percentiles) -> String {
    if percentiles.0.iter().all(Option::is_none) {
        return "- (no streamed answers)".into();
    }
    let values = PERCENTILES.iter().zip(&percentiles.0);
    values.fold(String::new(), |mut text, (percent, value)| {
        let value = value.map_or("-".into(), |value| format!("{value:.4}"));
        write!(text, "\n     p{percent}: {value}").expect("a String takes every write");
        text
    })
}

/// The summaries as Markdown tables: one of throughput and means, one of percentiles.
pub fn markdown(reports: &[Report]) -> String {
    let mut text = String::from(
        "| dataset | parallel | rate | requests | failed | mean in / out | output tok/s | input tok/s | req/s | latency s | TTFT ms | TPOT ms | ITL ms |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let ms = |value: Option<f64>| number(value.map(|value| value * 1e3), 2);
    let name =
        |summary: &Summary| format!("{}{}", summary.dataset, if summary.synthetic { " (synthetic)" } else { "" });
    let parallel = |summary: &Summary| summary.parallel.map_or("-".into(), |parallel| parallel.to_string());
    let rate = |summary: &Summary| summary.rate.map_or("-".into(), |rate| rate.to_string());
    for Report { summary: s, .. } in reports {
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} / {} | {:.1} | {:.1} | {:.3} | {} | {} | {} | {} |",
            name(s),
            parallel(s),
            rate(s),
            s.total_requests,
            s.failed,
            number(s.avg_input_tokens, 1),
            number(s.avg_output_tokens, 1),
            s.output_tok_s,
            s.input_tok_s,
            s.qps,
            number(s.avg_latency_s, 3),
            ms(s.avg_ttft_s),
            ms(s.avg_tpot_s),
            ms(s.avg_itl_s),
        )
        .expect("a String takes every write");
    }
    text.push_str("\n| dataset | parallel | rate | ms |");
    for percent in PERCENTILES {
        write!(text, " p{percent} |").expect("a String takes every write");
    }
    text.push_str("\n|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for Report { summary: s, .. } in reports {
        let rows = [
            ("TTFT", &s.percentiles.ttft),
            ("latency", &s.percentiles.latency),
            ("TPOT", &s.percentiles.tpot),
            ("ITL", &s.percentiles.itl),
        ];
        for (kind, percentiles) in rows {
            let few = if s.succeeded > FEW_SUCCESSES { "" } else { " (few)" };
            write!(text, "| {} | {} | {} | {kind}{few} |", name(s), parallel(s), rate(s))
                .expect("a String takes every write");
            for value in percentiles.0 {
                write!(text, " {} |", ms(value)).expect("a String takes every write");
            }
            text.push('\n');
        }
    }
    text
}
