//! Lowering of activations that no convolution took in.

use super::Activation;
use crate::cpu::arena::Format;
use crate::cpu::program::Kind;
use crate::cpu::Op;
use crate::layers::combine;

/// The op, for the formats of its input and output.
pub(crate) fn lower(activation: &Activation, [from, to]: [Format; 2]) -> Op {
    match *activation {
        Activation::Relu => combine::cpu::add(0.0, [from, from, to]),
        Activation::LeakyRelu(slope) => combine::cpu::add(slope, [from, from, to]),
        Activation::Sigmoid => Op(Kind::Sigmoid),
        Activation::Softmax(k) => Op(Kind::Softmax(k)),
    }
}
