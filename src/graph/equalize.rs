//! The same network with its tensors' channels of more equal ranges (Nagel et al. 2019, "Data-Free Quantization Through Weight
//! Equalization and Bias Correction", section 4.1): what a convolution writes is divided by a factor a channel, and the weights of those
//! that read it are multiplied by it. Activations that are homogeneous let the factor through. In f32 nothing changes; in eight
//! bits, where one scale serves all channels of a tensor, small channels keep more of their digits.

use super::build::{Graph, NodeId, ParamId};
use super::fuse::{Draft, DraftStep, ValueId, Work};
use super::weights::Weights;
use crate::cpu::conv::Residual;
use crate::error::{Error, Result};
use crate::layers::{Conv2d, Layer};

/// Largest ratio of the factors of two channels of a tensor.
const SPREAD: f32 = 64.0;

/// A tensor between convolutions alone.
struct Between<'a> {
    value: ValueId,
    producer: &'a DraftStep,
    readers: Vec<&'a DraftStep>,
}

/// Weights of the same network with equalized channels; `largest` tells the greatest magnitudes of every channel of a value, where they
/// are known, in the order of the [`Draft`].
pub(crate) fn equalized(
    graph: &Graph,
    weights: &Weights,
    largest: impl Fn(usize) -> Option<Vec<f32>>,
) -> Result<Weights> {
    let draft = Draft::new(graph);
    let mut out = weights.clone();
    for between in tensors(&draft) {
        let Some(ranges) = largest(between.value.0) else { continue };
        let factors = factors(&draft, &out, &between, &ranges)?;
        divide(&draft, &mut out, between.producer, &factors)?;
        for reader in &between.readers {
            multiply(&draft, &mut out, reader, &factors)?;
        }
    }
    Ok(out)
}

/// The tensors that can be equalized.
fn tensors(draft: &Draft) -> Vec<Between<'_>> {
    // A parameter that several layers share cannot serve factors of its own to each.
    let mut users = vec![0; draft.graph.params.len()];
    draft.graph.nodes.iter().flat_map(|n| &n.params).for_each(|p| users[p.0] += 1);
    let alone = |node: NodeId| draft.graph.nodes[node.0].params.iter().all(|p| users[p.0] == 1);
    let mut found = Vec::new();
    for producer in &draft.steps {
        let value = producer.output;
        let joined = draft.values.iter().any(|v| v.parent.is_some_and(|(parent, _)| parent == value));
        let Work::Chain(chain) = &producer.work else { continue };
        let free = conv(draft, producer).is_some()
            && chain.residual == Residual::None
            && alone(chain.start)
            && chain.norms.iter().all(|&n| alone(n))
            && draft.values[value.0].parent.is_none()
            && !joined
            && !draft.outputs.contains(&value);
        if !free {
            continue;
        }
        let readers: Vec<&DraftStep> = draft.steps.iter().filter(|s| s.inputs.contains(&value)).collect();
        let takes = |s: &&DraftStep| {
            conv(draft, s).is_some_and(|c| c.groups == 1 || c.is_depthwise())
                && s.inputs[0] == value
                && !s.inputs[1..].contains(&value)
                && alone(s.node)
        };
        if !readers.is_empty() && readers.iter().all(takes) {
            found.push(Between { value, producer, readers });
        }
    }
    found
}

/// The convolution that a step starts with.
fn conv<'a>(draft: &'a Draft, step: &DraftStep) -> Option<&'a Conv2d> {
    match (&step.work, draft.graph.nodes[step.node.0].layer()) {
        (Work::Chain(_), Some(Layer::Conv2d(c))) => Some(c),
        _ => None,
    }
}

/// By what each channel is divided. A depthwise convolution's weights are not rounded, so that its input may have equal channels
/// altogether; for others the ranges of values and weights meet in the middle.
fn factors(draft: &Draft, weights: &Weights, between: &Between, ranges: &[f32]) -> Result<Vec<f32>> {
    let mut weighed = vec![0.0f32; ranges.len()];
    for reader in &between.readers {
        let Some(c) = conv(draft, reader).filter(|c| !c.is_depthwise()) else { continue };
        let values = tensor(draft, weights, draft.graph.nodes[reader.node.0].params[0])?;
        let taps = c.kernel[0] * c.kernel[1];
        for each in values.chunks_exact(c.in_channels * taps) {
            // Every output channel has a scale of its own.
            let most = each.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
            for (w, channel) in weighed.iter_mut().zip(each.chunks_exact(taps)) {
                *w = channel.iter().fold(*w, |m, v| m.max(v.abs() / most));
            }
        }
    }
    let dense = weighed.iter().any(|&w| w > 0.0);
    let raw = ranges.iter().zip(&weighed).map(|(&r, &w)| if dense { (r / w.max(1e-3)).sqrt() } else { r });
    let raw: Vec<f32> = raw.collect();
    let most = raw.iter().fold(0.0f32, |m, &v| m.max(v));
    // Channels that were never more than nothing get the least factor.
    Ok(raw.into_iter().map(|v| if most > 0.0 { (v / most).max(1.0 / SPREAD) } else { 1.0 }).collect())
}

fn tensor<'a>(draft: &Draft, weights: &'a Weights, param: ParamId) -> Result<&'a [f32]> {
    let p = &draft.graph.params[param.0];
    weights.get(&p.name, &p.shape)
}

/// Multiplies the runs of a parameter that belong to its first axis by `by`.
fn scale(draft: &Draft, weights: &mut Weights, param: ParamId, by: impl Fn(usize) -> f32) -> Result<()> {
    let p = &draft.graph.params[param.0];
    let t = weights.tensors.get_mut(&p.name);
    let t = t.ok_or_else(|| Error::InvalidModel(format!("tensor {} is missing", p.name)))?;
    let each = t.data.len() / p.shape[0].max(1);
    for (o, values) in t.data.chunks_exact_mut(each.max(1)).enumerate() {
        values.iter_mut().for_each(|v| *v *= by(o));
    }
    Ok(())
}

/// Divides what a step writes: scale and shift of its last batch normalisation, or weights and bias.
fn divide(draft: &Draft, weights: &mut Weights, step: &DraftStep, factors: &[f32]) -> Result<()> {
    let Work::Chain(chain) = &step.work else { return Ok(()) };
    let node = chain.norms.last().copied().unwrap_or(chain.start);
    // Weight and bias stand first in both.
    let params = &draft.graph.nodes[node.0].params;
    params.iter().take(2).try_for_each(|&p| scale(draft, weights, p, |o| 1.0 / factors[o]))
}

/// Multiplies the weights of a step by the factors of its input channels.
fn multiply(draft: &Draft, weights: &mut Weights, step: &DraftStep, factors: &[f32]) -> Result<()> {
    let Some(c) = conv(draft, step) else { return Ok(()) };
    let weight = draft.graph.nodes[step.node.0].params[0];
    if c.is_depthwise() {
        return scale(draft, weights, weight, |o| factors[o]);
    }
    let name = &draft.graph.params[weight.0].name;
    let t = weights.tensors.get_mut(name);
    let t = t.ok_or_else(|| Error::InvalidModel(format!("tensor {name} is missing")))?;
    let taps = c.kernel[0] * c.kernel[1];
    for (i, values) in t.data.chunks_exact_mut(taps).enumerate() {
        values.iter_mut().for_each(|v| *v *= factors[i % c.in_channels]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Pool;
    use crate::graph::{run_reference, Builder, Calibration};
    use crate::layers::{Activation, MaxPool};
    use crate::shape::{Shape, Tensor};

    #[test]
    fn outputs_stay_and_channels_become_alike() {
        let mut b = Builder::new();
        let x = b.input("x", 3);
        let leaky = Some(Activation::LeakyRelu(0.1));
        let x = crate::nets::conv_bn(&mut b, "a", x, Conv2d::new(3, 12, 3), leaky);
        let x = crate::nets::conv_bn(&mut b, "b", x, Conv2d::depthwise(12, 3), leaky);
        let x = crate::nets::conv_bn(&mut b, "c", x, Conv2d::new(12, 8, 1), Some(Activation::Relu));
        let y = b.conv("d", x, Conv2d::new(8, 5, 3).bias());
        let z = b.conv("e", x, Conv2d::new(8, 4, 1));
        let pooled = b.max_pool(y, MaxPool::new(2, 2, 0));
        let last = b.conv("f", pooled, Conv2d::new(5, 3, 1));
        b.output("y", last);
        b.output("z", z);
        let graph = b.finish();
        let mut weights = Weights::random(&graph, 5);
        // Channels of very different ranges.
        let gamma = weights.tensors.get_mut("a.1.weight").unwrap();
        gamma.data.iter_mut().enumerate().for_each(|(i, v)| *v *= 4.0f32.powi(i as i32 % 4));
        let shape = Shape::new(1, 3, 17, 23);
        let x =
            Tensor::from_vec(shape, (0..shape.len()).map(|i| ((i * 37 % 101) as f32) / 50.0 - 1.0).collect());
        let calibrate = |weights: &Weights| {
            let mut c = Calibration::new(&graph, weights).unwrap();
            c.watch_tensors(&mut Pool::new(1).unwrap(), std::slice::from_ref(&x)).unwrap();
            c
        };
        let before = calibrate(&weights);
        let after = before.equalized(&graph, &weights).unwrap();
        assert_ne!(after.tensors["a.1.weight"], weights.tensors["a.1.weight"]);
        assert_ne!(after.tensors["d.weight"], weights.tensors["d.weight"]);
        // Pooled, and an output: left as they are.
        assert_eq!(after.tensors["d.bias"], weights.tensors["d.bias"]);
        let run = |w: &Weights| run_reference(&graph, w, std::slice::from_ref(&x)).unwrap();
        for (a, b) in run(&weights).iter().zip(&run(&after)) {
            let largest = a.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(a.data.iter().zip(&b.data).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
        }
        let spread = |c: &Calibration| {
            let most = c.largest(1).unwrap();
            most.iter().fold(0.0f32, |m, &v| m.max(v)) / most.iter().fold(f32::MAX, |m, &v| m.min(v))
        };
        let (before, after) = (spread(&before), spread(&calibrate(&after)));
        assert!(before > 20.0 && after < 3.0, "{before} became {after}");
    }
}
