//! Checks the figures and the looks of reports on records made by hand.

use ember_bench::environment::Environment;
use ember_bench::metrics::{Percentiles, summarise};
use ember_bench::record::RequestRecord;
use ember_bench::report::{Report, console, json, markdown};
use ember_bench::store::Run;
use serde_json::Value;

fn run() -> Run {
    Run {
        id: 3,
        name: "trial".into(),
        model: Some("smollm2".into()),
        api: "openai".into(),
        url: "http://127.0.0.1:8000/v1/chat/completions".into(),
        dataset: "openqa".into(),
        dataset_path: None,
        synthetic: true,
        number: 11,
        parallel: Some(2),
        rate: None,
        config: Value::Null,
        environment: Environment {
            version: "0.1.0".into(),
            host: "host".into(),
            cpu: "CPU, 2 cores".into(),
            gpu: None,
        },
        started_at: 1e9,
        ended_at: Some(2e9),
        interrupted: false,
    }
}

/// Request i starts at i seconds; its first token comes after 100 ms, then one each 10 (i + 1) ms.
fn streamed(i: u32) -> RequestRecord {
    let (sent_s, gap_us) = (f64::from(i), u64::from(10_000 * (i + 1)));
    let token_offsets_us: Vec<u64> = (0..5).map(|token| 100_000 + token * gap_us).collect();
    let at = |offset_us: u64| sent_s + offset_us as f64 / 1e6;
    RequestRecord {
        success: true,
        http_status: Some(200),
        prompt_tokens: Some(20 + i64::from(i)),
        completion_tokens: Some(5),
        streamed: true,
        intended_s: sent_s,
        sent_s,
        first_message_s: Some(at(50_000)),
        first_choices_s: Some(at(50_000)),
        first_token_s: Some(at(100_000)),
        penultimate_message_s: Some(at(token_offsets_us[4])),
        end_s: at(token_offsets_us[4]),
        n_messages: 7,
        token_offsets_us,
        ..Default::default()
    }
}

fn failed(i: u32, error: &str) -> RequestRecord {
    let sent_s = f64::from(i);
    RequestRecord { error: Some(error.into()), intended_s: sent_s, sent_s, end_s: sent_s + 0.5, ..Default::default() }
}

fn reports() -> Vec<Report> {
    let mut records: Vec<_> = (0..10).map(streamed).collect();
    records.push(failed(10, "HTTP 503: queue is full"));
    let closed = run();
    let mut open = Run { id: 4, parallel: None, rate: Some(2.5), number: 4, interrupted: true, ..run() };
    open.dataset = "custom".into();
    open.synthetic = false;
    let late = |mut record: RequestRecord| {
        record.intended_s -= 0.25;
        record.completion_tokens = None;
        record
    };
    let whole = RequestRecord {
        streamed: false,
        first_token_s: None,
        first_choices_s: None,
        token_offsets_us: vec![],
        n_messages: 1,
        cached_tokens: Some(10),
        ..streamed(1)
    };
    let few = [late(streamed(0)), whole, failed(2, "read timeout"), failed(3, "read timeout")];
    let reports = [(closed, &records[..]), (open, &few[..])];
    reports.map(|(run, records)| Report { summary: summarise(&run, records), run }).into()
}

#[test]
fn reports_look_as_they_should() {
    let reports = reports();
    let consoles: Vec<String> = reports.iter().map(console).collect();
    insta::assert_snapshot!("console", consoles.join("\n"));
    insta::assert_snapshot!("markdown", markdown(&reports));
    insta::assert_snapshot!("json", json(&reports));
}

#[test]
fn the_json_summary_keeps_to_its_schema() {
    let schema: Value = serde_json::from_str(include_str!("../schema.json")).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let summaries: Value = serde_json::from_str(&json(&reports())).unwrap();
    let errors: Vec<String> = validator.iter_errors(&summaries).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?}");
    let mut broken = summaries.clone();
    broken[0].as_object_mut().unwrap().remove("qps");
    assert!(!validator.is_valid(&broken));
    let nothing = summarise(&run(), &[]);
    let empty = Report { run: run(), summary: nothing };
    assert!(validator.is_valid(&serde_json::from_str(&json(&[empty])).unwrap()), "a run without requests");
}

#[test]
fn figures_follow_their_definitions() {
    let summary = &reports()[0].summary;
    let near = |value: Option<f64>, expected: f64| {
        assert!((value.unwrap() - expected).abs() < 1e-9, "{value:?} is not {expected}");
    };
    assert_eq!((summary.total_requests, summary.succeeded, summary.failed), (11, 10, 1));
    near(Some(summary.wall_s), 10.5);
    near(Some(summary.qps), 10.0 / 10.5);
    near(Some(summary.output_tok_s), 50.0 / 10.5);
    near(summary.wall_per_output_token_s, 10.5 / 50.0);
    near(summary.avg_ttft_s, 0.1);
    near(summary.avg_evalscope_ttft_s, 0.05);
    near(summary.avg_tpot_s, 0.055);
    near(summary.avg_itl_s, 0.055);
    near(summary.avg_latency_s, 0.1 + 4.0 * 0.055);
    near(summary.avg_input_tokens, 24.5);
    // Seven messages, of which five count; from the first to the last but one.
    near(summary.avg_packages, 7.0);
    near(summary.avg_package_latency_s, (0.05 + 4.0 * 0.055) / 5.0);
    // n = 10: p50 is index 5, the sixth smallest; p99 is index 9, the largest.
    near(summary.percentiles.tpot.0[0], 0.06);
    near(summary.percentiles.tpot.0[7], 0.10);
}

#[test]
fn percentiles_are_nearest_ranks() {
    let percentiles = Percentiles::of((0..100).rev().map(f64::from).collect());
    assert_eq!(percentiles.0.map(Option::unwrap), [50.0, 66.0, 75.0, 80.0, 90.0, 95.0, 98.0, 99.0]);
    assert_eq!(Percentiles::of(vec![4.0]).0, [Some(4.0); 8]);
    assert_eq!(Percentiles::of(vec![]).0, [None; 8]);
}
