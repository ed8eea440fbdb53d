//! `cargo xtask kernels`: compiles the CUDA kernel sources on a machine without a GPU and keeps registers, spills
//! and shared memory in view.
//!
//! The compiler comes from Python packages, unpacked once into the cache. At run time the same sources go through
//! NVRTC, so a source may use nothing that needs the host compiler.
//!
//! The first comment lines of a source may say how it is compiled:
//! `// defines: A=1 B=2` adds macros; each `// variant: NAME A=1 B=2` line compiles one more object, with the word
//! `min-arch=90` only for compute capability 9.0 and later; `// spill-limit: 64` allows that many bytes of spill stores
//! per thread (default 0). A source whose name ends in `_sm90` is compiled for 9.0 and later only.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use xshell::Shell;

use crate::{cache_dir, project_root, pypi, table, target_dir};

const KERNEL_DIR: &str = "engine/src/executors/cuda/kernels";
const ARCHITECTURES: &[&str] = &["80", "89", "90a"];
const CUDA_VERSION: &str = "13.0";
const TOOLCHAIN: &[&str] = &[
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-nvrtc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-nvvm==13.0.*",
];

#[derive(Args)]
pub struct KernelsArgs {
    /// Only the sources whose file name contains this.
    #[arg(long, value_name = "TEXT")]
    file: Option<String>,
    /// Only these architectures, for example 90a.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = ARCHITECTURES.iter().map(|it| it.to_string()))]
    arch: Vec<String>,
    /// Keep the compiled objects in this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One compilation of one source: its macros.
#[derive(Clone, Debug, PartialEq)]
struct Variant {
    name: String,
    defines: Vec<String>,
    /// The least architecture it can be compiled for, such as 90.
    min_arch: u32,
}

/// What ptxas says of one kernel.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    n_registers: u32,
    spill_bytes: u32,
    stack_bytes: u32,
    shared_bytes: u32,
}

pub fn run(args: &KernelsArgs) -> Result<()> {
    let sources = sources(args.file.as_deref())?;
    if sources.is_empty() {
        bail!("{KERNEL_DIR} has no .cu file");
    }
    let toolchain = toolchain()?;
    let n_failures = compile_all(&toolchain, &sources, args)?;
    if n_failures > 0 {
        bail!("{n_failures} kernel compilations failed");
    }
    Ok(())
}

/// All kernels for all architectures, as a check.
pub fn check_all() -> Result<()> {
    let arch = ARCHITECTURES.iter().map(|it| it.to_string()).collect();
    run(&KernelsArgs { file: None, arch, out: None })
}

/// The kernel sources in name order.
fn sources(filter: Option<&str>) -> Result<Vec<PathBuf>> {
    let dir = project_root().join(KERNEL_DIR);
    let mut sources = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".cu") && filter.is_none_or(|it| name.contains(it)) {
            sources.push(path);
        }
    }
    sources.sort();
    if let Some(filter) = filter
        && sources.is_empty()
    {
        bail!("no .cu file in {} has {filter:?} in its name", dir.display());
    }
    Ok(sources)
}

/// The folder with `bin/nvcc`, fetched if it is not in the cache yet.
fn toolchain() -> Result<PathBuf> {
    let dest = cache_dir()?.join(format!("cuda-{CUDA_VERSION}"));
    let toolchain = dest.join("nvidia/cu13");
    if is_runnable(&toolchain.join("nvvm/bin/cicc")) && is_runnable(&toolchain.join("bin/nvcc")) {
        return Ok(toolchain);
    }
    eprintln!("fetching the CUDA {CUDA_VERSION} compiler into {} …", dest.display());
    let staging = pypi::Staging::beside(&dest)?;
    let sh = Shell::new()?;
    pypi::unpack(&sh, TOOLCHAIN, &staging.dir).context("could not fetch the CUDA compiler")?;
    let unpacked = staging.dir.join("nvidia");
    // Python's zip module drops the run bits.
    for bin in ["cu13/bin", "cu13/nvvm/bin"] {
        for entry in fs::read_dir(unpacked.join(bin))? {
            let path = entry?.path();
            if path.is_file() {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    fs::create_dir_all(&dest)?;
    let installed = dest.join("nvidia");
    if installed.exists() {
        fs::remove_dir_all(&installed).with_context(|| format!("cannot replace {}", installed.display()))?;
    }
    fs::rename(&unpacked, &installed).context("cannot move the CUDA compiler into the cache")?;
    Ok(toolchain)
}

fn is_runnable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o100 != 0)
}

/// Compiles every source x variant x architecture, two at a time, prints one table; returns how many failed.
fn compile_all(toolchain: &Path, sources: &[PathBuf], args: &KernelsArgs) -> Result<usize> {
    let out = match &args.out {
        Some(dir) => dir.clone(),
        None => target_dir().join("kernels"),
    };
    fs::create_dir_all(&out)?;
    let mut jobs = Vec::new();
    for source in sources {
        let text = fs::read_to_string(source)?;
        let (variants, spill_limit) = read_directives(&text).with_context(|| source.display().to_string())?;
        let file_min_arch = file_min_arch(source);
        for variant in variants {
            for arch in &args.arch {
                if arch_number(arch)? < file_min_arch.max(variant.min_arch) {
                    continue;
                }
                jobs.push(Job { source, variant: variant.clone(), arch, spill_limit });
            }
        }
    }
    let next = std::sync::atomic::AtomicUsize::new(0);
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
    let results = std::sync::Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    let job_idx = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(job) = jobs.get(job_idx) else { return };
                    let res = job.compile(toolchain, &out);
                    results.lock().expect("no thread panics while it holds the lock").insert(job_idx, res);
                }
            });
        }
    });

    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for (job_idx, res) in results.into_inner().expect("all threads ended") {
        let job = &jobs[job_idx];
        match res {
            Ok(kernels) => {
                for (kernel, usage) in kernels {
                    if usage.spill_bytes > job.spill_limit {
                        failures.push(format!(
                            "{}: {kernel} spills {} bytes, the limit is {} (raise it by a `// spill-limit: N` line)",
                            job.label(),
                            usage.spill_bytes,
                            job.spill_limit
                        ));
                    }
                    rows.push(job.row(&kernel, &usage));
                }
            }
            Err(err) => failures.push(format!("{}:\n{err:#}", job.label())),
        }
    }
    print!("{}", table::markdown(&["kernel", "variant", "arch", "registers", "spill B", "stack B", "shared B"], &rows));
    for failure in &failures {
        eprintln!("\n{failure}");
    }
    println!("{} sources, {} compilations, {} failed", sources.len(), jobs.len(), failures.len());
    Ok(failures.len())
}

struct Job<'a> {
    source: &'a Path,
    variant: Variant,
    arch: &'a str,
    spill_limit: u32,
}

impl Job<'_> {
    fn label(&self) -> String {
        let file = self.source.file_name().unwrap_or_default().to_string_lossy();
        format!("{file} [{}] sm_{}", self.variant.name, self.arch)
    }

    fn row(&self, kernel: &str, usage: &Usage) -> Vec<String> {
        vec![
            kernel.to_owned(),
            self.variant.name.clone(),
            format!("sm_{}", self.arch),
            usage.n_registers.to_string(),
            usage.spill_bytes.to_string(),
            usage.stack_bytes.to_string(),
            usage.shared_bytes.to_string(),
        ]
    }

    fn compile(&self, toolchain: &Path, out: &Path) -> Result<BTreeMap<String, Usage>> {
        let stem = self.source.file_stem().unwrap_or_default().to_string_lossy();
        let object = out.join(format!("{stem}.{}.sm_{}.cubin", self.variant.name, self.arch));
        let output = Command::new(toolchain.join("bin/nvcc"))
            .args(["-cubin", "-std=c++17", "-Xptxas", "-v", "-lineinfo"])
            .arg("-gencode")
            .arg(format!("arch=compute_{0},code=sm_{0}", self.arch))
            .arg("-I")
            .arg(self.source.parent().unwrap_or(Path::new(".")))
            .args(self.variant.defines.iter().map(|it| format!("-D{it}")))
            .arg("-o")
            .arg(&object)
            .arg(self.source)
            .output()
            .context("cannot run nvcc (it also needs a host C++ compiler, g++)")?;
        let log = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("{}{log}", String::from_utf8_lossy(&output.stdout));
        }
        for line in log.lines().filter(|it| it.contains("warning")) {
            eprintln!("{}: {line}", self.label());
        }
        let kernels = parse_ptxas(&log);
        if kernels.is_empty() {
            bail!("the source has no kernel:\n{log}");
        }
        Ok(kernels)
    }
}

/// The variants and the spill limit that a source's leading comment lines ask for.
fn read_directives(text: &str) -> Result<(Vec<Variant>, u32)> {
    let mut common = Vec::new();
    let mut variants = Vec::new();
    let mut spill_limit = 0;
    for line in text.lines().map_while(|it| it.strip_prefix("//")) {
        let Some((key, rest)) = line.trim().split_once(':') else {
            continue;
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        match key {
            "defines" => common.extend(words),
            "variant" => {
                let name = words.next().context("a `// variant:` line needs a name")?;
                let (limits, defines) = words.partition::<Vec<_>, _>(|it| it.starts_with("min-arch="));
                let min_arch = match limits.first() {
                    Some(limit) => arch_number(&limit["min-arch=".len()..])?,
                    None => 0,
                };
                variants.push(Variant { name, defines, min_arch });
            }
            "spill-limit" => {
                spill_limit = rest.trim().parse().with_context(|| format!("bad spill-limit {:?}", rest.trim()))?;
            }
            _ => {}
        }
    }
    if variants.is_empty() {
        variants.push(Variant { name: "-".to_owned(), defines: Vec::new(), min_arch: 0 });
    }
    for variant in &mut variants {
        variant.defines.extend(common.iter().cloned());
    }
    Ok((variants, spill_limit))
}

/// `90a` is 90.
fn arch_number(arch: &str) -> Result<u32> {
    let digits = arch.trim_end_matches(|it: char| it.is_ascii_lowercase());
    digits.parse().with_context(|| format!("{arch:?} is no architecture; expected one like 80 or 90a"))
}

/// The architecture that a file name such as `attention_sm90.cu` asks for; 0 when it asks for none.
fn file_min_arch(source: &Path) -> u32 {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    stem.rsplit_once("_sm").and_then(|it| it.1.parse().ok()).unwrap_or(0)
}

/// Reads the output of `ptxas -v`: for each entry function its resources.
fn parse_ptxas(log: &str) -> BTreeMap<String, Usage> {
    let mut kernels: BTreeMap<String, Usage> = BTreeMap::new();
    let mut current = None;
    // ptxas reports device functions that it did not inline by the same "Function properties" lines.
    let mut is_entry = false;
    for line in log.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|it| it.1) {
            let name = rest.split('\'').next().unwrap_or(rest).to_owned();
            kernels.insert(name.clone(), Usage::default());
            current = Some(name);
        } else if let Some(rest) = line.split_once("Function properties for ").map(|it| it.1) {
            is_entry = current.as_deref() == Some(rest.trim());
        }
        let Some(usage) = current.as_ref().and_then(|it| kernels.get_mut(it)) else {
            continue;
        };
        if line.contains("bytes stack frame") && is_entry {
            usage.stack_bytes = number_before(line, " bytes stack frame");
            usage.spill_bytes = number_before(line, " bytes spill stores");
        } else if line.contains("Used ") && line.contains(" registers") {
            usage.n_registers = number_before(line, " registers");
            usage.shared_bytes = number_before(line, " bytes smem");
        }
    }
    kernels
}

/// The number that stands just before `unit` in `line`; 0 when the unit is not there.
fn number_before(line: &str, unit: &str) -> u32 {
    let Some((before, _)) = line.split_once(unit) else {
        return 0;
    };
    let digits = before.len() - before.trim_end_matches(|it: char| it.is_ascii_digit()).len();
    before[before.len() - digits..].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptxas_report_is_read_per_entry_function() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rms_norm' for 'sm_90a'
ptxas info    : Function properties for rms_norm
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Function properties for helper
    96 bytes stack frame, 64 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4224 bytes smem
ptxas info    : Compiling entry function 'gather' for 'sm_90a'
ptxas info    : Function properties for gather
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
";
        let kernels = parse_ptxas(log);
        let usage = |n_registers, spill_bytes, stack_bytes, shared_bytes| Usage {
            n_registers,
            spill_bytes,
            stack_bytes,
            shared_bytes,
        };
        assert_eq!(kernels["rms_norm"], usage(40, 12, 16, 4224));
        assert_eq!(kernels["gather"], usage(8, 0, 0, 0));
    }

    #[test]
    fn architectures_are_ordered_by_number() {
        assert_eq!(arch_number("90a").unwrap(), 90);
        assert_eq!(arch_number("100").unwrap(), 100);
        assert!(arch_number("hopper").is_err());
        assert_eq!(file_min_arch(Path::new("k/attention_sm90.cu")), 90);
        assert_eq!(file_min_arch(Path::new("k/attention_small.cu")), 0);
    }

    #[test]
    fn directives_stop_at_the_first_code_line() {
        let text = "// RMS norm.\n// defines: THREADS=256\n// variant: d64 HEAD_DIM=64\n// variant: d128 HEAD_DIM=128 min-arch=90\n// spill-limit: 8\n#include \"common.cuh\"\n// variant: no X=1\n";
        let (variants, spill_limit) = read_directives(text).unwrap();
        assert_eq!(spill_limit, 8);
        let names: Vec<_> = variants.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["d64", "d128"]);
        assert_eq!(variants[1].defines, ["HEAD_DIM=128", "THREADS=256"]);
        assert_eq!((variants[0].min_arch, variants[1].min_arch), (0, 90));
        let (plain, _) = read_directives("#include <x>\n").unwrap();
        assert_eq!(plain, [Variant { name: "-".to_owned(), defines: vec![], min_arch: 0 }]);
    }
}
