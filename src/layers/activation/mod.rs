//! Activations: ReLU, leaky ReLU, sigmoid, and softmax over groups of channels.

/// An activation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// x where positive, `slope` * x elsewhere; 0 <= slope < 1.
    LeakyRelu(f32),
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// Softmax over each run of this many consecutive channels.
    Softmax(usize),
}
