//! Status codes of the driver, NVRTC and cuBLASLt as [`Error::Device`] with the name of the call.

use cudarc::{cublaslt, driver, nvrtc};

use crate::Error;

/// Turns a status into a `Result`.
pub(super) trait Check<T> {
    /// The value, or [`Error::Device`] naming `call`.
    fn check(self, call: &str) -> Result<T, Error>;
}

impl Check<()> for driver::sys::CUresult {
    fn check(self, call: &str) -> Result<(), Error> {
        self.result().check(call)
    }
}

impl<T> Check<T> for Result<T, driver::DriverError> {
    fn check(self, call: &str) -> Result<T, Error> {
        self.map_err(|driver::DriverError(code)| Error::Device(format!("{call} failed: {code:?}")))
    }
}

impl Check<()> for cublaslt::sys::cublasStatus_t {
    fn check(self, call: &str) -> Result<(), Error> {
        self.result().check(call)
    }
}

impl<T> Check<T> for Result<T, cublaslt::result::CublasError> {
    fn check(self, call: &str) -> Result<T, Error> {
        self.map_err(|e| Error::Device(format!("{call} failed: {:?}", e.0)))
    }
}

impl Check<()> for nvrtc::sys::nvrtcResult {
    fn check(self, call: &str) -> Result<(), Error> {
        self.result().map_err(|e| Error::Device(format!("{call} failed: {:?}", e.0)))
    }
}
