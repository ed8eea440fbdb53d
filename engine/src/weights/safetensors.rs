//! [`SafetensorsFolder`]: one or several memory-mapped safetensors files. [`SafetensorsSource`]: a decoder's weights in
//! them.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::Metadata};

use super::{
    DType, StoredTensor, TensorView, WeightSource,
    fp8::{self, Scales},
    typical_weight,
};
use crate::{
    Error,
    decoder::{DecoderSpec, Weight},
};

/// File of an unsharded model.
const SINGLE_FILE: &str = "model.safetensors";
/// Says which shard holds which tensor.
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The tensors in the safetensors files of a Hugging Face folder.
pub struct SafetensorsFolder {
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    shard_of: HashMap<String, usize>,
    folder: PathBuf,
}

/// How a checkpoint stores a decoder's weights.
pub struct Layout {
    /// The files' name of a weight.
    pub tensor_name: Box<dyn Fn(Weight) -> String + Send + Sync>,
    /// Rows and columns that share a scale where fp8 weights have one for each block.
    pub fp8_block: (usize, usize),
}

/// The weights of a decoder in the safetensors files of a Hugging Face folder. 8-bit floats
/// (`F8_E4M3`) are read as bfloat16: `value = element * scale`, with the scales in the tensor `X.weight_scale` or, by the
/// name that DeepSeek gave it, `X.weight_scale_inv` of weight `X.weight`. Scales of activations are not used.
pub struct SafetensorsSource {
    files: SafetensorsFolder,
    spec: DecoderSpec,
    layout: Layout,
}

/// One mapped file.
struct Shard {
    path: PathBuf,
    mmap: Arc<Mmap>,
    /// First byte after the header.
    data_start: usize,
    metadata: Metadata,
}

impl SafetensorsFolder {
    /// Maps the files of `folder`.
    ///
    /// # Errors
    /// [`Error::Model`] if a file is missing or broken.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let shards = shard_paths(folder)?.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut shard_of = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.metadata.offset_keys() {
                if let Some(other) = shard_of.insert(name.clone(), i) {
                    let other = shards[other].path.display();
                    return Err(Error::model(&shard.path, format!("tensor '{name}' is also in {other}")));
                }
            }
        }
        Ok(Self { shards, shard_of, folder: folder.to_owned() })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// Tensor `name`, which must have this shape.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing, of another shape or of an unsupported type.
    pub fn tensor(&self, name: &str, shape: Vec<usize>) -> Result<TensorView<'_>, Error> {
        self.shard(name)?.tensor(name, shape)
    }

    fn shard(&self, name: &str) -> Result<&Shard, Error> {
        let shard = self.shard_of.get(name).map(|&i| &self.shards[i]);
        shard.ok_or_else(|| Error::model(&self.folder, format!("tensor '{name}' is missing")))
    }

    /// The scales of fp8 matrix `name`.
    fn scales(&self, name: &str, (n_rows, n_columns): (usize, usize), block: (usize, usize)) -> Result<Scales, Error> {
        let names = ["_scale", "_scale_inv"].map(|end| format!("{name}{end}"));
        let missing = || {
            let message =
                format!("tensor '{name}' has type F8_E4M3, but neither '{}' nor '{}' is there", names[0], names[1]);
            Error::model(&self.folder, message)
        };
        let name = names.iter().find(|name| self.contains(name)).ok_or_else(missing)?;
        let shard = self.shard(name)?;
        let shape = shard.shape(name).unwrap_or_default();
        let values = shard.tensor(name, shape.clone())?.to_f32().into_owned();
        Scales::new(values, &shape, (n_rows, n_columns), block).ok_or_else(|| {
            let message = format!(
                "tensor '{name}' has shape {shape:?}, which is not one scale, one for each of {n_rows} rows, or one for \
                 each block of {} rows and {} columns",
                block.0, block.1
            );
            Error::model(&shard.path, message)
        })
    }
}

impl SafetensorsSource {
    /// The weights of `spec` in `files`.
    ///
    /// # Errors
    /// [`Error::Model`] if a tensor is missing, of another shape or of an unsupported type.
    pub fn new(files: SafetensorsFolder, spec: DecoderSpec, layout: Layout) -> Result<Self, Error> {
        let source = Self { files, spec, layout };
        source.spec.weights().try_for_each(|weight| match source.fp8(weight)? {
            Some((name, shape)) => source.scales(&name, &shape).map(drop),
            None => source.find(weight).map(drop),
        })?;
        Ok(source)
    }

    fn name_and_shape(&self, weight: Weight) -> Result<(String, Vec<usize>), Error> {
        let name = (self.layout.tensor_name)(weight);
        let shape = self.spec.shape(weight);
        let shape =
            shape.ok_or_else(|| Error::model(&self.files.folder, format!("the model has no tensor '{name}'")))?;
        Ok((name, shape))
    }

    fn find(&self, weight: Weight) -> Result<(&Shard, TensorView<'_>), Error> {
        let (name, shape) = self.name_and_shape(weight)?;
        let shard = self.files.shard(&name)?;
        Ok((shard, shard.tensor(&name, shape)?))
    }

    /// Name and shape of `weight` if it is stored as 8-bit floats.
    fn fp8(&self, weight: Weight) -> Result<Option<(String, Vec<usize>)>, Error> {
        let (name, shape) = self.name_and_shape(weight)?;
        let shard = self.files.shard(&name)?;
        Ok((shard.dtype(&name) == Some(Dtype::F8_E4M3) && shape.len() == 2).then_some((name, shape)))
    }

    fn scales(&self, name: &str, shape: &[usize]) -> Result<Scales, Error> {
        self.files.shard(name)?.bytes(name, shape)?;
        self.files.scales(name, (shape[0], shape[1]), self.layout.fp8_block)
    }
}

impl WeightSource for SafetensorsSource {
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        let Some((name, shape)) = self.fp8(weight)? else {
            return self.find(weight).map(|(_, tensor)| tensor);
        };
        let scales = self.scales(&name, &shape)?;
        let elements = self.files.shard(&name)?.bytes(&name, &shape)?;
        let data = fp8::to_bf16(elements, shape[1], &scales);
        Ok(TensorView { dtype: DType::BF16, shape, data: Cow::Owned(data) })
    }

    fn keep(&self, weight: Weight) -> Result<StoredTensor, Error> {
        match self.fp8(weight)? {
            Some(_) => Ok(StoredTensor::new(self.get(weight)?, None)),
            None => self.find(weight).map(|(shard, tensor)| StoredTensor::new(tensor, Some(&shard.mmap))),
        }
    }

    fn typical_type(&self, spec: &DecoderSpec) -> Result<String, Error> {
        let weight = typical_weight(spec);
        Ok(match self.fp8(weight)? {
            Some(_) => "F8_E4M3".into(),
            None => self.find(weight)?.1.dtype.name().into(),
        })
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|e| Error::model(path, format!("cannot open the file: {e}")))?;
        // SAFETY: the map is only read. Changing the file under a running server is undefined for every
        // memory-mapped model format.
        let mmap = unsafe { Mmap::map(&file) }.map_err(|e| Error::model(path, format!("cannot map the file: {e}")))?;
        let (header_len, metadata) = SafeTensors::read_metadata(&mmap)
            .map_err(|e| Error::model(path, format!("not a valid safetensors file: {e}")))?;
        Ok(Self { path: path.to_owned(), mmap: Arc::new(mmap), data_start: size_of::<u64>() + header_len, metadata })
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.metadata.info(name).map(|info| info.shape.clone())
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.metadata.info(name).map(|info| info.dtype)
    }

    fn tensor(&self, name: &str, shape: Vec<usize>) -> Result<TensorView<'_>, Error> {
        let dtype = match self.dtype(name) {
            Some(Dtype::F32) => DType::F32,
            Some(Dtype::F16) => DType::F16,
            Some(Dtype::BF16) => DType::BF16,
            Some(other) => {
                let message = format!(
                    "has type {other}, which is not supported; supported are F32, F16, BF16, for matrices F8_E4M3"
                );
                return Err(self.error(name, &message));
            }
            None => return Err(self.error(name, "is missing")),
        };
        Ok(TensorView { dtype, data: Cow::Borrowed(self.bytes(name, &shape)?), shape })
    }

    /// The bytes of tensor `name`, which must have this shape.
    fn bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8], Error> {
        let info = self.metadata.info(name).ok_or_else(|| self.error(name, "is missing"))?;
        if info.shape != shape {
            let message = format!("has shape {:?}, but config.json implies {shape:?}", info.shape);
            return Err(self.error(name, &message));
        }
        let (start, end) = info.data_offsets;
        let data = self.mmap.get(self.data_start + start..self.data_start + end);
        data.ok_or_else(|| self.error(name, "runs past the end of the file"))
    }

    fn error(&self, tensor: &str, message: &str) -> Error {
        Error::model(&self.path, format!("tensor '{tensor}' {message}"))
    }
}

/// The files that hold the weights, in a fixed order.
fn shard_paths(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let index_path = folder.join(INDEX_FILE);
    let single = folder.join(SINGLE_FILE);
    if !index_path.is_file() {
        if single.is_file() {
            return Ok(vec![single]);
        }
        return Err(Error::model(
            folder,
            format!(
                "no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there; download them, or use \
                 --load-format dummy for random weights"
            ),
        ));
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text =
        std::fs::read(&index_path).map_err(|e| Error::model(&index_path, format!("cannot read the file: {e}")))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::model(&index_path, format!("not a safetensors index: {e}")))?;
    let names: HashSet<String> = index.weight_map.into_values().collect();
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        // A shard's name must not lead out of the folder.
        if Path::new(&name).file_name().is_none_or(|file| file != name.as_str()) {
            return Err(Error::model(&index_path, format!("shard name '{name}' is not a plain file name")));
        }
        let path = folder.join(&name);
        if !path.is_file() {
            return Err(Error::model(&path, format!("this shard, named in {INDEX_FILE}, is missing; download it")));
        }
        paths.push(path);
    }
    if paths.is_empty() {
        return Err(Error::model(&index_path, "weight_map is empty"));
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::tensor::TensorView as Stored;

    use super::*;
    use crate::decoder::{Rope, RopeScaling};

    fn spec() -> DecoderSpec {
        DecoderSpec {
            architecture: "LlamaForCausalLM".into(),
            hidden_size: 4,
            intermediate_size: 6,
            n_layers: 1,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 2,
            vocab_size: 5,
            max_position: 16,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tie_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            moe: None,
        }
    }

    /// Every weight of [`spec`], each byte of it the weight's number.
    fn tensors(dtype: Dtype) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let spec = spec();
        let size = dtype.bitsize() / 8;
        let weights = spec.weights().enumerate().map(|(i, weight)| {
            let shape = spec.shape(weight).expect("in the model");
            let n: usize = shape.iter().product();
            (format!("{weight:?}"), shape, vec![i as u8; n * size])
        });
        weights.collect()
    }

    fn serialize(tensors: &[(String, Vec<usize>, Vec<u8>)], dtype: Dtype) -> Vec<u8> {
        let views =
            tensors.iter().map(|(name, shape, data)| (name, Stored::new(dtype, shape.clone(), data).expect("whole")));
        safetensors::serialize(views, None).expect("serializable")
    }

    fn open(folder: &Path) -> Result<SafetensorsSource, Error> {
        let layout = Layout { tensor_name: Box::new(|weight| format!("{weight:?}")), fp8_block: (2, 2) };
        SafetensorsSource::new(SafetensorsFolder::open(folder)?, spec(), layout)
    }

    fn error_of(folder: &Path) -> String {
        open(folder).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn reads_one_file_and_shards_alike() {
        let tensors = tensors(Dtype::BF16);
        let single = tempfile::tempdir().expect("a folder");
        std::fs::write(single.path().join(SINGLE_FILE), serialize(&tensors, Dtype::BF16)).expect("written");
        let sharded = tempfile::tempdir().expect("a folder");
        let (first, second) = tensors.split_at(4);
        std::fs::write(sharded.path().join("a.safetensors"), serialize(first, Dtype::BF16)).expect("written");
        std::fs::write(sharded.path().join("b.safetensors"), serialize(second, Dtype::BF16)).expect("written");
        let entry = |file: &str, part: &[(String, Vec<usize>, Vec<u8>)]| {
            part.iter().map(|t| (t.0.clone(), file.into())).collect::<Vec<(String, serde_json::Value)>>()
        };
        let map: serde_json::Map<_, _> =
            entry("a.safetensors", first).into_iter().chain(entry("b.safetensors", second)).collect();
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(sharded.path().join(INDEX_FILE), index.to_string()).expect("written");

        for folder in [&single, &sharded] {
            let source = open(folder.path()).expect("valid");
            for (i, weight) in spec().weights().enumerate() {
                let tensor = source.get(weight).expect("there");
                assert_eq!(tensor.dtype, DType::BF16);
                assert_eq!(Some(tensor.shape.clone()), spec().shape(weight));
                assert!(tensor.data.iter().all(|byte| usize::from(*byte) == i));
            }
        }
        std::fs::remove_file(sharded.path().join("b.safetensors")).expect("removed");
        assert!(error_of(sharded.path()).contains("this shard, named in"), "{}", error_of(sharded.path()));
        let evil = serde_json::json!({"weight_map": {"x": "../a.safetensors"}});
        std::fs::write(sharded.path().join(INDEX_FILE), evil.to_string()).expect("written");
        assert!(error_of(sharded.path()).contains("not a plain file name"));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(SINGLE_FILE);
        assert!(error_of(folder.path()).contains("no weights"));
        std::fs::write(&file, b"not a model").expect("written");
        assert!(error_of(folder.path()).contains("not a valid safetensors file"));
        std::fs::write(&file, serialize(&tensors(Dtype::I32), Dtype::I32)).expect("written");
        assert!(
            error_of(folder.path()).contains("has type I32, which is not supported"),
            "{}",
            error_of(folder.path())
        );
        let mut wrong = tensors(Dtype::F32);
        wrong[0].1 = vec![4, 5];
        std::fs::write(&file, serialize(&wrong, Dtype::F32)).expect("written");
        assert!(error_of(folder.path()).contains("has shape [4, 5], but config.json implies [5, 4]"));
        wrong.remove(0);
        std::fs::write(&file, serialize(&wrong, Dtype::F32)).expect("written");
        assert!(error_of(folder.path()).contains("'Embedding' is missing"));
    }

    #[test]
    fn fp8_weights_need_their_scales() {
        let folder = tempfile::tempdir().expect("a folder");
        let bytes = tensors(Dtype::F8_E4M3);
        let floats = tensors(Dtype::F32);
        let write = |scales: &[(String, Vec<usize>, Vec<u8>)]| {
            // Norms stay as they are.
            let weights = bytes.iter().zip(&floats).map(|(fp8, float)| match fp8.1.len() {
                1 => (Dtype::F32, float.clone()),
                _ => (Dtype::F8_E4M3, fp8.clone()),
            });
            let scales = scales.iter().map(|scale| (Dtype::F32, scale.clone()));
            let all: Vec<_> = weights.chain(scales).collect();
            let views = all
                .iter()
                .map(|(dtype, (name, shape, data))| (name, Stored::new(*dtype, shape.clone(), data).expect("whole")));
            let file = folder.path().join(SINGLE_FILE);
            std::fs::write(file, safetensors::serialize(views, None).expect("serializable")).expect("written");
        };
        let two = 2f32.to_le_bytes().to_vec();
        let scales = |end: &str| {
            let spec = spec();
            let matrices = spec.weights().filter(|&w| spec.shape(w).is_some_and(|shape| shape.len() == 2));
            matrices.map(|w| (format!("{w:?}{end}"), vec![1], two.clone())).collect::<Vec<_>>()
        };
        write(&[]);
        let message = error_of(folder.path());
        assert!(message.contains("'Embedding' has type F8_E4M3, but neither 'Embedding_scale' nor"), "{message}");
        for end in ["_scale", "_scale_inv"] {
            write(&scales(end));
            let source = open(folder.path()).expect("valid");
            assert_eq!(source.typical_type(&spec()).expect("there"), "F8_E4M3");
            for (i, weight) in spec().weights().enumerate().filter(|(_, w)| spec().shape(*w).unwrap().len() == 2) {
                let tensor = source.get(weight).expect("there");
                assert_eq!(tensor.dtype, DType::BF16);
                assert!(tensor.to_f32().iter().all(|value| *value == 2.0 * fp8::e4m3(i as u8)), "{weight:?}");
                assert_eq!(source.keep(weight).expect("there").view().data, tensor.data);
            }
        }
        let mut wrong = scales("_scale");
        wrong[0] = (wrong[0].0.clone(), vec![2], [two.clone(), two.clone()].concat());
        write(&wrong);
        let message = error_of(folder.path());
        assert!(message.contains("'Embedding_scale' has shape [2], which is not one scale, one for"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn damaged_headers_never_panic(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let folder = tempfile::tempdir().expect("a folder");
            let file = folder.path().join(SINGLE_FILE);
            let mut bytes = serialize(&tensors(Dtype::F16), Dtype::F16);
            for (index, byte) in flips {
                let i = index.index(bytes.len());
                bytes[i] = byte;
            }
            std::fs::write(&file, &bytes).expect("written");
            let _ = open(folder.path());
            bytes.truncate(cut.index(bytes.len()));
            std::fs::write(&file, &bytes).expect("written");
            prop_assert!(open(folder.path()).is_err());
        }
    }
}
