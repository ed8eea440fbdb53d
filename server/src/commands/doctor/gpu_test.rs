//! The quick self-test of the CUDA executor as findings.

use super::Finding;

/// Tests CUDA device `device`, which was found complete.
#[cfg(feature = "cuda")]
pub fn findings(device: usize) -> Vec<Finding> {
    use ember_engine::executors::cuda::{Extent, self_test};

    let report = match self_test(device, &Extent::Quick) {
        Ok(report) => report,
        Err(e) => return vec![Finding::missing("self-test", "failed", e.to_string())],
    };
    let worst = report.cases.iter().map(|&(_, difference)| difference).fold(0.0, f32::max);
    let found = format!(
        "{} cases in {:.1} s; log-probabilities within {worst:.4} of float32 ({} allowed)",
        report.cases.len(),
        report.seconds,
        report.tolerance
    );
    let test = match report.passed() {
        true => Finding::found("self-test", found),
        false => Finding::missing("self-test", found, "run `ember cuda-test` and report what it prints"),
    };
    let mut findings = vec![test];
    if let Some(rates) = report.rates {
        let bandwidth = format!("{:.0} GB/s, copies within the device", rates.copy_gb_per_s);
        findings.push(Finding::found("memory bandwidth", bandwidth));
        findings.push(Finding::found("bfloat16 products", format!("{:.0} TFLOP/s", rates.matmul_tflop_per_s)));
    }
    findings
}

/// Nothing: this build has no CUDA device to test.
#[cfg(not(feature = "cuda"))]
pub fn findings(_device: usize) -> Vec<Finding> {
    Vec::new()
}
