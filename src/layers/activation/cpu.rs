//! Lowering of activations that no convolution took in.

use super::Activation;
use crate::cpu::program::Kind;
use crate::cpu::Op;

/// The op.
pub(crate) fn lower(activation: &Activation) -> Op {
    Op(match *activation {
        Activation::Relu => Kind::Add { slope: 0.0 },
        Activation::LeakyRelu(slope) => Kind::Add { slope },
        Activation::Sigmoid => Kind::Sigmoid,
        Activation::Softmax(k) => Kind::Softmax(k),
    })
}
