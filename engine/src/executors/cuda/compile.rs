//! CUDA C++ text to machine code for this device: NVRTC, in parallel, cached on disk.

use std::{
    ffi::{CStr, CString},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use cudarc::nvrtc::sys;
use rayon::prelude::*;

use super::{device::Gpu, kernel::Kernel, libraries, status::Check};
use crate::Error;

/// A kernel family's text.
pub(super) struct Source {
    /// File name without the ending.
    pub(super) name: &'static str,
    /// CUDA C++.
    pub(super) text: &'static str,
}

macro_rules! sources {
    ($($constant:ident = $name:literal;)*) => {
        $(
            #[doc = concat!("`kernels/", $name, ".cu`.")]
            pub(super) static $constant: Source =
                Source { name: $name, text: include_str!(concat!("kernels/", $name, ".cu")) };
        )*
    };
}

sources! {
    ACQUIRE_MAPS_SM90 = "acquire_maps_sm90";
    EMBED = "embed";
    RMSNORM = "rmsnorm";
    GATHER_ROWS = "gather_rows";
    ROPE_KV = "rope_kv";
    SILU_MUL = "silu_mul";
    GEMV = "gemv";
    MOE_GEMM = "moe_gemm";
    MOE_ROUTE = "moe_route";
    PACK_WEIGHTS = "pack_weights";
    PACKED_GEMM_SM90 = "packed_gemm_sm90";
    STREAM_GEMM_SM90 = "stream_gemm_sm90";
    DECODE_ATTENTION = "decode_attention";
    DECODE_ATTENTION_SM90 = "decode_attention_sm90";
    PREFILL_ATTENTION = "prefill_attention";
    PREFILL_ATTENTION_SM90 = "prefill_attention_sm90";
    DUMMY_WEIGHTS = "dummy_weights";
    UNPACK_KV = "unpack_kv";
    SAMPLE = "sample";
    THRESHOLD = "threshold";
    PENALTIES = "penalties";
}

/// Texts that the sources include.
static HEADERS: [(&CStr, &str); 8] = [
    (c"common.cuh", include_str!("kernels/common.cuh")),
    (c"attention.cuh", include_str!("kernels/attention.cuh")),
    (c"decode_page.cuh", include_str!("kernels/decode_page.cuh")),
    (c"hopper.cuh", include_str!("kernels/hopper.cuh")),
    (c"packed.cuh", include_str!("kernels/packed.cuh")),
    (c"packed_kv.cuh", include_str!("kernels/packed_kv.cuh")),
    (c"sampling.cuh", include_str!("kernels/sampling.cuh")),
    (c"stream_tile.cuh", include_str!("kernels/stream_tile.cuh")),
];

/// A source with its macros: what is compiled.
#[derive(Clone)]
struct Variant {
    /// The text.
    source: &'static Source,
    /// `NAME=value`.
    macros: Vec<String>,
}

impl Variant {
    /// `source` with `macros`, pairs of name and value.
    fn new(source: &'static Source, macros: &[(&str, usize)]) -> Self {
        Self { source, macros: macros.iter().map(|(name, value)| format!("{name}={value}")).collect() }
    }
}

/// Variants that are compiled together.
#[derive(Default)]
pub(super) struct Plan {
    variants: Vec<Variant>,
}

/// One of a [`Plan`].
#[derive(Clone, Copy)]
pub(super) struct Planned(usize);

impl Plan {
    /// Adds `source` with `macros`.
    pub(super) fn add(&mut self, source: &'static Source, macros: &[(&str, usize)]) -> Planned {
        self.variants.push(Variant::new(source, macros));
        Planned(self.variants.len() - 1)
    }

    /// Compiles (or takes from the cache) all of them.
    pub(super) fn compile(&self, gpu: &Gpu) -> Result<Compiled, Error> {
        let cubins = compile(&self.variants, &gpu.arch())?;
        gpu.bind()?;
        Ok(Compiled { cubins })
    }
}

/// The machine code of a [`Plan`].
pub(super) struct Compiled {
    cubins: Vec<Vec<u8>>,
}

impl Compiled {
    /// Loads the functions `names` of one of them.
    pub(super) fn load<const N: usize>(
        &self,
        planned: Planned,
        names: [&'static str; N],
    ) -> Result<[Kernel; N], Error> {
        Kernel::load(&self.cubins[planned.0], names)
    }
}

/// Compiles (or takes from the cache) `source` with `macros` alone, and loads its functions `names`.
pub(super) fn load<const N: usize>(
    gpu: &Gpu,
    source: &'static Source,
    macros: &[(&str, usize)],
    names: [&'static str; N],
) -> Result<[Kernel; N], Error> {
    let mut plan = Plan::default();
    let planned = plan.add(source, macros);
    plan.compile(gpu)?.load(planned, names)
}

/// Compiles all `variants` for `arch` (such as `sm_90a`); the same order, machine code (cubin).
///
/// # Errors
/// [`Error::Device`] with the compiler's log.
fn compile(variants: &[Variant], arch: &str) -> Result<Vec<Vec<u8>>, Error> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: valid places for the results.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.check("nvrtcVersion")?;
    let folder = cache_folder();
    variants
        .par_iter()
        .map(|variant| {
            let file = folder.as_ref().map(|folder| folder.join(cache_name(variant, arch, (major, minor))));
            if let Some(cubin) = file.as_ref().and_then(|file| std::fs::read(file).ok()) {
                return Ok(cubin);
            }
            let cubin = compile_one(variant, arch)?;
            if let Some(file) = file
                && let Err(error) = write_whole(&file, &cubin)
            {
                tracing::warn!("the kernel cache {} cannot be written: {error}", file.display());
            }
            Ok(cubin)
        })
        .collect()
}

/// The user's cache folder for Ember: `$XDG_CACHE_HOME/ember` or `~/.cache/ember`.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    Some(base.or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?.join("ember"))
}

/// Writes a file so that readers see all of it or nothing.
pub(super) fn write_whole(file: &Path, data: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().expect("a file in a folder");
    std::fs::create_dir_all(folder)?;
    let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&unfinished, data)?;
    std::fs::rename(&unfinished, file)
}

/// File name for everything that the machine code depends on.
fn cache_name(variant: &Variant, arch: &str, nvrtc: (i32, i32)) -> String {
    let hash = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, variant.source.text, &variant.macros, arch, nvrtc).hash(&mut hasher);
        HEADERS.iter().for_each(|(_, text)| text.hash(&mut hasher));
        hasher.finish()
    };
    format!("kernels/{}-{arch}-{:016x}{:016x}.cubin", variant.source.name, hash(0), hash(1))
}

/// An NVRTC program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: alive, and not used again. A failure leaves nothing to do.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile_one(variant: &Variant, arch: &str) -> Result<Vec<u8>, Error> {
    let c_string = |text: &str| CString::new(text).map_err(|_| Error::Device("a kernel's text has a NUL byte".into()));
    let name = c_string(&format!("{}.cu", variant.source.name))?;
    let text = c_string(variant.source.text)?;
    let headers = HEADERS.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>, _>>()?;
    let header_texts: Vec<_> = headers.iter().map(|text| text.as_ptr()).collect();
    let header_names: Vec<_> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
    let mut options =
        vec![format!("--gpu-architecture={arch}"), "--std=c++17".into(), "--extra-device-vectorization".into()];
    options.extend(libraries::include_folders().iter().map(|folder| format!("--include-path={}", folder.display())));
    options.extend(variant.macros.iter().map(|definition| format!("--define-macro={definition}")));
    let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
    let option_ptrs: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();

    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings are NUL-terminated and outlive the calls; the counts are those of the arrays.
    unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            header_texts.len() as i32,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        )
        .check("nvrtcCreateProgram")?;
        let status = sys::nvrtcCompileProgram(program.0, option_ptrs.len() as i32, option_ptrs.as_ptr());
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(Error::Device(format!(
                "kernel {} [{}] does not compile for {arch} ({status:?}):\n{}",
                variant.source.name,
                variant.macros.join(" "),
                log_of(&program)
            )));
        }
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program.0, &mut size).check("nvrtcGetCUBINSize")?;
        let mut cubin = vec![0u8; size];
        sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).check("nvrtcGetCUBIN")?;
        Ok(cubin)
    }
}

fn log_of(program: &Program) -> String {
    let mut size = 0;
    // SAFETY: the program is alive and the buffer is as long as NVRTC says.
    unsafe {
        if sys::nvrtcGetProgramLogSize(program.0, &mut size) != sys::nvrtcResult::NVRTC_SUCCESS || size == 0 {
            return String::new();
        }
        let mut log = vec![0u8; size];
        sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast());
        log.truncate(size - 1);
        String::from_utf8_lossy(&log).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_names_tell_variants_apart() {
        let a = Variant::new(&GEMV, &[("K", 64)]);
        let b = Variant::new(&GEMV, &[("K", 128)]);
        let name = |v: &Variant, arch, version| cache_name(v, arch, version);
        assert_eq!(name(&a, "sm_90a", (13, 0)), name(&a.clone(), "sm_90a", (13, 0)));
        assert_ne!(name(&a, "sm_90a", (13, 0)), name(&b, "sm_90a", (13, 0)));
        assert_ne!(name(&a, "sm_90a", (13, 0)), name(&a, "sm_80", (13, 0)));
        assert_ne!(name(&a, "sm_90a", (13, 0)), name(&a, "sm_90a", (12, 8)));
    }
}
