//! [`GatedMlp`]: `down(silu(gate(x)) * up(x))`, the MLP of the Llama line (SwiGLU, Shazeer 2020, arXiv:2002.05202).

use super::{activations::Activations, kernels::Kernels, linear::Linear, pool::Pool};

/// The projections of a gated MLP.
pub struct GatedMlp {
    /// Gate rows, then up rows.
    pub gate_up: Linear,
    /// From the MLP's width to the model's.
    pub down: Linear,
}

/// What a [`GatedMlp`] computes with.
pub struct MlpBuffers {
    /// `[n_tokens, 2 * width]`.
    gate_up: Vec<f32>,
    /// `[n_tokens, width]`.
    down_input: Activations,
}

impl MlpBuffers {
    /// For MLPs of `width`, `n_tokens` tokens and the down projections' input `down_input`, which has room for as many.
    pub fn new(width: usize, down_input: Activations, n_tokens: usize) -> Self {
        Self { gate_up: vec![0.0; n_tokens * 2 * width], down_input }
    }
}

impl GatedMlp {
    /// Bytes of memory, without what lies in memory maps.
    pub fn n_bytes(&self) -> usize {
        self.gate_up.n_bytes() + self.down.n_bytes()
    }

    /// Computes the rows of `x`, which are of one segment: `out` is set, or added to with `accumulate`.
    pub fn run(
        &self,
        (pool, kernels): (&mut Pool, &Kernels),
        x: &Activations,
        buffers: &mut MlpBuffers,
        out: (&mut [f32], bool),
    ) {
        self.gate_up.run(pool, kernels, x, (&mut buffers.gate_up, false));
        let n_rows = x.segment(0).n_rows();
        activate(&mut buffers.down_input, (pool, kernels), [n_rows], &buffers.gate_up);
        self.down.run(pool, kernels, &buffers.down_input, out);
    }

    /// Computes each segment of `x` with the MLP of the same place in `mlps`; `out` is set.
    pub fn run_grouped(
        mlps: &[&Self],
        (pool, kernels): (&mut Pool, &Kernels),
        x: &Activations,
        buffers: &mut MlpBuffers,
        out: &mut [f32],
    ) {
        let (gate_ups, downs): (Vec<&Linear>, Vec<&Linear>) = mlps.iter().map(|mlp| (&mlp.gate_up, &mlp.down)).unzip();
        Linear::run_grouped(&gate_ups, pool, kernels, x, &mut buffers.gate_up);
        let lengths = (0..mlps.len()).map(|i| x.segment(i).n_rows());
        activate(&mut buffers.down_input, (pool, kernels), lengths, &buffers.gate_up);
        Linear::run_grouped(&downs, pool, kernels, &buffers.down_input, out);
    }
}

/// Sets `x`, segments of these lengths, to `silu(gate) * up`. `gate_up`: `[n_rows, 2 * width]`.
fn activate(
    x: &mut Activations,
    (pool, kernels): (&mut Pool, &Kernels),
    lengths: impl IntoIterator<Item = usize>,
    gate_up: &[f32],
) {
    x.fill_segments(pool, kernels, lengths, &|m, row| {
        let width = row.len();
        let (gate, up) = gate_up[2 * m * width..][..2 * width].split_at(width);
        kernels.silu_mul(gate, up, row);
    });
}
