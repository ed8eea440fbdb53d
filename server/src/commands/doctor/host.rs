//! What `ember doctor` finds of the operating system, CPU and memory.

use std::fs;

use super::Finding;

const GIB: f64 = (1_u64 << 30) as f64;

/// Operating system, CPU and memory.
pub fn findings() -> Vec<Finding> {
    vec![os(), cpu(), cpu_features(), memory(), memory_limit()]
}

fn os() -> Finding {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or(std::env::consts::OS, |name| name.trim_matches('"'));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Finding::found("system", format!("{name}, kernel {}, {}", kernel.trim(), std::env::consts::ARCH))
}

fn cpu() -> Finding {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'))
        .map_or("unknown model", |(_, model)| model.trim());
    // Counts what the affinity mask and the cgroup leave, not what is soldered in.
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    Finding::found("CPU", format!("{model}, {n_cores} usable cores"))
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Finding {
    let mut names = Vec::new();
    macro_rules! look_for {
        ($($feature:tt),*) => { $(if is_x86_feature_detected!($feature) { names.push($feature); })* };
    }
    look_for!("avx", "f16c", "fma", "avx2", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avx512fp16");
    // Not detectable by the stable standard library.
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    names.extend(["amx_tile", "amx_bf16", "amx_int8"].into_iter().filter(|name| flags.contains(name)));
    if names.contains(&"avx2") {
        Finding::found("CPU features", names.join(" "))
    } else {
        Finding::missing("CPU features", names.join(" "), "no AVX2: serving on this CPU works but is slow")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Finding {
    Finding::found("CPU features", std::env::consts::ARCH)
}

/// The value of a line such as `MemTotal:  16384 kB`, in bytes.
fn meminfo(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match (meminfo(&text, "MemTotal"), meminfo(&text, "MemAvailable")) {
        (Some(total), Some(available)) => {
            Finding::found("memory", format!("{:.1} GiB, {:.1} GiB available", total / GIB, available / GIB))
        }
        _ => Finding::missing("memory", "", "/proc/meminfo cannot be read: mount /proc"),
    }
}

fn memory_limit() -> Finding {
    // cgroup v2, then v1.
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .into_iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .and_then(|text| text.trim().parse::<f64>().ok())
        // v1 says "no limit" with a number near 2^63.
        .filter(|&limit| limit < 2_f64.powi(60));
    let found = limit.map_or("none".to_owned(), |limit| format!("{:.1} GiB", limit / GIB));
    Finding::found("cgroup memory limit", found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_lines_are_in_kib() {
        let text = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(2048.0 * 1024.0));
        assert_eq!(meminfo(text, "MemFree"), None);
    }
}
