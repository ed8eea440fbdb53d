//! [`compare`]: the experts of a layer on the device against float32 on the host, from the same bfloat16 numbers: so
//! close that both choose the same experts.

use half::bf16;

use super::{
    device::Gpu,
    experts::{ExpertKernels, ExpertRows, Experts},
    gemm::{Gemm, padded_rows},
    load::{self, Origin},
    memory::DeviceBuffer,
};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Route, Weight},
    weights::{DType, WeightSource, dummy::DummySource},
};

/// Tokens of each case: one, each kind of tile, more than go through at once.
const N_TOKENS: [usize; 5] = [1, 9, 70, 700, 4300];

/// Name of each case and its greatest difference, over the largest number of the results.
pub(super) fn compare(gpu: &Gpu, like: &DecoderSpec) -> Result<Vec<(String, f32)>, Error> {
    let mut cases = Vec::new();
    for (name, shared_intermediate_size, norm_topk_prob) in [("shared expert", Some(40), false), ("norm", None, true)] {
        let moe = Moe {
            n_experts: 12,
            n_experts_per_token: 3,
            intermediate_size: 72,
            shared_intermediate_size,
            norm_topk_prob,
            dense_layers: vec![],
        };
        let spec = DecoderSpec { hidden_size: 136, n_layers: 1, moe: Some(moe), ..like.clone() };
        let source = DummySource::new(spec.clone(), 3, DType::BF16)?;
        let weights = load::load(gpu, &spec, Origin::Source(&source))?;
        let weights = weights.layers[0].experts.as_ref().expect("loaded for a model with experts");
        let kernels = ExpertKernels::new(gpu, &spec)?.expect("a model with experts");
        let longest = N_TOKENS[N_TOKENS.len() - 1];
        let experts = Experts::new(gpu, kernels, &spec, longest)?;
        let mut gemm = Gemm::new(gpu)?;
        let host = Host::new(&spec, &source)?;
        let width = shared_intermediate_size.unwrap_or(0);
        for n in N_TOKENS {
            let rows = |n: usize, width: usize, seed: u32| noise(n * width, seed);
            let (h, act) = (rows(n, spec.hidden_size, 1), rows(n, width, 2));
            // Every fifth token is padding.
            let slots: Vec<i32> = (0..n as i32).map(|token| if token % 5 == 4 { -1 } else { token }).collect();
            let buffer = |n_bytes: usize| DeviceBuffer::zeroed(gpu, n_bytes, "the self-test");
            let h_buffer = buffer(padded_rows(n) * spec.hidden_size * 2)?;
            let (x_buffer, act_buffer) = (buffer(n * spec.hidden_size * 4)?, buffer(n * width * 2)?);
            let slot_buffer = buffer(n * 4)?;
            h_buffer.write(gpu, 0, &h)?;
            act_buffer.write(gpu, 0, &act)?;
            slot_buffer.write(gpu, 0, &slots)?;
            let rows = ExpertRows {
                h: h_buffer.ptr(),
                x: x_buffer.ptr(),
                slots: slot_buffer.ptr(),
                act: if width == 0 { 0 } else { act_buffer.ptr() },
                n,
            };
            experts.run(gpu, &mut gemm, weights, rows)?;
            let x: Vec<f32> = x_buffer.read(gpu, 0, n * spec.hidden_size)?;
            let scaled: Vec<u16> = act_buffer.read(gpu, 0, n * width)?;
            let mut difference = Difference::default();
            for (token, &slot) in slots.iter().enumerate() {
                let row = token * spec.hidden_size..(token + 1) * spec.hidden_size;
                let input: Vec<f32> = h[row.clone()].iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
                let (expected, share) = host.run(&input);
                let live = if slot < 0 { 0.0 } else { 1.0 };
                x[row].iter().zip(&expected).for_each(|(got, want)| difference.add(*got, live * want));
                for i in token * width..(token + 1) * width {
                    let scale = if slot < 0 { 1.0 } else { share };
                    difference.add(bf16::from_bits(scaled[i]).to_f32(), scale * bf16::from_bits(act[i]).to_f32());
                }
            }
            cases.push((format!("experts, {name}: {n} tokens"), difference.relative()));
        }
    }
    Ok(cases)
}

/// A greatest difference, and the largest number it is one of.
#[derive(Default)]
struct Difference {
    greatest: f32,
    scale: f32,
}

impl Difference {
    fn add(&mut self, got: f32, want: f32) {
        let difference = (got - want).abs();
        self.greatest = if difference.is_finite() { self.greatest.max(difference) } else { f32::INFINITY };
        self.scale = self.scale.max(want.abs());
    }

    fn relative(&self) -> f32 {
        if self.scale > 0.0 { self.greatest / self.scale } else { f32::INFINITY }
    }
}

/// Bits of bfloat16 numbers in ±1.
fn noise(n: usize, seed: u32) -> Vec<u16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_bits()
    };
    (0..n).map(|_| next()).collect()
}

/// The experts in plain loops.
struct Host {
    moe: Moe,
    router: Vec<f32>,
    shared_router: Vec<f32>,
    /// Gate, up and down of each.
    experts: Vec<[Vec<f32>; 3]>,
}

impl Host {
    fn new(spec: &DecoderSpec, source: &dyn WeightSource) -> Result<Self, Error> {
        let moe = spec.moe.clone().expect("a model with experts");
        let read = |weight: Weight| Ok::<_, Error>(source.get(weight)?.to_f32().into_owned());
        let expert = |expert: usize| {
            let [gate, up, down] = ExpertWeight::ALL.map(|w| read(Weight::Expert(0, expert, w)));
            Ok::<_, Error>([gate?, up?, down?])
        };
        Ok(Self {
            router: read(Weight::Layer(0, LayerWeight::Router))?,
            shared_router: match moe.shared_intermediate_size {
                Some(_) => read(Weight::Layer(0, LayerWeight::SharedRouter))?,
                None => Vec::new(),
            },
            experts: (0..moe.n_experts).map(expert).collect::<Result<_, _>>()?,
            moe,
        })
    }

    /// The sum of the experts' outputs, and the shared expert's share.
    fn run(&self, x: &[f32]) -> (Vec<f32>, f32) {
        let multiply = |w: &[f32], x: &[f32]| -> Vec<f32> {
            w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
        let mut routes = vec![Route { expert: 0, weight: 0.0 }; self.moe.n_experts_per_token];
        self.moe.route(&multiply(&self.router, x), &mut routes);
        let mut out = vec![0.0; x.len()];
        for Route { expert, weight } in routes {
            let [gate, up, down] = &self.experts[expert];
            let (gate, up) = (multiply(gate, x), multiply(up, x));
            let act: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u).collect();
            out.iter_mut().zip(multiply(down, &act)).for_each(|(out, y)| *out += weight * y);
        }
        let share = multiply(&self.shared_router, x).first().map_or(1.0, |&logit| sigmoid(logit));
        (out, share)
    }
}
