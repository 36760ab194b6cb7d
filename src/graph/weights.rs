//! Named parameter values from a safetensors file, every one checked before use.

use super::build::Graph;
use crate::error::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// Largest model file that is read: 2 GiB.
pub const MAX_FILE_BYTES: u64 = 2 << 30;

/// One tensor: size in PyTorch's order, values as f32.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightTensor {
    /// Size.
    pub shape: Vec<usize>,
    /// Values.
    pub data: Vec<f32>,
}

/// Tensors by name, and the file's metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Tensors.
    pub tensors: BTreeMap<String, WeightTensor>,
    /// The `__metadata__` table.
    pub metadata: HashMap<String, String>,
}

impl Weights {
    /// Reads a safetensors file; errors name the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !file.is_file() {
            // A device or pipe may never end.
            return Err(Error::InvalidModel(format!("{}: not a regular file", path.display())));
        }
        if file.len() > MAX_FILE_BYTES {
            let (name, bytes) = (path.display(), file.len());
            return Err(Error::LimitExceeded(format!("{name}: {bytes} bytes, at most {MAX_FILE_BYTES}")));
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(&bytes).map_err(|e| match e {
            Error::InvalidModel(m) => Error::InvalidModel(format!("{}: {m}", path.display())),
            other => other,
        })
    }

    /// Reads safetensors from memory. F32, F16, BF16 and F64 become f32; integer tensors (such as
    /// PyTorch's `num_batches_tracked`) are passed over. A value that is not finite is an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > MAX_FILE_BYTES {
            let n = bytes.len();
            return Err(Error::LimitExceeded(format!("model of {n} bytes, at most {MAX_FILE_BYTES}")));
        }
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|e| Error::InvalidModel(format!("not a complete safetensors file: {e}")))?;
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| Error::InvalidModel(format!("not a complete safetensors file: {e}")))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let raw = view.data();
            let data: Vec<f32> = match view.dtype() {
                Dtype::F32 => words(raw, f32::from_le_bytes),
                Dtype::F64 => words(raw, |b| f64::from_le_bytes(b) as f32),
                Dtype::F16 => words(raw, |b| half::f16::from_le_bytes(b).to_f32()),
                Dtype::BF16 => words(raw, |b| half::bf16::from_le_bytes(b).to_f32()),
                _ => continue,
            };
            if let Some(i) = data.iter().position(|v| !v.is_finite()) {
                return Err(Error::InvalidModel(format!("tensor {name}: value {i} is {}", data[i])));
            }
            tensors.insert(name.to_string(), WeightTensor { shape: view.shape().to_vec(), data });
        }
        Ok(Self { tensors, metadata: header.metadata().clone().into_iter().flatten().collect() })
    }

    /// As a safetensors file in f32.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(n, t)| {
                (n.as_str(), (t.shape.clone(), t.data.iter().flat_map(|v| v.to_le_bytes()).collect()))
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, (shape, data))| {
                let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), data);
                Ok((*name, view.map_err(|e| Error::Internal(format!("tensor {name}: {e}")))?))
            })
            .collect::<Result<Vec<_>>>()?;
        safetensors::serialize(views, Some(self.metadata.clone().into_iter().collect()))
            .map_err(|e| Error::Internal(format!("safetensors: {e}")))
    }

    /// Writes a safetensors file in f32, whole or not at all (temporary file, then rename).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        crate::files::write_whole(path.as_ref(), &self.to_bytes()?)
    }

    /// Adds or replaces a tensor; `data` fills `shape` (PyTorch's order).
    pub fn insert(&mut self, name: &str, shape: &[usize], data: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{name}: data does not fill {shape:?}");
        self.tensors.insert(name.to_string(), WeightTensor { shape: shape.to_vec(), data });
    }

    /// The tensor for a parameter, its shape checked.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        let t = self.tensors.get(name).ok_or_else(|| {
            let near = self.nearest(name).map(|n| format!(" (closest in the file: {n})")).unwrap_or_default();
            Error::InvalidModel(format!("tensor {name} is missing{near}"))
        })?;
        if t.shape != shape {
            return Err(Error::InvalidModel(format!(
                "tensor {name} has shape {:?}, the network needs {shape:?}",
                t.shape
            )));
        }
        Ok(&t.data)
    }

    /// Forgets every tensor that is no parameter of these networks, and what the file says about itself.
    pub(crate) fn keep_for<'a>(&mut self, graphs: impl Iterator<Item = &'a Graph>) {
        let names: HashSet<&str> = graphs.flat_map(|g| &g.params).map(|p| p.name.as_str()).collect();
        self.tensors.retain(|name, _| names.contains(name.as_str()));
        self.metadata = HashMap::new();
    }

    /// Checks that every parameter of the network is here with its shape.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        graph.params.iter().try_for_each(|p| self.get(&p.name, &p.shape).map(|_| ()))
    }

    /// The name sharing the longest beginning with `name`, as a hint.
    fn nearest(&self, name: &str) -> Option<&str> {
        let common = |n: &str| n.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
        self.tensors.keys().map(String::as_str).max_by_key(|n| common(n)).filter(|n| common(n) > 0)
    }
}

fn words<const N: usize>(raw: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    raw.chunks_exact(N).map(|b| f(b.try_into().expect("chunks are exact"))).collect()
}
