//! What `ember doctor` finds of NVIDIA's driver, toolkit, libraries and devices. Needs no CUDA at
//! build time: everything is opened at run time.

use std::{
    env,
    ffi::{CStr, c_char, c_int, c_uint},
    fs,
    path::{Path, PathBuf},
};

use libloading::{Library, Symbol};

use super::Finding;

const LIBRARY_REMEDY: &str = "install the CUDA toolkit 12.4 or later (Debian, Ubuntu: `apt install cuda-toolkit` from NVIDIA's repository), or put the library's folder on LD_LIBRARY_PATH";
const DRIVER_REMEDY: &str =
    "install NVIDIA's driver (Ubuntu: `ubuntu-drivers install`) and reboot; in a container start it with `--gpus all`";
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `..._MINOR` of cuda.h.
const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];

/// What there is of CUDA.
pub struct Probe {
    /// Everything that was looked for.
    pub findings: Vec<Finding>,
    /// Devices that the driver shows.
    pub n_devices: usize,
    /// Whether driver and libraries are all there.
    pub is_complete: bool,
}

/// Looks for everything.
pub fn probe() -> Probe {
    let kernel_module = kernel_module();
    let (driver, devices) = match driver() {
        Ok((finding, devices)) => (finding, devices),
        Err(finding) => (finding, Vec::new()),
    };
    let nvrtc = library("NVRTC", "libnvrtc.so");
    let cublas_lt = library("cuBLASLt", "libcublasLt.so");
    let device = if devices.is_empty() {
        let visible = env::var("CUDA_VISIBLE_DEVICES");
        let found = visible.map_or(String::new(), |visible| format!("none; CUDA_VISIBLE_DEVICES={visible}"));
        Finding::missing("GPUs", found, "needs an NVIDIA GPU, its driver, and an index in CUDA_VISIBLE_DEVICES")
    } else {
        Finding::found("GPUs", devices.join("\n"))
    };
    let needed = [&driver, &nvrtc, &cublas_lt, &device];
    let is_complete = needed.iter().all(|finding| finding.remedy.is_none());
    Probe {
        n_devices: devices.len(),
        is_complete,
        findings: vec![kernel_module, driver, toolkit(), nvrtc, cublas_lt, device],
    }
}

fn kernel_module() -> Finding {
    match fs::read_to_string("/proc/driver/nvidia/version") {
        Ok(text) => Finding::found("NVIDIA kernel module", text.lines().next().unwrap_or_default().trim()),
        Err(_) => Finding::missing("NVIDIA kernel module", "", DRIVER_REMEDY),
    }
}

/// The driver's version and a line per device.
fn driver() -> Result<(Finding, Vec<String>), Finding> {
    const ITEM: &str = "NVIDIA driver library";
    // SAFETY: libcuda's initialisers are those of NVIDIA's driver, which every CUDA program runs.
    let library = unsafe { Library::new("libcuda.so.1") }
        .map_err(|_| Finding::missing(ITEM, "", format!("libcuda.so.1: {DRIVER_REMEDY}")))?;
    let failed =
        |what: &str, code: c_int| Finding::missing(ITEM, format!("{what} failed: CUDA error {code}"), DRIVER_REMEDY);
    let old = |error: libloading::Error| Finding::missing(ITEM, error.to_string(), DRIVER_REMEDY);
    // SAFETY: the types are those of cuda.h (driver API, stable since CUDA 3.2); all pointers are to
    // live locals of the size that each call writes.
    unsafe {
        let init: Symbol<'_, unsafe extern "C" fn(c_uint) -> c_int> = library.get(b"cuInit\0").map_err(old)?;
        let version: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
            library.get(b"cuDriverGetVersion\0").map_err(old)?;
        let count: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
            library.get(b"cuDeviceGetCount\0").map_err(old)?;
        let mut number = 0;
        match version(&mut number) {
            0 => {}
            code => return Err(failed("cuDriverGetVersion", code)),
        }
        let finding = Finding::found(ITEM, format!("supports CUDA {}.{}", number / 1000, number % 1000 / 10));
        match init(0) {
            0 => {}
            // CUDA_ERROR_NO_DEVICE: the driver is fine.
            100 => return Ok((finding, Vec::new())),
            code => return Err(failed("cuInit", code)),
        }
        let mut n_devices = 0;
        match count(&mut n_devices) {
            0 => {}
            code => return Err(failed("cuDeviceGetCount", code)),
        }
        let devices = (0..n_devices).map(|idx| device(&library, idx)).collect::<Result<_, _>>().map_err(old)?;
        Ok((finding, devices))
    }
}

/// # Safety
/// `library` is libcuda, initialised, and `idx` one of its devices.
unsafe fn device(library: &Library, idx: c_int) -> Result<String, libloading::Error> {
    // SAFETY: as in `driver`.
    unsafe {
        let name: Symbol<'_, unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int> =
            library.get(b"cuDeviceGetName\0")?;
        let memory: Symbol<'_, unsafe extern "C" fn(*mut usize, c_int) -> c_int> =
            library.get(b"cuDeviceTotalMem_v2\0")?;
        let attribute: Symbol<'_, unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int> =
            library.get(b"cuDeviceGetAttribute\0")?;
        // A CUdevice is the device's index.
        let (mut text, mut bytes, mut capability) = ([0; 256], 0, [0; 2]);
        name(text.as_mut_ptr(), text.len() as c_int - 1, idx);
        memory(&mut bytes, idx);
        for (value, which) in capability.iter_mut().zip(COMPUTE_CAPABILITY) {
            attribute(value, which, idx);
        }
        let name = CStr::from_ptr(text.as_ptr()).to_string_lossy();
        let gib = bytes as f64 / (1_u64 << 30) as f64;
        Ok(format!("cuda:{idx} {name}, {gib:.1} GiB, compute capability {}.{}", capability[0], capability[1]))
    }
}

fn toolkit() -> Finding {
    let nvcc = library_folders().into_iter().filter_map(|folder| {
        let root = folder.parent()?;
        let root = if folder.ends_with("lib") || folder.ends_with("lib64") { root } else { root.parent()?.parent()? };
        root.join("bin/nvcc").is_file().then(|| root.to_owned())
    });
    match nvcc.into_iter().next() {
        Some(root) => {
            let version = fs::read_to_string(root.join("version.json")).ok().and_then(|text| {
                let json: serde_json::Value = serde_json::from_str(&text).ok()?;
                json.pointer("/cuda/version")?.as_str().map(str::to_owned)
            });
            Finding::found("CUDA toolkit", format!("{} {}", version.unwrap_or_default(), root.display()).trim())
        }
        // Only its libraries are needed.
        None => Finding::found("CUDA toolkit", "not found (not needed: Ember compiles its kernels with NVRTC)"),
    }
}

fn library(item: &'static str, prefix: &str) -> Finding {
    let in_folders = library_folders().into_iter().find_map(|folder| in_folder(&folder, prefix));
    match in_folders.or_else(|| in_loader_cache(prefix)) {
        Some(path) => Finding::found(item, path.display().to_string()),
        None => Finding::missing(item, "", format!("{prefix}: {LIBRARY_REMEDY}")),
    }
}

/// Folders that may hold CUDA's libraries, in the loader's order.
fn library_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("LD_LIBRARY_PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default();
    let mut roots: Vec<PathBuf> =
        ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let mut installed: Vec<PathBuf> = fs::read_dir("/usr/local")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda")))
        .collect();
    // `cuda` and then the newest version.
    installed.sort();
    if installed.len() > 1 {
        installed[1..].reverse();
    }
    roots.extend(installed);
    for root in roots {
        folders
            .extend(["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| root.join(lib)));
    }
    folders.extend(
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib"]
            .map(PathBuf::from),
    );
    folders
}

fn in_folder(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    names.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))).max()
}

/// Looks into what `ldconfig` knows: a table of zero-terminated strings among other data.
fn in_loader_cache(prefix: &str) -> Option<PathBuf> {
    let cache = fs::read("/etc/ld.so.cache").ok()?;
    cache
        .split(|&byte| byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok())
        .filter(|text| text.starts_with('/'))
        .map(PathBuf::from)
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)) && path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_of_a_folder_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(in_folder(folder.path(), "libnvrtc.so"), None);
        for name in ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc-builtins.so.13"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(in_folder(folder.path(), "libnvrtc.so"), Some(folder.path().join("libnvrtc.so.13")));
    }
}
