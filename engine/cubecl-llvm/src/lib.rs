//! Stand-in for `cubecl-llvm`: the names that `cubecl-cuda` mentions and nothing else.
//!
//! The real crate's build script downloads an LLVM bundle. Ember compiles Burn's CUDA kernels through
//! NVRTC (`cubecl-cuda`'s feature `cpp`), so the LLVM backend is never chosen; asked to compile
//! anyway, it answers with an error.

use cubecl_core::{ir::nvidia::SmArch, prelude::KernelDefinition};
use cubecl_environment::backtrace::BackTrace;
use cubecl_server::{
    compiler::{CompilationError, Compiler},
    kernel::BufferIOAttr,
};

/// Names of the NVIDIA target.
pub mod nvptx {
    /// PTX versions.
    pub mod ptx_version {
        /// A PTX version, as the CUDA version that brought it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct PtxVersion(i32);

        impl PtxVersion {
            /// The newest version that a driver loads. `driver`: `1000 * major + 10 * minor`.
            pub fn for_driver(driver: i32) -> Option<Self> {
                (driver > 0).then_some(Self(driver))
            }
        }

        impl std::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "cuda{}", self.0)
            }
        }
    }
}

/// Names shared by the targets.
pub mod shared {
    /// Features that a target lowers.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// A GPU target.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
        }

        /// Leaves `properties` as they are: only the LLVM backend needs them restricted.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlvmTarget {
    /// NVIDIA.
    Nvptx,
}

/// The compiler that is not here.
#[derive(Debug, Clone)]
pub struct PlironCompiler {
    /// What to compile for.
    pub target: LlvmTarget,
}

/// Options of [`PlironCompiler`].
#[derive(Debug, Clone, Default)]
pub struct PlironOptions {
    /// CPU or AMD architecture; unused.
    pub arch: Option<String>,
    /// NVIDIA architecture.
    pub sm_arch: Option<SmArch>,
    /// PTX version to emit.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Whether launch parameters are grid constants.
    pub grid_constants: bool,
}

/// A compiled NVIDIA module. None is ever made.
#[derive(Debug, Clone)]
pub struct NvptxModule {
    /// PTX text.
    pub ptx: Vec<std::ffi::c_char>,
    /// Name of the kernel in it.
    pub entrypoint: String,
    /// LLVM text.
    pub ir: String,
    /// Bytes of dynamic shared memory.
    pub shared_memory_size: usize,
    /// What the kernel does with each buffer.
    pub io: Vec<BufferIOAttr>,
}

/// What [`PlironCompiler`] makes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PlironArtifact {
    /// For NVIDIA.
    NvptxCode(NvptxModule),
}

impl std::fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NvptxCode(module) => f.write_str(&module.ir),
        }
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(&mut self, _kernel: KernelDefinition, _options: &PlironOptions) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM backend: cubecl-cuda must be built with its feature `cpp`".into(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
