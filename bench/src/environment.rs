//! Owns what is known of the machine the load comes from.

use std::process::Command;

/// The machine that ran the load generator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    pub version: String,
    pub host: String,
    pub cpu: String,
    /// Names of its NVIDIA cards; None if `nvidia-smi` finds none.
    pub gpu: Option<String>,
}

impl Environment {
    /// Looks at this machine. What cannot be found out is "unknown".
    pub fn detect() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
        let host = host.map_or_else(|| "unknown".into(), |name| name.trim().to_owned());
        let n_cores = std::thread::available_parallelism().map_or(0, usize::from);
        let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu_name = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cpu_name = cpu_name.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            host,
            cpu: format!("{cpu_name}, {n_cores} cores"),
            gpu: gpus(),
        }
    }
}

fn gpus() -> Option<String> {
    let output = Command::new("nvidia-smi").args(["--query-gpu=name", "--format=csv,noheader"]).output().ok()?;
    let names = String::from_utf8(output.stdout).ok()?;
    let names: Vec<&str> = names.lines().map(str::trim).filter(|name| !name.is_empty()).collect();
    (output.status.success() && !names.is_empty()).then(|| names.join(", "))
}
