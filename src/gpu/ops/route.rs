//! Who computes a convolution of one size: a kernel of ours, or a library.

use super::conv::{ConvOp, Joined};
use super::Task;
use crate::error::{Error, Result};
use crate::gpu::cublaslt::{self, CublasLt, LtProduct};
use crate::gpu::cudnn::{self, Cudnn, CudnnConv};
use crate::gpu::fused::{FusedConv, Pointers, Side};
use crate::gpu::map::{Arithmetic, DeviceView, Element};
use std::sync::Arc;

/// What was chosen, as it is remembered when handles and descriptors are gone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Chosen {
    /// Our kernel of this name, with so many bytes of workspace: in the way of this number, the rule's where there is none.
    Own(Option<usize>, &'static str, usize),
    /// cuDNN by this algorithm, with so many bytes of workspace.
    Cudnn(cudnn::Algorithm, usize),
    /// cuBLASLt by this algorithm.
    CublasLt(cublaslt::Algorithm),
}

impl Chosen {
    /// Bytes of workspace.
    pub fn workspace(&self) -> usize {
        match self {
            Chosen::Own(.., bytes) | Chosen::Cudnn(_, bytes) => *bytes,
            Chosen::CublasLt(algorithm) => algorithm.workspace,
        }
    }
}

/// A convolution as the libraries have it described, those that can compute it.
#[derive(Default)]
pub(super) struct Described {
    pub cudnn: Option<(Arc<Cudnn>, CudnnConv)>,
    pub cublaslt: Option<(Arc<CublasLt>, LtProduct)>,
}

/// What was chosen, and what it takes to launch it. It knows geometry, not weights: layers of the same share one.
pub(in crate::gpu) struct Route {
    pub(super) chosen: Chosen,
    pub(super) described: Arc<Described>,
}

impl Route {
    /// Bytes of workspace.
    pub fn workspace(&self) -> usize {
        self.chosen.workspace()
    }

    /// What computes the convolution: a kernel's name, or a library's and its algorithm's.
    pub(super) fn name(&self) -> &'static str {
        match self.chosen {
            Chosen::Own(_, name, _) => name,
            Chosen::Cudnn(algorithm, _) => cudnn::name(algorithm),
            Chosen::CublasLt(_) => "cublasLt",
        }
    }

    /// Gives the convolution to the stream.
    ///
    /// # Safety
    /// As [`super::DeviceOp::launch`]; the views are such as it was chosen for, and the task's workspace has as many bytes as it says.
    pub(super) unsafe fn launch(&self, op: &ConvOp, task: &Task) -> Result<()> {
        // SAFETY: the caller's contract.
        if unsafe { self.try_launch(op, task)? } {
            return Ok(());
        }
        Err(Error::Cuda(format!("{} no longer computes a convolution that it was chosen for", self.name())))
    }

    /// As [`Self::launch`]; false where the library does not compute it so.
    ///
    /// # Safety
    /// As [`Self::launch`].
    pub(super) unsafe fn try_launch(&self, op: &ConvOp, task: &Task) -> Result<bool> {
        let gone = || Error::Internal("a convolution's library".into());
        let input = task.arena + task.inputs[0].offset as u64;
        let pointers = || {
            let low = op.low_bias.as_ref().filter(|_| task.output.element != Element::F32);
            Pointers {
                input,
                weights: op.weights.address(),
                bias: low.unwrap_or(&op.bias).address(),
                add: task.inputs.get(1).map_or(0, |view| task.arena + view.offset as u64),
                output: task.arena + task.output.offset as u64,
                workspace: task.workspace,
            }
        };
        // SAFETY: the caller's contract; weights and biases are as long as the op's sizes say.
        unsafe {
            match &self.chosen {
                Chosen::Own(way, ..) => op.launch_choice(task, *way).map(|()| true),
                Chosen::Cudnn(algorithm, bytes) => {
                    let (library, conv) = self.described.cudnn.as_ref().ok_or_else(gone)?;
                    library.launch(task.stream, conv, (*algorithm, *bytes), &pointers())
                }
                Chosen::CublasLt(algorithm) => {
                    let (library, product) = self.described.cublaslt.as_ref().ok_or_else(gone)?;
                    library.launch(task.stream, product, algorithm, &pointers())
                }
            }
        }
    }
}

impl ConvOp {
    /// The convolution on these views as one call of a library; None where it is none: of groups, with a leaky activation, with a map added
    /// that is of another size or behind the activation, on a map whose channels are not those of the weights.
    pub(super) fn fused(&self, inputs: &[DeviceView], output: &DeviceView) -> Option<FusedConv> {
        let (input, output) = (Side::of(&inputs[0]), Side::of(output));
        let add = inputs.get(1).map(Side::of);
        // max(x, slope * x): nothing with 1, ReLU with 0.
        let relu = match self.slope {
            0.0 => true,
            1.0 => false,
            _ => return None,
        };
        let same_size =
            |a: &Side| (a.size, a.channels, a.element) == (output.size, output.channels, output.element);
        let joins = match self.joined {
            Joined::No => add.is_none(),
            Joined::Before => add.as_ref().is_some_and(same_size),
            Joined::After => !relu && add.as_ref().is_some_and(same_size),
        };
        // Packed weights are as long as their map's channels with the zeros behind them, and begin where vectors do.
        let element = self.kernels.arithmetic().element();
        let reads = input.element == element && input.channels == self.channels;
        let whole = element == Element::F32 || inputs[0].is_whole_vectors();
        let window = self.window;
        (self.groups == 1 && joins && reads && whole).then_some(FusedConv {
            kernel: window.kernel,
            stride: window.stride,
            dilation: window.dilation,
            pad: window.pad,
            input,
            output,
            add,
            adds_input: inputs.get(1).is_some_and(|add| Side::overlap(add, &inputs[0])),
            relu,
            tf32: self.kernels.arithmetic() == Arithmetic::Tf32,
        })
    }
}
