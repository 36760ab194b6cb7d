//! Batch normalisation folded into the convolution before it.

use super::build::{Graph, Node, NodeId};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::layers::Layer;

/// Weight and bias of a convolution-like node, in the layer's PyTorch order; bias zeros where the
/// layer has none.
pub(crate) struct Affine {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    /// Values of `weight` that belong to consecutive output channels: (outputs, values each), and
    /// whether outputs stand second, as a transposed convolution has them.
    layout: Layout,
}

#[derive(Clone, Copy)]
enum Layout {
    /// `[out, ...]`.
    OutFirst,
    /// `[in, out/groups, kh, kw]`: in, out/groups, kh*kw, groups.
    Transposed { outs: usize, taps: usize, ins_per_group: usize },
}

impl Affine {
    /// The weights of a node that starts a chain, or None for other nodes. A batch normalisation
    /// is a per-channel scale and shift.
    pub fn of(graph: &Graph, id: NodeId, weights: &Weights) -> Result<Option<Self>> {
        let node = &graph.nodes[id.0];
        let param = |i: usize| {
            let p = &graph.params[node.params[i].0];
            weights.get(&p.name, &p.shape)
        };
        let with_bias = |has: bool, outs: usize, layout: Layout| -> Result<Option<Self>> {
            let bias = if has { param(1)?.to_vec() } else { vec![0.0; outs] };
            Ok(Some(Self { weight: param(0)?.to_vec(), bias, layout }))
        };
        match node.layer() {
            Some(Layer::Conv2d(c)) => with_bias(c.bias, c.out_channels, Layout::OutFirst),
            Some(Layer::Linear(l)) => with_bias(l.bias, l.out_features, Layout::OutFirst),
            Some(Layer::ConvTranspose2d(c)) => with_bias(
                c.bias,
                c.out_channels,
                Layout::Transposed {
                    outs: c.out_channels / c.groups,
                    taps: c.kernel[0] * c.kernel[1],
                    ins_per_group: c.in_channels / c.groups,
                },
            ),
            Some(Layer::BatchNorm(bn)) => {
                let (weight, bias) = scale_and_shift(graph, node, bn.eps, weights)?;
                Ok(Some(Self { weight, bias, layout: Layout::OutFirst }))
            }
            _ => Ok(None),
        }
    }
}

/// y = x * scale + shift of a batch normalisation with running statistics:
/// scale = weight / sqrt(var + eps), shift = bias - mean * scale. Computed in f64.
fn scale_and_shift(graph: &Graph, node: &Node, eps: f64, weights: &Weights) -> Result<(Vec<f32>, Vec<f32>)> {
    let param = |i: usize| {
        let p = &graph.params[node.params[i].0];
        weights.get(&p.name, &p.shape)
    };
    let (weight, bias, mean, var) = (param(0)?, param(1)?, param(2)?, param(3)?);
    let scale = |c: usize| f64::from(weight[c]) / (f64::from(var[c]).max(0.0) + eps).sqrt();
    let scales = (0..weight.len()).map(|c| scale(c) as f32).collect();
    let shifts =
        (0..weight.len()).map(|c| (f64::from(bias[c]) - f64::from(mean[c]) * scale(c)) as f32).collect();
    Ok((scales, shifts))
}

/// Folds the batch normalisation `node` into `affine`.
pub(crate) fn fold_batchnorm(
    affine: &mut Affine,
    graph: &Graph,
    node: &Node,
    eps: f64,
    weights: &Weights,
) -> Result<()> {
    let (scale, shift) = scale_and_shift(graph, node, eps, weights)?;
    if scale.len() != affine.bias.len() {
        return Err(Error::InvalidModel(format!(
            "layer {}: batchnorm of {} channels after a layer of {}",
            node.name,
            scale.len(),
            affine.bias.len()
        )));
    }
    match affine.layout {
        Layout::OutFirst => {
            let each = affine.weight.len() / scale.len();
            for (values, s) in affine.weight.chunks_exact_mut(each).zip(&scale) {
                values.iter_mut().for_each(|v| *v *= s);
            }
        }
        Layout::Transposed { outs, taps, ins_per_group } => {
            for (i, values) in affine.weight.chunks_exact_mut(outs * taps).enumerate() {
                let group = i / ins_per_group;
                for (o, values) in values.chunks_exact_mut(taps).enumerate() {
                    values.iter_mut().for_each(|v| *v *= scale[group * outs + o]);
                }
            }
        }
    }
    for (c, b) in affine.bias.iter_mut().enumerate() {
        *b = *b * scale[c] + shift[c];
    }
    Ok(())
}
