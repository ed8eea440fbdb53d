//! The tuned executor for NVIDIA GPUs.
