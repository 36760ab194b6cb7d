//! The seam between trainer and network: what a GPU's network (`train/device`) implements, too.

use super::Network;
use crate::cpu::dense::Element;
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::objective::{DetectorObjective, Losses, Objective, SecondLook, TwoStep};
use crate::train::optim::{clip_global_norm, first_non_finite, global_norm, Ema, Optimizer};

/// Parameters and their gradients.
pub type ParamsAndGrads<'a> = (&'a mut [Vec<f32>], &'a mut [Vec<f32>]);

/// What the trainer asks of whatever walks the network: this crate's CPU kernels, at either precision, or a device's.
pub trait Engine: Send {
    /// The network.
    fn graph(&self) -> &Graph;
    /// Whether each parameter is trained.
    fn trainable(&self) -> &[bool];
    /// Parameters in the order of the graph's, PyTorch's layout.
    fn params(&mut self) -> Result<&mut [Vec<f32>]>;
    /// Parameters to change, and their gradients.
    fn params_and_grads(&mut self) -> Result<ParamsAndGrads<'_>>;
    /// Outputs for a batch of `shape`, of pixels N x H x W x 3 in RGB; those behind boxes are not among them. `table` gives the
    /// network's value of each pixel value by input channel, and which channel of the pixel each is.
    fn forward(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<Vec<Tensor>>;
    /// As [`Engine::forward`], where the engine can judge the outputs itself: the losses of each of the judgements, which take the
    /// outputs in their order, all of them. The gradients stay where they are, for [`Engine::backward_judged`]; where the network has boxes,
    /// [`Engine::look_again`] comes first. Of a part of a batch that several processes share, losses and gradients are shares of the whole
    /// one's; each of them judges its part. None, with nothing done, where the caller has to judge.
    fn forward_judged(
        &mut self,
        _pixels: &[u8],
        _shape: Shape,
        _table: &InputTable,
        _judgements: &[Judgement<'_>],
    ) -> Result<Option<Vec<Losses>>> {
        Ok(None)
    }
    /// Behind [`Engine::forward_judged`]: chooses boxes by the outputs of that batch, as [`Engine::forward_boxes`] takes them, and judges the
    /// other outputs, likewise.
    fn look_again(&mut self, _again: &LookAgain<'_>) -> Result<Losses> {
        Err(Error::Internal("nothing was judged here".into()))
    }
    /// As [`Engine::backward`], by the gradients that [`Engine::forward_judged`] and [`Engine::look_again`] left.
    fn backward_judged(&mut self) -> Result<()> {
        Err(Error::Internal("nothing was judged here".into()))
    }
    /// The other outputs, for `boxes` on that batch, R x 5 x 1 x 1 for each of the network's inputs of boxes.
    fn forward_boxes(&mut self, boxes: Vec<Tensor>) -> Result<Vec<Tensor>>;
    /// Clears the gradients and sets them from those of the outputs.
    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()>;
    /// Clips the gradients, takes a step of the optimiser and moves the averages.
    ///
    /// An engine whose parameters are elsewhere may keep the optimiser's buffers and the averages there, too; what `update` has is then
    /// of an earlier step until [`Engine::settle`] is called.
    fn update(&mut self, update: Update<'_>) -> Result<Updated> {
        let Update { optimizer, average, clip, lr } = update;
        let (params, grads) = self.params_and_grads()?;
        if let Some((param, _)) = first_non_finite(grads) {
            return Ok(Updated::NotFinite { param });
        }
        let mut grads: Vec<&mut [f32]> = grads.iter_mut().map(|g| &mut g[..]).collect();
        let norm = if clip > 0.0 { clip_global_norm(&mut grads, clip) } else { global_norm(&grads) };
        let grads: Vec<&[f32]> = grads.iter().map(|g| &**g).collect();
        let mut values: Vec<&mut [f32]> = params.iter_mut().map(|p| &mut p[..]).collect();
        optimizer.step(&mut values, &grads, lr)?;
        if let Some(average) = average {
            average.update(params)?;
        }
        Ok(Updated::Done { norm })
    }
    /// Brings the optimiser's buffers and the averages up to date: to be called before they are read.
    fn settle(&mut self, _optimizer: &mut Optimizer, _average: Option<&mut Ema>) -> Result<()> {
        Ok(())
    }
    /// To be called where the optimiser's buffers or the averages were changed otherwise than by [`Engine::update`].
    fn replaced(&mut self) {}
    /// To be called by every process of a training of several in the end, when all have come there.
    fn part(&mut self) -> Result<()> {
        Ok(())
    }
    /// Threads it runs on.
    fn threads(&self) -> usize;
    /// How maps are stored.
    fn precision(&self) -> &'static str;
    /// Whose kernels it runs on: with others the last bits differ.
    fn machine(&self) -> String;
}

/// An objective that an engine may judge by itself.
#[derive(Clone, Copy, Debug)]
pub enum ObjectiveRef<'a> {
    /// Of one step.
    OneStep(&'a Objective),
    /// Of two.
    TwoStep(&'a TwoStep),
}

impl ObjectiveRef<'_> {
    /// How many outputs it judges.
    pub fn outputs(self) -> usize {
        match self {
            Self::OneStep(o) => o.outputs(),
            Self::TwoStep(o) => o.outputs(),
        }
    }
}

impl<'a> From<&'a Objective> for ObjectiveRef<'a> {
    fn from(objective: &'a Objective) -> Self {
        Self::OneStep(objective)
    }
}

impl<'a> From<&'a TwoStep> for ObjectiveRef<'a> {
    fn from(objective: &'a TwoStep) -> Self {
        Self::TwoStep(objective)
    }
}

impl<'a> From<&'a DetectorObjective> for ObjectiveRef<'a> {
    fn from(objective: &'a DetectorObjective) -> Self {
        match objective {
            DetectorObjective::OneStep(o) => Self::OneStep(o),
            DetectorObjective::TwoStep(o) => Self::TwoStep(o),
        }
    }
}

/// What some of a batch's outputs are judged by.
pub struct Judgement<'a> {
    /// How.
    pub objective: ObjectiveRef<'a>,
    /// Faces of each picture.
    pub faces: &'a [Vec<Annotated>],
    /// What each picture fills of its example, pixels; may be empty where the sampler does not ask.
    pub inside: &'a [BBox],
    /// Of each picture's generator.
    pub seeds: Vec<u64>,
    /// Of these losses among the others.
    pub weight: f32,
}

/// How boxes are looked at a second time.
pub struct LookAgain<'a> {
    /// Who chooses and judges.
    pub look: &'a SecondLook,
    /// Faces of each picture.
    pub faces: &'a [Vec<Annotated>],
    /// Of each picture's generator.
    pub seeds: Vec<u64>,
}

/// How the parameters are changed by their gradients.
pub struct Update<'a> {
    /// Rule and buffers.
    pub optimizer: &'a mut Optimizer,
    /// Averages, where there are any.
    pub average: Option<&'a mut Ema>,
    /// Most that the gradient's norm may be; 0 for no limit.
    pub clip: f32,
    /// Learning rate.
    pub lr: f32,
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Updated {
    /// It was made.
    Done {
        /// Of the gradient, before it was clipped.
        norm: f64,
    },
    /// Nothing was changed: a gradient has a value that is no finite number.
    NotFinite {
        /// The parameter whose gradient it is, by its place among the graph's.
        param: usize,
    },
}

/// Network input by pixel value.
#[derive(Clone, Debug, PartialEq)]
pub struct InputTable {
    /// For every input channel: the pixel's channel it comes from.
    pub channel: [usize; 3],
    /// For every input channel and pixel value.
    pub value: [Vec<f32>; 3],
}

impl<T: Element> Engine for Network<T> {
    fn graph(&self) -> &Graph {
        &self.graph
    }
    fn trainable(&self) -> &[bool] {
        &self.trainable
    }
    fn params(&mut self) -> Result<&mut [Vec<f32>]> {
        Ok(&mut self.params)
    }
    fn params_and_grads(&mut self) -> Result<ParamsAndGrads<'_>> {
        Ok((&mut self.params, &mut self.grads))
    }
    fn forward(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<Vec<Tensor>> {
        let values: Vec<Vec<T>> = table.value.iter().map(|v| v.iter().map(|&v| T::of(v)).collect()).collect();
        let image = shape.h * shape.w * 3;
        Network::forward(self, &[shape], &|_, n, z: &mut [T]| {
            let [r, g, b] = table.channel;
            let [v0, v1, v2]: [&[T; 256]; 3] =
                [0, 1, 2].map(|i| values[i][..].try_into().expect("256 values"));
            for (z, p) in z.chunks_exact_mut(3).zip(pixels[n * image..(n + 1) * image].chunks_exact(3)) {
                z[0] = v0[usize::from(p[r])];
                z[1] = v1[usize::from(p[g])];
                z[2] = v2[usize::from(p[b])];
            }
        })?;
        Ok((0..self.first_outputs()).map(|i| self.output(i)).collect())
    }
    fn forward_boxes(&mut self, boxes: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Network::forward_boxes(self, boxes)?;
        Ok((self.first_outputs()..self.graph.outputs.len()).map(|i| self.output(i)).collect())
    }
    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        self.clear_gradients();
        Network::backward(self, d_outputs)?;
        // What is frozen has no part in the gradient's norm.
        for (g, _) in self.grads.iter_mut().zip(&self.trainable).filter(|(_, &trained)| !trained) {
            g.fill(0.0);
        }
        Ok(())
    }
    fn threads(&self) -> usize {
        Network::threads(self)
    }
    fn precision(&self) -> &'static str {
        T::NAME
    }
    fn machine(&self) -> String {
        self.isa.name().into()
    }
}
