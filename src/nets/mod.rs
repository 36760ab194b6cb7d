//! Backbones, necks and heads: plain functions over a graph builder that read like the papers' figures.

pub mod fpn;
pub mod group_sampling;
pub mod hambox;
pub mod hr;
pub mod mobilenet;
pub mod nano;
pub mod refineface;
pub mod resnet;
pub mod ssh;
pub mod vgg;

use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d};

/// Convolution + batch normalisation + activation, parameters `name.0.*` and `name.1.*` (PyTorch's
/// `Sequential(Conv2d, BatchNorm2d, ...)`).
pub fn conv_bn(
    b: &mut Builder,
    name: &str,
    x: NodeId,
    conv: Conv2d,
    activation: Option<Activation>,
) -> NodeId {
    b.scope(name, |b| conv_bn_at(b, x, conv, activation, ["0", "1"]))
}

/// Convolution with bias + ReLU, parameters `name.*`.
pub fn conv_relu(b: &mut Builder, name: &str, x: NodeId, conv: Conv2d) -> NodeId {
    let y = b.conv(name, x, conv.bias());
    b.relu(y)
}

/// As [`conv_bn`] with the two layers' own names.
pub fn conv_bn_at(
    b: &mut Builder,
    x: NodeId,
    conv: Conv2d,
    activation: Option<Activation>,
    [conv_name, bn_name]: [&str; 2],
) -> NodeId {
    let y = b.conv(conv_name, x, conv);
    let y = b.batchnorm(bn_name, y, conv.out_channels);
    match activation {
        Some(a) => b.activation(y, a),
        None => y,
    }
}
