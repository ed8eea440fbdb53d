//! The portable executor.
