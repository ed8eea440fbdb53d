//! Where the CUDA libraries are: the driver, NVRTC, cuBLASLt and NVRTC's headers.
//!
//! `cudarc` opens libraries by bare name, which finds them on the loader's path only. A library that is
//! opened here by its full path is then found by its name too, because the loader knows its `SONAME`.

use std::path::{Path, PathBuf};

use crate::Error;

/// Folders that may hold a CUDA toolkit, best first.
fn toolkits() -> Vec<PathBuf> {
    let from_env = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    from_env.chain(["/usr/local/cuda", "/opt/cuda", "/usr"].map(PathBuf::from)).filter(|p| p.is_dir()).collect()
}

/// Folders for NVRTC's `-I`.
pub(super) fn include_folders() -> Vec<PathBuf> {
    let candidates = toolkits().into_iter().map(|toolkit| toolkit.join("include"));
    let Some(include) = candidates.into_iter().find(|folder| folder.join("cuda_bf16.h").is_file()) else {
        return Vec::new();
    };
    // Since CUDA 13 `cuda_bf16.h` includes `nv/target`, which moved to a folder of its own.
    [include.clone(), include.join("cccl")].into_iter().filter(|folder| folder.is_dir()).collect()
}

/// Makes the driver, NVRTC and cuBLASLt ready for `cudarc`, whose functions panic without them.
///
/// # Errors
/// [`Error::Device`] saying what to install or set.
pub(super) fn load() -> Result<(), Error> {
    // SAFETY: loads libraries whose initialisers have no conditions.
    unsafe {
        if !cudarc::driver::sys::is_culib_present() {
            return Err(Error::Device(
                "no NVIDIA driver: libcuda.so.1 was not found. Install the driver, or use --device cpu".into(),
            ));
        }
        ensure("nvrtc", || cudarc::nvrtc::sys::is_culib_present())?;
        ensure("cublasLt", || cudarc::cublaslt::sys::is_culib_present())?;
    }
    if include_folders().is_empty() {
        return Err(Error::Device(
            "cuda_bf16.h was not found. Install the CUDA toolkit's headers (12.8 or later) and set CUDA_PATH to its folder"
                .into(),
        ));
    }
    Ok(())
}

fn ensure(name: &str, is_present: impl Fn() -> bool) -> Result<(), Error> {
    if is_present() {
        return Ok(());
    }
    let folders = ["lib64", "lib", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"];
    for folder in toolkits().iter().flat_map(|toolkit| folders.map(|f| toolkit.join(f))) {
        // NVRTC opens its built-ins by name as well.
        for stem in [format!("lib{name}-builtins.so."), format!("lib{name}.so.")] {
            open_first(&folder, &stem);
        }
        if is_present() {
            return Ok(());
        }
    }
    Err(Error::Device(format!(
        "lib{name}.so was not found. Install the CUDA toolkit's libraries (12.8 or later) and set CUDA_PATH to its folder"
    )))
}

/// Opens for good the first file of `folder` whose name is `stem` and a version.
fn open_first(folder: &Path, stem: &str) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(stem)))
        .collect();
    files.sort();
    for file in files {
        // SAFETY: NVIDIA's libraries have no conditions on being loaded.
        if let Ok(library) = unsafe { libloading::Library::new(&file) } {
            std::mem::forget(library);
            return;
        }
    }
}
